#include "factor.h"

#include "../plan/blas.h"

namespace pgdfast {

int threads_for_factor(index n) { return n <= limits::kOneThreadOrder ? 1 : threads_for(double(n) * double(n) * double(n) / 3.0); }

template <class T>
void Factor<T>::solve_in_place(T* x) {
  if (!wide_) {
    narrow_.solve(x);
    return;
  }
  wide_x_.assign(x, x + order_);
  double_.solve(wide_x_.data());
  std::copy(wide_x_.begin(), wide_x_.end(), x);
}

template <class T>
void Factor<T>::solve(const T* b, T* x) {
  const std::lock_guard guard(mutex_);
  if (!dual_) {
    std::copy(b, b + order_, x);
    return solve_in_place(x);
  }
  ensure(ordered_, order_);
  for (index e = 0; e < order_; ++e) ordered_[std::size_t(positions_[std::size_t(e)])] = b[e];
  solve_in_place(ordered_.data());
  for (index e = 0; e < order_; ++e) x[e] = ordered_[std::size_t(positions_[std::size_t(e)])];
}

template <class T>
index Factor<T>::bytes() const {
  const std::size_t numbers = dual_vector.size() + ordered_.size();
  return narrow_.bytes() + double_.bytes() + index(numbers * sizeof(T) + positions_.size() * sizeof(index) +
                                                   wide_x_.size() * sizeof(double));
}

template class Factor<float>;
template class Factor<double>;

}  // namespace pgdfast
