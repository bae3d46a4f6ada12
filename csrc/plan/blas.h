// Dense linear algebra as a table of function pointers. The binding fills it; kernels never link a BLAS.
#pragma once

#include <atomic>

#include "plan.h"

namespace pgdfast {

// Column-major, Fortran conventions, 32-bit sizes as in LP64 BLAS.
template <class T>
struct Blas {
  void (*gemm)(char trans_a, char trans_b, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb,
               T beta, T* c, int ldc) = nullptr;
};

template <class T>
Blas<T>& blas();

// Sets the thread count of BLAS calls made by this thread; returns the previous setting. A no-op table entry
// is allowed: then the BLAS decides by itself.
extern int (*set_blas_threads)(int);

// Threads that the caller allows at most, the number worth using for `flops` of work, and the limit here (see Alone).
extern std::atomic<int> max_threads;
int threads_for(double flops);
int thread_limit();

// For a scope, work of this thread starts no others: it is itself one of several at the same work.
class Alone {
 public:
  Alone();
  ~Alone();
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;

 private:
  bool before_;
};

// Sets the BLAS threads of this thread for a scope.
class BlasThreads {
 public:
  explicit BlasThreads(int count) : previous_(set_blas_threads ? set_blas_threads(count) : 0) {}
  ~BlasThreads() {
    if (set_blas_threads) set_blas_threads(previous_);
  }
  BlasThreads(const BlasThreads&) = delete;
  BlasThreads& operator=(const BlasThreads&) = delete;

 private:
  int previous_;
};

// c[m, n] = beta * c + alpha * a[m, k] b[k, n] for operands given by (row stride, column stride), one of which is
// 1 wherever both extents exceed 1.
template <class T>
void gemm(index m, index n, index k, T alpha, const T* a, index a_row, index a_col, const T* b, index b_row,
          index b_col, T beta, T* c, index c_row, index c_col);

}  // namespace pgdfast
