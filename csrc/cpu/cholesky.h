// Cholesky of a symmetric positive definite matrix, U^T U, on packed panels.
//
// Rows of U are found from the top, block by block of rows, each from the rows above it ("left-looking"): every element is
// written once, and all products run over panels that are already packed. Column panel p of U holds rows 0 to
// (p + 1) width - 1.
#pragma once

#include <vector>

#include "tiles.h"

namespace pgdfast {

template <class T>
class Cholesky {
 public:
  // Factors matrix + diag(added), of which the upper triangle is read: row-major, rows `ld` apart. False if it is not
  // positive definite to working precision. Costs n^3 / 3 operations.
  bool factor(const T* matrix, index ld, index n, const T* added, int threads);
  // x <- (U^T U)^-1 x. Costs 2 n^2 operations.
  void solve(T* x) const;
  index bytes() const;

 private:
  T* panel(index p) { return panels_.data() + width_ * width_ * (p * (p + 1) / 2); }
  const T* panel(index p) const { return const_cast<Cholesky*>(this)->panel(p); }
  bool eliminate_block(index first, index rows, index p, int panels, const T* block, index ld);
  bool work(const T* matrix, index ld, index first, index rows, index p, std::vector<T>& block);

  index n_ = 0, order_ = 0, width_ = 0;
  std::vector<T> panels_, inverse_, added_;
  mutable std::vector<T> x_;
  std::vector<std::vector<T>> blocks_;   // one per thread
};

}  // namespace pgdfast
