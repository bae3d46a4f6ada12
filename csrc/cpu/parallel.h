// Loops over independent items of uneven size, each done by one thread.
#pragma once

#include <cstddef>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../plan/plan.h"

namespace pgdfast {

// Runs body(item, thread) for every item; threads take the next one as they get done.
template <class F>
void each_item(int threads, index count, F&& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::ptrdiff_t i = 0; i < std::ptrdiff_t(count); ++i) body(index(i), omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  for (index i = 0; i < count; ++i) body(i, 0);
}

}  // namespace pgdfast
