// One activation over a few points, and its adjoint; included by simd_body.inl. See jet.h.

// g and three derivatives at z, from up to two functions of scale * z that were computed before.
template <class T>
struct Derivatives {
  T g, d1, d2, d3;
};

#define PGDFAST_ACTIVATION(name)                                      \
  struct name {                                                       \
    template <class T>                                                \
    static inline Derivatives<T> at(T z, T a, T b);                   \
  };                                                                  \
  template <class T>                                                  \
  inline Derivatives<T> name::at([[maybe_unused]] T z, [[maybe_unused]] T a, [[maybe_unused]] T b)

PGDFAST_ACTIVATION(Tanh) {   // a = tanh z
  const T d = T(1) - a * a;
  return {a, d, T(-2) * a * d, d * (T(6) * a * a - T(2))};
}
PGDFAST_ACTIVATION(Sigmoid) {   // a = sigmoid z
  const T d = a * (T(1) - a);
  return {a, d, d * (T(1) - T(2) * a), d * (T(1) - T(6) * d)};
}
PGDFAST_ACTIVATION(Sin) { return {a, b, -a, -b}; }   // a = sin z, b = cos z
PGDFAST_ACTIVATION(Cos) { return {b, -a, -b, a}; }
PGDFAST_ACTIVATION(Exp) { return {a, a, a, a}; }
PGDFAST_ACTIVATION(Square) { return {z * z, T(2) * z, T(2), T(0)}; }
PGDFAST_ACTIVATION(Relu) { return {z > T(0) ? z : T(0), z > T(0) ? T(1) : T(0), T(0), T(0)}; }
PGDFAST_ACTIVATION(Softplus) {   // a = softplus z, linear beyond 20 as PyTorch's; b = sigmoid z
  const bool linear = z > T(20);
  const T d = b * (T(1) - b);
  return {a, linear ? T(1) : b, linear ? T(0) : d, linear ? T(0) : d * (T(1) - T(2) * b)};
}
PGDFAST_ACTIVATION(Silu) {   // a = sigmoid z
  const T d = a * (T(1) - a), e = d * (T(1) - T(2) * a), f = d * (T(1) - T(6) * d);
  return {z * a, a + z * d, T(2) * d + z * e, T(3) * e + z * f};
}
PGDFAST_ACTIVATION(Gelu) {   // a = erf(z / sqrt 2), b = exp(-z^2 / 2)
  const T cumulative = T(0.5) * (T(1) + a), density = T(0.398942280401432677939946) * b;
  return {z * cumulative, cumulative + z * density, density * (T(2) - z * z), density * z * (z * z - T(4))};
}
#undef PGDFAST_ACTIVATION

// g to y, and its three derivatives by z, with the powers of scale in them, to d1, d2 and d3: one point's values.
template <class Kind, class T>
void activation_row(index width, T scale, const T* z, const T* a, const T* b, T* y, T* d1, T* d2, T* d3) {
#pragma omp simd
  for (index j = 0; j < width; ++j) {
    const Derivatives<T> d = Kind::at(scale * z[j], a[j], b[j]);
    y[j] = d.g;
    d1[j] = scale * d.d1;
    d2[j] = scale * scale * d.d2;
    d3[j] = scale * scale * scale * d.d3;
  }
}

template <class T>
using ActivationRow = void (*)(index, T, const T*, const T*, const T*, T*, T*, T*, T*);

template <class T>
ActivationRow<T> activation_row_of(Activation kind) {
  switch (kind) {
    case Activation::tanh: return activation_row<Tanh, T>;
    case Activation::sigmoid: return activation_row<Sigmoid, T>;
    case Activation::sin: return activation_row<Sin, T>;
    case Activation::cos: return activation_row<Cos, T>;
    case Activation::exp: return activation_row<Exp, T>;
    case Activation::square: return activation_row<Square, T>;
    case Activation::relu: return activation_row<Relu, T>;
    case Activation::softplus: return activation_row<Softplus, T>;
    case Activation::silu: return activation_row<Silu, T>;
    case Activation::gelu: return activation_row<Gelu, T>;
    case Activation::identity: break;
  }
  return nullptr;
}

// The derivatives of one point, from d1, d2, d3 and z's channels.
template <class T>
struct ChannelRow {
  index width, first, second;
  const double* weights;            // (second, first)
  const T *d1, *d2, *d3, *zk, *zs;  // zs is not read unless curved
  T *yk, *ys, *mix, *bend;          // mix and bend are not written unless kept
};

// Numbers of channels known at compile time: all of them pass at once, element by element.
template <class T, int K, int S, bool keep, bool curved>
void channel_row(const ChannelRow<T>& r) {
  constexpr int kSums = S > 0 ? S : 1;
  const index n = r.width;
  T w[kSums * K];
  for (int i = 0; i < S * K; ++i) w[i] = T(r.weights[i]);
  const T *d1 = r.d1, *d2 = r.d2, *d3 = r.d3, *zk = r.zk, *zs = r.zs;
  T *yk = r.yk, *ys = r.ys, *mix = r.mix, *bend = r.bend;
#pragma omp simd
  for (index j = 0; j < n; ++j) {
    T q[kSums] = {};
    for (int k = 0; k < K; ++k) {
      const T z = zk[k * n + j];
      yk[k * n + j] = d1[j] * z;
      if (keep) mix[k * n + j] = d2[j] * z;
      for (int s = 0; s < S; ++s) q[s] += w[s * K + k] * (z * z);
    }
    for (int s = 0; s < S; ++s) {
      const T z = curved ? zs[s * n + j] : T(0);
      ys[s * n + j] = curved ? d1[j] * z + d2[j] * q[s] : d2[j] * q[s];
      if (keep) bend[s * n + j] = curved ? d2[j] * z + d3[j] * q[s] : d3[j] * q[s];
    }
  }
}

template <class T, bool keep, bool curved>
void channel_row_any(const ChannelRow<T>& r) {
  const index n = r.width;
  for (index k = 0; k < r.first; ++k) {
    const T* zk = r.zk + k * n;
#pragma omp simd
    for (index j = 0; j < n; ++j) {
      r.yk[k * n + j] = r.d1[j] * zk[j];
      if (keep) r.mix[k * n + j] = r.d2[j] * zk[j];
    }
  }
  for (index s = 0; s < r.second; ++s) {
    const double* w = r.weights + s * r.first;
    for (index j = 0; j < n; ++j) {
      T q = 0;
      for (index k = 0; k < r.first; ++k) q += T(w[k]) * (r.zk[k * n + j] * r.zk[k * n + j]);
      const T z = curved ? r.zs[s * n + j] : T(0);
      r.ys[s * n + j] = curved ? r.d1[j] * z + r.d2[j] * q : r.d2[j] * q;
      if (keep) r.bend[s * n + j] = curved ? r.d2[j] * z + r.d3[j] * q : r.d3[j] * q;
    }
  }
}

template <class T>
using ChannelRowOf = void (*)(const ChannelRow<T>&);

template <class T, bool keep, bool curved>
ChannelRowOf<T> channel_row_of(index K, index S) {
  if (K == 1 && S == 1) return channel_row<T, 1, 1, keep, curved>;
  if (K == 2 && S == 0) return channel_row<T, 2, 0, keep, curved>;
  if (K == 2 && S == 1) return channel_row<T, 2, 1, keep, curved>;
  if (K == 2 && S == 2) return channel_row<T, 2, 2, keep, curved>;
  if (K == 3 && S == 1) return channel_row<T, 3, 1, keep, curved>;
  if (K == 3 && S == 2) return channel_row<T, 3, 2, keep, curved>;
  return channel_row_any<T, keep, curved>;
}

template <class T>
void jet_activation(Activation kind, index points, index width, index given, const Channels& channels, T scale, const T* z,
                    const T* along, const T* a, const T* b, T* y, T* kept, T* scratch) {
  const index K = channels.first, S = channels.second, C = channels.count(), padded = width + 16;
  const bool keep = kept != nullptr, curved = given == C && S > 0;
  const auto value = activation_row_of<T>(kind);
  const auto rest = keep ? (curved ? channel_row_of<T, true, true>(K, S) : channel_row_of<T, true, false>(K, S))
                         : (curved ? channel_row_of<T, false, true>(K, S) : channel_row_of<T, false, false>(K, S));
  for (index i = 0; i < points; ++i) {
    const T* zi = z + i * given * width;
    T *yi = y + i * C * width, *to = keep ? kept + i * C * width : scratch, *d2 = scratch + padded, *d3 = d2 + padded;
    value(width, scale, zi, a + i * width, b + i * width, yi, to, d2, d3);
    rest({width, K, S, channels.weights, to, d2, d3, along ? along : zi + width, zi + (curved ? 1 + K : 0) * width, yi + width,
          yi + (1 + K) * width, to + width, to + (1 + K) * width});
  }
}

// z_bar from y_bar, both (points, C, width).
template <class T>
void jet_adjoint_rows(index points, index width, const Channels& channels, const T* kept, const T* y_bar, T* z_bar) {
  const index K = channels.first, S = channels.second, C = channels.count();
  for (index i = 0; i < points; ++i, kept += C * width, y_bar += C * width, z_bar += C * width) {
    for (index c = 0; c < C; ++c) {
#pragma omp simd
      for (index j = 0; j < width; ++j) z_bar[c * width + j] = kept[j] * y_bar[c * width + j];
    }
    for (index c = 1; c < C; ++c) {   // mix_k y_bar_k and bend_s y_bar_s
#pragma omp simd
      for (index j = 0; j < width; ++j) z_bar[j] += kept[c * width + j] * y_bar[c * width + j];
    }
    for (index k = 0; k < K; ++k)
      for (index s = 0; s < S; ++s) {
        const T w = T(2 * channels.weights[s * K + k]), *mix = kept + (1 + k) * width, *ys = y_bar + (1 + K + s) * width;
        if (w == T(0)) continue;
        T* zk = z_bar + (1 + k) * width;
#pragma omp simd
        for (index j = 0; j < width; ++j) zk[j] += w * mix[j] * ys[j];
      }
  }
}
