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

template <class T>
void layer(py::handle x, py::handle weight, py::handle bias, const std::array<index, 4>& sizes, index first,
           const std::vector<double>& weights, int activation, double scale, py::handle y, py::handle slope, py::handle mix,
           py::handle bend) {
  const auto [points, given, in, out] = sizes;
  JetLayer<T> l{points, in, out, given, channels_of(first, weights), static_cast<Activation>(activation), scale,
                pointer<T>(x, points * given * in, "x"), pointer<T>(weight, out * in, "weight"),
                optional_pointer<T>(bias, out, "bias"), nullptr, nullptr, nullptr, nullptr};
  if (given != l.channels.count() && given != 1 + first) throw py::value_error("x must have all channels, or no second ones");
  l.y = pointer<T>(y, points * l.channels.count() * out, "y");
  l.slope = optional_pointer<T>(slope, points * out, "slope");
  l.mix = optional_pointer<T>(mix, points * first * out, "mix");
  l.bend = optional_pointer<T>(bend, points * l.channels.second * out, "bend");
  const Running running;
  jet_layer(l);
}

template <class T>
void adjoint(index points, index width, index first, const std::vector<double>& weights, py::handle slope, py::handle mix,
             py::handle bend, py::handle y_bar, py::handle z_bar) {
  const Channels channels = channels_of(first, weights);
  const index size = points * channels.count() * width;
  const T *f1 = pointer<T>(slope, points * width, "slope"), *f2 = pointer<T>(mix, points * first * width, "mix"),
          *f3 = pointer<T>(bend, points * channels.second * width, "bend"), *from = pointer<T>(y_bar, size, "y_bar");
  T* to = pointer<T>(z_bar, size, "z_bar");
  const Running running;
  jet_adjoint(points, width, channels, f1, f2, f3, from, to);
}

}  // namespace

void bind_jets(py::module_& m) {
  m.def("jet_layer_float", &layer<float>);
  m.def("jet_layer_double", &layer<double>);
  m.def("jet_adjoint_float", &adjoint<float>);
  m.def("jet_adjoint_double", &adjoint<double>);
}

}  // namespace pgdfast
