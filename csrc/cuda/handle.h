// What a handle of the C interface stands for, and how its functions fail.
#pragma once

#include <algorithm>

#include "ensemble_plan.h"
#include "gram.h"
#include "../plan/read.h"

#define PGDFAST_API extern "C" __attribute__((visibility("default")))

namespace pgdfast::cuda {

inline thread_local std::string message;

template <class F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

struct Plan {
  bool wide = false;
  Structure s;
  RowLayout layout;
  Schedule forward, adjoint, inner;
  GramPlan gram;
  DensePlan dense;
  EnsemblePlan ensemble;
  bool gram_planned = false, dense_planned = false, ensemble_planned = false;
  index gram_outputs = 0, dense_outputs = 0;   // places of output_of in the tables
  Bound<float> single{&s, {}};
  Bound<double> twice{&s, {}};

  template <class T>
  Bound<T>& bound() {
    if constexpr (sizeof(T) == 4) return single;
    else return twice;
  }
  index scratch() const { return std::max({forward.scratch, adjoint.scratch, inner.scratch, index(1)}); }

  // Of the Gram matrix (0), of J (1), of an ensemble's members (2).
  const std::vector<index>& table(int kind) {
    if (kind == 2) {
      if (!ensemble_planned) ensemble = plan_ensemble(s, layout);
      ensemble_planned = true;
      return ensemble.table;
    }
    if (!layout.local) throw std::runtime_error("no row layout: call set_rows first");
    if (kind == 0 && !gram_planned) {
      gram = plan_gram(s, layout, gram_tile(s.num_residuals, wide, multiprocessors()));
      gram_outputs = index(gram.table.size());
      gram.table.insert(gram.table.end(), layout.output_of.begin(), layout.output_of.end());
      gram_planned = true;
    }
    if (kind == 1 && !dense_planned) {
      dense = plan_dense(s, layout);
      dense_outputs = index(dense.table.size());
      dense.table.insert(dense.table.end(), layout.output_of.begin(), layout.output_of.end());
      dense_planned = true;
    }
    return kind == 0 ? gram.table : dense.table;
  }
};

// Calls body(T()) for the plan's number type.
template <class F>
int with(Plan* plan, F&& body) {
  return guarded([&] {
    if (plan->wide) body(double());
    else body(float());
  });
}

}  // namespace pgdfast::cuda
