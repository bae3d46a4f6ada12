#include "blas.h"

#include <algorithm>
#include <utility>

namespace pgdfast {

template <>
Blas<float>& blas<float>() {
  static Blas<float> table;
  return table;
}
template <>
Blas<double>& blas<double>() {
  static Blas<double> table;
  return table;
}

int (*set_blas_threads)(int) = nullptr;
std::atomic<int> max_threads{1};

static thread_local bool alone = false;
Alone::Alone() : before_(std::exchange(alone, true)) {}
Alone::~Alone() { alone = before_; }

int thread_limit() { return alone ? 1 : max_threads.load(); }

int threads_for(double flops) {
  // One more thread per 3 million operations, some 30 microseconds at a core's rate for small products: two threads
  // take a (400 x 80) (80 x 80) product in two thirds of the time of one.
  const int useful = 1 + int(flops / 3e6);
  return std::max(1, std::min(thread_limit(), useful));
}

namespace {

struct Operand {
  char trans;
  int ld;
};

// The column-major reading of a (rows x cols) matrix with these strides.
Operand read(index rows, index cols, index row_stride, index col_stride) {
  if (row_stride == 1 || rows == 1) {
    if (cols <= 1 || (col_stride >= rows && col_stride >= 1)) return {'N', int(std::max<index>(cols <= 1 ? rows : col_stride, 1))};
  }
  return {'T', int(std::max<index>(rows <= 1 ? cols : row_stride, 1))};
}

}  // namespace

template <class T>
void gemm(index m, index n, index k, T alpha, const T* a, index a_row, index a_col, const T* b, index b_row,
          index b_col, T beta, T* c, index c_row, index c_col) {
  if (m == 0 || n == 0) return;
  const bool column_major = (c_row == 1 || m == 1) && (n == 1 || c_col >= m);
  if (!column_major) {   // row-major c: its transpose is column-major
    std::swap(m, n);
    std::swap(a, b);
    std::swap(a_row, b_col);
    std::swap(a_col, b_row);
    std::swap(c_row, c_col);
  }
  const Operand oa = read(m, k, a_row, a_col), ob = read(k, n, b_row, b_col);
  const int ldc = int(std::max<index>(n <= 1 ? m : c_col, 1));
  blas<T>().gemm(oa.trans, ob.trans, int(m), int(n), int(k), alpha, a, oa.ld, b, ob.ld, beta, c, ldc);
}

template void gemm<float>(index, index, index, float, const float*, index, index, const float*, index, index, float,
                          float*, index, index);
template void gemm<double>(index, index, index, double, const double*, index, index, const double*, index, index,
                           double, double*, index, index);

}  // namespace pgdfast
