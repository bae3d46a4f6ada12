// K = J W J^T, and explicit rows of J, from the arenas that unit sweeps leave (../cpu/gram.h has the formula).
#pragma once

#include "gram_plan.h"
#include "sweep.h"

namespace pgdfast::cuda {

// u[e] = 1 where residual e belongs to the output, else 0.
template <class T>
void unit(const index* output_of, index output, index count, T* u, Stream stream);

// Packs factors and adds up explicit rows in `packed`, then writes K, M x M in residual order, both halves. weights: one factor
// per parameter buffer, on the device; table: the plan's, on the device; arenas: one per output, `arena` elements apart.
template <class T>
void gram(const Bound<T>& program, const RowLayout& layout, const GramPlan& plan, const index* table, const T* arenas,
          const T* weights, T* packed, T* K, Stream stream);

// J, row-major M x P, in residual order; cleared first.
template <class T>
void dense_rows(const Bound<T>& program, const RowLayout& layout, const DensePlan& plan, const index* table, const T* arenas,
                T* J, Stream stream);

// d[j] = sum_i J[i, j]^2.
template <class T>
void squares(index rows, index columns, const T* J, T* d, Stream stream);

}  // namespace pgdfast::cuda
