// Factors and packed factors as Python holds them.
#pragma once

#include <memory>

#include "bindings.h"
#include "cpu/factor.h"
#include "cpu/packed.h"

namespace pgdfast {

// A factor that Python holds: that of a solve (Solver::dual), or of a matrix of the caller's.
template <class T>
class FactorHandle {
 public:
  explicit FactorHandle(std::shared_ptr<Factor<T>> factor) : factor_(std::move(factor)) {}

  void solve(py::handle b, py::handle x) {
    const T* from = pointer<T>(b, order(), "b");
    T* to = pointer<T>(x, order(), "x");
    const Running running;
    factor_->solve(from, to);
  }
  void dual_vector(py::handle y) const {
    if (!is_dual()) throw py::value_error("a factor of the primal matrix has no dual vector");
    if (index(factor_->dual_vector.size()) != order()) throw py::value_error("this factor was given no dual vector");
    std::copy_n(factor_->dual_vector.data(), order(), pointer<T>(y, order(), "y"));
  }
  void set_dual_vector(py::handle y) {
    if (!is_dual()) throw py::value_error("a factor of the primal matrix has no dual vector");
    const T* from = pointer<T>(y, order(), "y");
    factor_->dual_vector.assign(from, from + order());
  }
  index order() const { return factor_->order(); }
  bool is_dual() const { return factor_->is_dual(); }
  index bytes() const { return factor_->bytes(); }

 private:
  std::shared_ptr<Factor<T>> factor_;
};

// Packed factors: of a plan, over memory of their own, or over a tensor.
template <class T>
struct PackedHandle {
  std::shared_ptr<const Packed<T>> packed;
  at::Tensor memory;
};

}  // namespace pgdfast
