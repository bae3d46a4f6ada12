// The Cholesky factor of a damped Gram or normal matrix, held by whoever may solve with it again.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "../plan/limits.h"
#include "cholesky.h"

namespace pgdfast {

// Memory for the making of factors, kept between solves.
template <class T>
struct FactorScratch {
  std::vector<T> diagonal;
  std::vector<double> matrix, wide_diagonal;
};

// F with F^T F = matrix + diag(added): in T, or in double for small float matrices.
template <class T>
class Factor {
 public:
  // Factors matrix + diag(added(i)), of which the upper triangle is read: n x n, rows `ld` apart. False if it is not positive
  // definite. positions: null, or where each residual stands in the matrix; `solve` then takes and gives vectors in residual order.
  template <class D>
  bool factor(const T* matrix, index ld, index n, D&& added, const std::vector<index>* positions,
              FactorScratch<T>& scratch);
  // x <- (F^T F)^-1 x in the matrix's own order. One thread at a time.
  void solve_in_place(T* x);
  // x = (F^T F)^-1 b in residual order; x may be b. Any thread.
  void solve(const T* b, T* x);

  index order() const { return order_; }
  bool is_dual() const { return dual_; }
  index bytes() const;
  std::vector<T> dual_vector;   // y of the solve that it was made for, residual order; empty for a primal factor

 private:
  index order_ = 0;
  bool wide_ = false, dual_ = false;
  std::vector<index> positions_;
  Cholesky<T> narrow_;
  Cholesky<double> double_;
  std::vector<T> ordered_;
  std::vector<double> wide_x_;
  std::mutex mutex_;
};

// Threads worth starting for a factor of this order.
int threads_for_factor(index n);

template <class T>
template <class D>
bool Factor<T>::factor(const T* matrix, index ld, index n, D&& added, const std::vector<index>* positions,
                       FactorScratch<T>& scratch) {
  order_ = n;
  dual_ = positions != nullptr;
  if (positions) positions_ = *positions;
  wide_ = sizeof(T) < sizeof(double) && n <= limits::kDoubleFactor;
  if (!wide_) {
    ensure(scratch.diagonal, n);
    for (index i = 0; i < n; ++i) scratch.diagonal[std::size_t(i)] = T(added(i));
    return narrow_.factor(matrix, ld, n, scratch.diagonal.data(), threads_for_factor(n));
  }
  ensure(scratch.matrix, n * n);
  ensure(scratch.wide_diagonal, n);
  for (index i = 0; i < n; ++i) {
    std::copy(matrix + i * ld + i, matrix + i * ld + n, scratch.matrix.data() + i * n + i);
    scratch.wide_diagonal[std::size_t(i)] = double(added(i));
  }
  return double_.factor(scratch.matrix.data(), n, n, scratch.wide_diagonal.data(), 1);
}

}  // namespace pgdfast
