// Layers in Taylor mode, for Python.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/jet.h"

namespace pgdfast {
namespace {

Channels channels_of(index first, const std::vector<double>& weights) {
  Channels channels;
  channels.first = first;
  channels.second = first > 0 ? index(weights.size()) / first : 0;
  channels.weights = weights.data();
  return channels;
}

// layers: (weight, bias or None, activation, scale, y or None, kept or None) each.
template <class T>
void chain(py::handle x, py::handle along, index points, index given, index in, index first, const std::vector<double>& weights,
           const std::vector<std::tuple<py::handle, py::handle, int, double, py::handle, py::handle>>& layers) {
  const Channels channels = channels_of(first, weights);
  const index C = channels.count();
  const T* from = pointer<T>(x, points * given * in, "x");
  const T* shared = optional_pointer<T>(along, first * in, "along");
  if (shared ? given != 1 : given != C && given != 1 + first)
    throw py::value_error("x must have all channels, no second ones, or with `along` the value alone");
  std::vector<JetLayer<T>> list;
  index width = in;
  for (const auto& [weight, bias, activation, scale, y, kept] : layers) {
    if (!THPVariable_Check(weight.ptr())) throw py::type_error("weight must be a tensor");
    const index out = THPVariable_Unpack(weight.ptr()).size(0), size = points * C * out;
    list.push_back({width, out, static_cast<Activation>(activation), scale, pointer<T>(weight, out * width, "weight"),
                    optional_pointer<T>(bias, out, "bias"), optional_pointer<T>(y, size, "y"),
                    optional_pointer<T>(kept, size, "kept")});
    width = out;
  }
  if (list.empty()) throw py::value_error("there must be a layer");
  if (points == 0) return;
  if (list.back().y == nullptr) throw py::value_error("the last layer must have a y");
  const Running running;
  jet_chain(points, given, channels, from, shared, list);
}

template <class T>
void adjoint(index points, index width, index first, const std::vector<double>& weights, py::handle kept, py::handle y_bar,
             py::handle z_bar) {
  const Channels channels = channels_of(first, weights);
  const index size = points * channels.count() * width;
  const T *coefficients = pointer<T>(kept, size, "kept"), *from = pointer<T>(y_bar, size, "y_bar");
  T* to = pointer<T>(z_bar, size, "z_bar");
  const Running running;
  jet_adjoint(points, width, channels, coefficients, from, to);
}

}  // namespace

void bind_jets(py::module_& m) {
  m.def("jet_chain_float", &chain<float>);
  m.def("jet_chain_double", &chain<double>);
  m.def("jet_adjoint_float", &adjoint<float>);
  m.def("jet_adjoint_double", &adjoint<double>);
}

}  // namespace pgdfast
