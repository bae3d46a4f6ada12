// Taylor mode: value, first and second derivatives of a network's layer with respect to the network's inputs, together.
//
// N points; C = 1 + K + S channels of a point: its value, K first derivatives along given directions, and S second ones, each
// a weighted sum of the second derivatives along the directions. A stack holds (N, C, width), so that the channels of a few
// points are one matrix. Through y = g(z), elementwise:
//
//   y = g(z)    y_k = g' z_k    y_s = g' z_s + g'' q_s    q_s = sum_k weights[s, k] z_k^2
//
// Tangents and cotangents of that need C coefficients of a point, in this order: the slope g', mix_k = g'' z_k and
// bend_s = g'' z_s + g''' q_s (see jet_adjoint). They are kept as (N, C, width), like a stack.
#pragma once

#include <vector>

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

// One layer, y = g(x W^T + bias) with g(z) = activation(scale z), or z. weight: (out, in). bias: (out) or null. y: (N, C, out),
// null where nobody reads it but the next layer. kept: (N, C, out), or null where no tape is wanted or the activation is the
// identity.
template <class T>
struct JetLayer {
  index in, out;
  Activation activation;
  double scale;
  const T *weight, *bias;
  T *y, *kept;
};

// A chain of layers, a few points at a time through all of them, so that what is not asked for never leaves a core's cache.
// x: (N, given, in). Its second channels may be missing (given = 1 + K): zero. Its first ones may be missing, too (given = 1):
// then `along` holds those that all points share, (K, in); else it is null. The last layer has a y.
template <class T>
void jet_chain(index points, index given, const Channels& channels, const T* x, const T* along,
               const std::vector<JetLayer<T>>& layers);

// The cotangent of x W^T + bias from that of y, both (N, C, width).
template <class T>
void jet_adjoint(index points, index width, const Channels& channels, const T* kept, const T* y_bar, T* z_bar);

}  // namespace pgdfast
