// What a problem in parts is solved with in Python: the factor of a matrix that was added up.
#include <pybind11/stl.h>

#include "bindings_factor.h"
#include "cpu/gram.h"

namespace pgdfast {
namespace {

// (the factor of H + diag(added), None where that is not positive definite; the trace of H diag(added)^-1). H: n + 1 rows of
// gram_stride(n) elements, of which the upper triangle is read; positions: of a dual matrix, where each residual stands in it.
template <class T>
py::tuple factored(py::handle H, index n, py::handle added, const std::optional<std::vector<index>>& positions) {
  const index ld = gram_stride<T>(n);
  const T* matrix = pointer<T>(H, (n + 1) * ld, "H");
  const double* d = pointer<double>(added, n, "added");
  if (positions) {
    std::vector<char> met(std::size_t(n), 0);
    for (index p : *positions)
      if (p < 0 || p >= n || met[std::size_t(p)]++) throw py::index_error("positions must name every row of the matrix once");
    if (index(positions->size()) != n) throw py::value_error("one position per row of the matrix");
  }
  const auto factor = std::make_shared<Factor<T>>();
  double trace = 0;
  bool good;
  {
    const Running running;
    FactorScratch<T> scratch;
    for (index i = 0; i < n; ++i) trace += double(matrix[i * ld + i]) / d[i];
    good = factor->factor(matrix, ld, n, [&](index i) { return d[i]; }, positions ? &*positions : nullptr, scratch);
  }
  return py::make_tuple(good ? py::cast(FactorHandle<T>(factor)) : py::none(), trace);
}

template <class T>
void bind_parts_of(py::module_& m, const std::string& type, const std::string& name) {
  using F = FactorHandle<T>;
  py::class_<F>(m, ("Factor" + type).c_str())
      .def("solve", &F::solve)
      .def("dual_vector", &F::dual_vector)
      .def("set_dual_vector", &F::set_dual_vector)
      .def_property_readonly("order", &F::order)
      .def_property_readonly("is_dual", &F::is_dual)
      .def_property_readonly("bytes", &F::bytes);
  m.def(("factor" + name).c_str(), &factored<T>);
  m.def(("gram_stride" + name).c_str(), &gram_stride<T>);
}

}  // namespace

void bind_parts(py::module_& m) {
  bind_parts_of<float>(m, "Float", "_float");
  bind_parts_of<double>(m, "Double", "_double");
}

}  // namespace pgdfast
