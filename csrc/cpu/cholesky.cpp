#include "cholesky.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace pgdfast {
namespace {

constexpr index kDepth = 256;   // rows of panels whose products are summed at once: two tiles' worth stays near the core

}  // namespace

// Rows first .. first + rows - 1 of U in the columns of one group of panels, from C less the products of the rows above.
template <class T>
bool Cholesky<T>::eliminate_block(index first, index rows, index p, int panels, const T* block, index ld) {
  const Tiles<T>& t = tiles<T>();
  for (index r = first; r < first + rows; r += t.rows) {
    const index own = r / width_;                             // the panel that column r lies in
    const index begin = std::max(p, own), end = p + panels;   // panels to the left of it have no rows r
    if (begin >= end) break;
    T* b[kTilePanels];
    for (index v = begin; v < end; ++v) b[v - begin] = panel(v);
    if (!t.eliminate(int(end - begin), first, r, panel(own), b, block + (r - first) * ld + (begin - p) * width_, ld,
                     added_.data(), inverse_.data()))
      return false;
  }
  return true;
}

// The same from the matrix: subtracts what the rows above `first` contribute, then eliminates.
template <class T>
bool Cholesky<T>::work(const T* matrix, index ld, index first, index rows, index p, std::vector<T>& block) {
  const Tiles<T>& t = tiles<T>();
  const int panels = int(std::min<index>(kTilePanels, order_ / width_ - p));
  const index columns = panels * width_, column = p * width_;
  // -C, so that products add to it. What lies left of the diagonal is never asked for; the padding is zero.
  for (index i = 0; i < rows; ++i) {
    T* out = block.data() + i * columns;
    const T* in = matrix + (first + i) * ld + column;
    const index kept = first + i < n_ ? std::min(columns, n_ - column) : 0;
    for (index j = 0; j < kept; ++j) out[j] = -in[j];
    for (index j = kept; j < columns; ++j) out[j] = T(0);
  }
  for (index k = 0; k < first; k += kDepth) {
    const index depth = std::min(kDepth, first - k);
    const T* b[kTilePanels];
    for (int v = 0; v < panels; ++v) b[v] = panel(p + v) + k * width_;
    for (index i = 0; i < rows; i += t.rows) {
      const index r = first + i;
      if (column + columns <= r) break;
      t.product(panels, t.rows, depth, panel(r / width_) + k * width_ + r % width_, b, block.data() + i * columns, columns,
                true);
    }
  }
  for (index i = 0; i < rows * columns; ++i) block[std::size_t(i)] = -block[std::size_t(i)];
  return eliminate_block(first, rows, p, panels, block.data(), columns);
}

template <class T>
bool Cholesky<T>::factor(const T* matrix, index ld, index n, const T* added, int threads) {
  const Tiles<T>& t = tiles<T>();
  width_ = t.width;
  n_ = n;
  order_ = (n + width_ - 1) / width_ * width_;
  const index count = order_ / width_, group = kTilePanels * width_;
  panels_.resize(std::size_t(width_ * width_ * (count * (count + 1) / 2)));
  inverse_.resize(std::size_t(order_));
  added_.assign(std::size_t(order_), T(1));
  std::copy(added, added + n, added_.begin());
  x_.resize(std::size_t(order_));
  // Rows per block: wide enough that panels are read from afar seldom, narrow enough that two threads find work.
  const index height = order_ > 768 ? 2 * group : group;
  blocks_.resize(std::size_t(std::max(threads, 1)));
  for (std::vector<T>& block : blocks_) block.resize(std::size_t(height * group));

  std::atomic<bool> good{true};
  const auto diagonal = [&](index first, std::vector<T>& block) {
    const index rows = std::min(height, order_ - first);
    for (index p = first / width_; p * width_ < first + rows; p += kTilePanels)
      if (!work(matrix, ld, first, rows, p, block)) good = false;
  };
  diagonal(0, blocks_[0]);
  // Per block of rows: first its part of the next diagonal block's columns and that block itself, by one thread, while others
  // take the columns beyond. All threads go through all blocks, so that they meet; after a failure they do nothing there.
  const index steps = (order_ - 1) / height;
  std::vector<std::atomic<index>> next(static_cast<std::size_t>(steps));
  for (std::atomic<index>& n : next) n = 0;
  const auto step = [&](index number, std::vector<T>& block) {
    const index first = number * height, p0 = (first + height) / width_, groups = (count - p0 + kTilePanels - 1) / kTilePanels;
    const index ahead = std::min(groups, height / group);
    std::atomic<index>& mine = next[std::size_t(number)];
    for (index item = mine++; item < groups - ahead + 1 && good; item = mine++) {
      const index from = item == 0 ? 0 : ahead + item - 1, to = item == 0 ? ahead : from + 1;
      for (index g = from; g < to && good; ++g)
        if (!work(matrix, ld, first, height, p0 + g * kTilePanels, block)) good = false;
      if (item == 0 && good) diagonal(first + height, block);
    }
  };
  in_steps(threads, steps, [&](index number, int thread) { step(number, blocks_[std::size_t(thread)]); });
  return good;
}

template <class T>
void Cholesky<T>::solve(T* x) const {
  const Tiles<T>& t = tiles<T>();
  const index count = order_ / width_;
  std::copy(x, x + n_, x_.begin());
  std::fill(x_.begin() + n_, x_.end(), T(0));
  for (index p = 0; p < count; ++p) {   // U^T z = x
    T* z = x_.data() + p * width_;
    t.subtract_rows(p * width_, panel(p), x_.data(), z);
    const T* corner = panel(p) + p * width_ * width_;
    for (index l = 0; l < width_; ++l) {
      z[l] *= inverse_[std::size_t(p * width_ + l)];
      for (index j = l + 1; j < width_; ++j) z[j] -= corner[l * width_ + j] * z[l];
    }
  }
  for (index p = count; p-- > 0;) {   // U y = z
    T* z = x_.data() + p * width_;
    const T* corner = panel(p) + p * width_ * width_;
    for (index l = width_; l-- > 0;) {
      for (index j = l + 1; j < width_; ++j) z[l] -= corner[l * width_ + j] * z[j];
      z[l] *= inverse_[std::size_t(p * width_ + l)];
    }
    t.subtract_columns(p * width_, panel(p), z, x_.data());
  }
  std::copy(x_.begin(), x_.begin() + n_, x);
}

template <class T>
index Cholesky<T>::bytes() const {
  std::size_t numbers = panels_.size() + inverse_.size() + added_.size() + x_.size();
  for (const std::vector<T>& block : blocks_) numbers += block.size();
  return index(numbers * sizeof(T));
}

template class Cholesky<float>;
template class Cholesky<double>;

}  // namespace pgdfast
