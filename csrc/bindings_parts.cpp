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

// Over a tensor of the plan's dtype, which is kept.
template <class T>
PackedHandle<T> packed_of(const std::vector<index>& header, py::handle tensor) {
  if (!THPVariable_Check(tensor.ptr())) throw py::type_error("packed factors must be a tensor");
  const at::Tensor& memory = THPVariable_Unpack(tensor.ptr());
  const T* data = pointer<T>(tensor, memory.numel(), "packed factors");
  return {read_packed<T>(header, data, memory.numel()), memory};
}

// K: (rows, ld), of which rows row .. row + last - first - 1 and columns from `column` on are written.
template <class T>
void rows_of_gram(const PackedHandle<T>& a, const PackedHandle<T>& b, index first, index last, py::handle weights, py::handle K,
                  index row, index column) {
  const std::vector<T> ones(a.packed->sizes.size(), T(1));
  const T* w = weights.is_none() ? ones.data() : pointer<T>(weights, index(ones.size()), "weights");
  if (!THPVariable_Check(K.ptr())) throw py::type_error("K must be a tensor");
  const at::Tensor& matrix = THPVariable_Unpack(K.ptr());
  T* data = pointer<T>(K, matrix.numel(), "K");
  if (matrix.dim() != 2) throw py::value_error("K must be a matrix");
  const index ld = matrix.size(1);
  if (first < 0 || first > last || last > a.packed->count) throw py::index_error("no such rows of packed factors");
  if (row < 0 || row + last - first > matrix.size(0) || column < 0 || column + b.packed->count > ld)
    throw py::index_error("K has no room for these rows and columns");
  const Running running;
  gram_rows(*a.packed, *b.packed, first, last, w, data + (row - first) * ld + column, ld);
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
  using H = PackedHandle<T>;
  py::class_<H>(m, ("Packed" + type).c_str())
      .def("header", [](const H& h) { return h.packed->header(); })
      .def("tensor", [](const H& h) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(h.memory)); })
      .def_property_readonly("num_residuals", [](const H& h) { return h.packed->count; });
  m.def(("packed" + name).c_str(), &packed_of<T>);
  m.def(("gram_rows" + name).c_str(), &rows_of_gram<T>);
  m.def(("factor" + name).c_str(), &factored<T>);
  m.def(("gram_stride" + name).c_str(), &gram_stride<T>);
}

}  // namespace

void bind_parts(py::module_& m) {
  bind_parts_of<float>(m, "Float", "_float");
  bind_parts_of<double>(m, "Double", "_double");
}

}  // namespace pgdfast
