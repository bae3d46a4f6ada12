// Taylor mode: value, first and second derivatives of a network's layer with respect to the network's inputs, together.
//
// N points; C = 1 + K + S channels of a point: its value, K first derivatives along given directions, and S second ones, each
// a weighted sum of the second derivatives along the directions. A stack holds (N, C, width), so that the channels of a few
// points are one matrix. Through y = g(z), elementwise:
//
//   y = g(z)    y_k = g' z_k    y_s = g' z_s + g'' q_s    q_s = sum_k weights[s, k] z_k^2
//
// Tangents and cotangents of that need g', mix_k = g'' z_k and bend_s = g'' z_s + g''' q_s (see jet_adjoint).
#pragma once

#include "../plan/plan.h"

namespace pgdfast {

// Numbered as KINDS in pgdfast/pde/activations.py.
enum class Activation : int { identity = 0, tanh = 1, sigmoid = 2, sin = 3, cos = 4, exp = 5, square = 6, relu = 7,
                              softplus = 8, silu = 9, gelu = 10 };

struct Channels {
  index first = 0, second = 0;
  const double* weights = nullptr;   // (second, first)
  index count() const { return 1 + first + second; }
};

// The functions that activations are made of, elementwise; filled by the binding.
template <class T>
struct Maths {
  using Function = void (*)(index n, const T* x, T* y);
  Function tanh = nullptr, sigmoid = nullptr, sin = nullptr, cos = nullptr, exp = nullptr, erf = nullptr, softplus = nullptr;
};
template <class T>
Maths<T>& maths();

// y = g(x W^T + bias), g(z) = activation(scale z) or z, for a stack x whose second channels may be missing (given = 1 + K): zero.
// x: (N, given, in). weight: (out, in). bias: (out) or null. y: (N, C, out). slope (g'): (N, out), mix: (N, K, out) and
// bend: (N, S, out), all null where no tape is wanted or the activation is the identity.
template <class T>
struct JetLayer {
  index points, in, out, given;
  Channels channels;
  Activation activation;
  double scale;
  const T *x, *weight, *bias;
  T *y, *slope, *mix, *bend;
};
template <class T>
void jet_layer(const JetLayer<T>& layer);

// The cotangent of x W^T + bias from that of y: both (N, C, out).
template <class T>
void jet_adjoint(index points, index width, const Channels& channels, const T* slope, const T* mix, const T* bend,
                 const T* y_bar, T* z_bar);

}  // namespace pgdfast
