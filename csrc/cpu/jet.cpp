#include "jet.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../plan/blas.h"
#include "parallel.h"
#include "simd.h"

namespace pgdfast {
namespace {

constexpr index kBlock = 1 << 13;   // elements of z that a thread has under way: they stay in its cache

// What the activation's derivatives are computed from, at n scaled arguments x (see jet_body.inl).
template <class T>
void functions_of(Activation kind, index n, T* x, T* a, T* b) {
  const Maths<T>& f = maths<T>();
  switch (kind) {
    case Activation::tanh: f.tanh(n, x, a); break;
    case Activation::sigmoid:
    case Activation::silu: f.sigmoid(n, x, a); break;
    case Activation::sin:
    case Activation::cos:
      f.sin(n, x, a);
      f.cos(n, x, b);
      break;
    case Activation::exp: f.exp(n, x, a); break;
    case Activation::softplus:
      f.softplus(n, x, a);
      f.sigmoid(n, x, b);
      break;
    case Activation::gelu:
      for (index i = 0; i < n; ++i) b[i] = T(-0.5) * x[i] * x[i];
      f.exp(n, b, b);
      for (index i = 0; i < n; ++i) x[i] *= T(0.70710678118654752440);
      f.erf(n, x, a);
      break;
    case Activation::identity:
    case Activation::square:
    case Activation::relu: break;
  }
}

}  // namespace

template <class T>
Maths<T>& maths() {
  static Maths<T> table;
  return table;
}

template <class T>
void jet_layer(const JetLayer<T>& layer) {
  const index C = layer.channels.count(), width = layer.out, given = layer.given, rows = std::max<index>(kBlock / (C * width), 4);
  const index blocks = (layer.points + rows - 1) / rows;
  const bool plain = layer.activation == Activation::identity;
  const int threads = threads_for(double(layer.points) * double(width) * (2.0 * double(given * layer.in) + 20.0 * double(C)));
  std::vector<std::vector<T>> scratch(static_cast<std::size_t>(threads));
  const BlasThreads inside(1);
  each_item(threads, blocks, [&](index block, int thread) {
    const BlasThreads own(1);
    const index begin = block * rows, count = std::min(rows, layer.points - begin);
    std::vector<T>& own_scratch = scratch[std::size_t(thread)];
    if (own_scratch.empty()) own_scratch.resize(std::size_t((plain ? 0 : rows * (given + 3) + 3) * width));
    T* y = layer.y + begin * C * width;
    // A plain layer writes its products in place, unless channels are missing between the points.
    const bool direct = plain && given == C;
    if (plain && !direct) std::memset(y, 0, sizeof(T) * std::size_t(count * C * width));
    T* z = plain ? y : own_scratch.data();
    const T* x = layer.x + begin * given * layer.in;
    if (plain && !direct) {
      for (index c = 0; c < given; ++c)
        gemm<T>(count, width, layer.in, T(1), x + c * layer.in, given * layer.in, 1, layer.weight, 1, layer.in, T(0),
                y + c * width, C * width, 1);
    } else {
      gemm<T>(count * given, width, layer.in, T(1), x, layer.in, 1, layer.weight, 1, layer.in, T(0), z,
              width, 1);
    }
    const index step = (plain ? C : given) * width;
    if (layer.bias != nullptr)
      for (index i = 0; i < count; ++i) simd<T>().muladd(width, T(1), nullptr, 0, layer.bias, 1, z + i * step, 1, false);
    if (plain) return;
    T *argument = z + rows * given * width, *a = argument + rows * width, *b = a + rows * width;
    for (index i = 0; i < count; ++i)
      simd<T>().muladd(width, T(layer.scale), nullptr, 0, z + i * step, 1, argument + i * width, 1, true);
    functions_of(layer.activation, count * width, argument, a, b);
    const auto at = [&](T* all, index channels) { return all == nullptr ? nullptr : all + begin * channels * width; };
    simd<T>().jet_activation(layer.activation, count, width, given, layer.channels, T(layer.scale), z, a, b, y,
                             at(layer.slope, 1), at(layer.mix, layer.channels.first), at(layer.bend, layer.channels.second),
                             b + rows * width);
  });
}

template <class T>
void jet_adjoint(index points, index width, const Channels& channels, const T* slope, const T* mix, const T* bend,
                 const T* y_bar, T* z_bar) {
  const index C = channels.count(), rows = std::max<index>(kBlock / (C * width), 4);
  each_item(threads_for(double(points * width * C) * 4.0), (points + rows - 1) / rows, [&](index block, int) {
    const index begin = block * rows, count = std::min(rows, points - begin);
    simd<T>().jet_adjoint(count, width, channels, slope + begin * width, mix + begin * channels.first * width,
                          bend + begin * channels.second * width, y_bar + begin * C * width, z_bar + begin * C * width);
  });
}

#define PGDFAST_INSTANTIATE(T)                  \
  template Maths<T>& maths<T>();                \
  template void jet_layer<T>(const JetLayer<T>&); \
  template void jet_adjoint<T>(index, index, const Channels&, const T*, const T*, const T*, const T*, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
