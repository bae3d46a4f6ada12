// Work that threads share. What one of them throws, out of memory above all, reaches the caller once all are done.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../plan/blas.h"
#include "../plan/plan.h"

namespace pgdfast {

// The first exception of a parallel region: an exception must not leave its thread, or the process ends or hangs.
class Caught {
 public:
  template <class F>
  void run(F&& body) noexcept {
    try {
      body();
    } catch (...) {
      const std::lock_guard guard(mutex_);
      if (!raised_) raised_ = std::current_exception();
      any_ = true;
    }
  }
  bool any() const { return any_; }
  // To be called behind the region.
  void rethrow() const {
    if (raised_) std::rethrow_exception(raised_);
  }

 private:
  std::atomic<bool> any_{false};
  std::mutex mutex_;
  std::exception_ptr raised_;
};

// Runs body(item, thread) for every item; threads take the next one as they get done. After an exception no item is begun.
template <class F>
void each_item(int threads, index count, F&& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
    Caught caught;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::ptrdiff_t i = 0; i < std::ptrdiff_t(count); ++i)
      if (!caught.any()) caught.run([&] { body(index(i), omp_get_thread_num()); });
    caught.rethrow();
    return;
  }
#endif
  (void)threads;
  for (index i = 0; i < count; ++i) body(i, 0);
}

// Runs body(begin, end) over [0, n), split over the threads where the work is worth it. Every part writes elements of its
// own, so results do not depend on the number of threads.
template <class F>
void in_parts(index n, bool worth, F&& body) {
#ifdef _OPENMP
  const index threads = std::min<index>(thread_limit(), n);
  if (worth && threads > 1) {
    Caught caught;
#pragma omp parallel num_threads(int(threads))
    {
      const index part = omp_get_thread_num(), parts = omp_get_num_threads();
      caught.run([&] { body(n * part / parts, n * (part + 1) / parts); });
    }
    caught.rethrow();
    return;
  }
#endif
  (void)worth;
  body(index(0), n);
}

// Runs body(step, thread) for every step on all threads, which meet between two steps. After an exception no step is begun.
template <class F>
void in_steps(int threads, index steps, F&& body) {
#ifdef _OPENMP
  if (threads > 1) {
    Caught caught;
#pragma omp parallel num_threads(threads)
    for (index step = 0; step < steps; ++step) {
      if (!caught.any()) caught.run([&] { body(step, omp_get_thread_num()); });
#pragma omp barrier
    }
    caught.rethrow();
    return;
  }
#endif
  (void)threads;
  for (index step = 0; step < steps; ++step) body(step, 0);
}

// Runs out of memory at one item, part or step of a parallel region, for tests: raises std::bad_alloc once all threads are done.
void fail_in_parallel(const std::string& kind, int threads, index failing);

}  // namespace pgdfast
