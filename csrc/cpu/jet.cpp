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

constexpr index kBlock = 1 << 15;   // elements of z that a thread has under way: they stay in its cache

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

namespace {

// Some points of one layer. x: (count, given, in); shared: the first derivatives of z that all points share, or null.
template <class T>
void points_of(const JetLayer<T>& layer, index count, index given, const Channels& channels, const T* x, const T* shared, T* y,
               T* kept, T* scratch) {
  const index K = channels.first, C = channels.count(), in = layer.in, width = layer.out;
  const bool plain = layer.activation == Activation::identity;
  T* z = plain ? y : scratch;   // a plain layer writes its products in place
  const index step = (plain ? C : given) * width;
  if (!plain || given == C) {
    gemm<T>(count * given, width, in, T(1), x, in, 1, layer.weight, 1, in, T(0), z, width, 1);
  } else {
    std::memset(y, 0, sizeof(T) * std::size_t(count * C * width));
    for (index c = 0; c < given; ++c)
      gemm<T>(count, width, in, T(1), x + c * in, given * in, 1, layer.weight, 1, in, T(0), y + c * width, step, 1);
    for (index i = 0; i < count && shared; ++i) std::copy(shared, shared + K * width, y + i * step + width);
  }
  if (layer.bias != nullptr)
    for (index i = 0; i < count; ++i) simd<T>().muladd(width, T(1), nullptr, 0, layer.bias, 1, z + i * step, 1, false);
  if (plain) return;
  T *argument = z + count * given * width, *a = argument + count * width, *b = a + count * width;
  for (index i = 0; i < count; ++i)
    simd<T>().muladd(width, T(layer.scale), nullptr, 0, z + i * step, 1, argument + i * width, 1, true);
  functions_of(layer.activation, count * width, argument, a, b);
  simd<T>().jet_activation(layer.activation, count, width, given, channels, T(layer.scale), z, shared, a, b, y, kept,
                           b + count * width);
}

}  // namespace

template <class T>
void jet_chain(index points, index given, const Channels& channels, const T* x, const T* along,
               const std::vector<JetLayer<T>>& layers) {
  const index K = channels.first, C = channels.count();
  index width = 0;
  double flops = 0;
  for (const JetLayer<T>& layer : layers) {
    width = std::max(width, layer.out);
    flops += double(points * layer.out * C) * (2.0 * double(layer.in) + 20.0);
  }
  const index rows = std::max<index>(kBlock / (C * width), 4), stack = rows * C * width;
  std::vector<T> shared(std::size_t(along ? K * layers[0].out : 0));
  if (along)
    gemm<T>(K, layers[0].out, layers[0].in, T(1), along, layers[0].in, 1, layers[0].weight, 1, layers[0].in, T(0), shared.data(),
            layers[0].out, 1);
  const int threads = threads_for(flops);
  std::vector<std::vector<T>> scratch(static_cast<std::size_t>(threads));
  each_item(threads, (points + rows - 1) / rows, [&](index block, int thread) {
    const BlasThreads inside(1);
    std::vector<T>& own = scratch[std::size_t(thread)];
    if (own.empty()) own.resize(std::size_t(3 * stack + 3 * (rows * width + width + 16)));
    const index begin = block * rows, count = std::min(rows, points - begin);
    const T* input = x + begin * given * layers[0].in;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const JetLayer<T>& layer = layers[l];
      const index at = begin * C * layer.out;
      T* y = layer.y ? layer.y + at : own.data() + index(l % 2) * stack;
      points_of(layer, count, l == 0 ? given : C, channels, input, l == 0 && along ? shared.data() : nullptr, y,
                layer.kept ? layer.kept + at : nullptr, own.data() + 2 * stack);
      input = y;
    }
  });
}

template <class T>
void jet_adjoint(index points, index width, const Channels& channels, const T* kept, const T* y_bar, T* z_bar) {
  const index C = channels.count(), rows = std::max<index>(kBlock / (C * width), 4);
  each_item(threads_for(double(points * width * C) * 4.0), (points + rows - 1) / rows, [&](index block, int) {
    const index begin = block * rows * C * width;
    simd<T>().jet_adjoint(std::min(rows, points - block * rows), width, channels, kept + begin, y_bar + begin, z_bar + begin);
  });
}

#define PGDFAST_INSTANTIATE(T)                                                                                    \
  template Maths<T>& maths<T>();                                                                                  \
  template void jet_chain<T>(index, index, const Channels&, const T*, const T*, const std::vector<JetLayer<T>>&); \
  template void jet_adjoint<T>(index, index, const Channels&, const T*, const T*, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
