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

// z: (points, given, width). a, b: (points, width). scratch: 3 * width.
template <class T, class Kind>
void jet_activation_of(index points, index width, index given, const Channels& channels, T scale, const T* z, const T* a,
                       const T* b, T* y, T* slope, T* mix, T* bend, T* scratch) {
  const index K = channels.first, S = channels.second, C = channels.count();
  T *second = scratch, *third = scratch + width;
  for (index i = 0; i < points; ++i, z += given * width, y += C * width, a += width, b += width) {
    T* first = slope ? slope + i * width : scratch + 2 * width;
#pragma omp simd
    for (index j = 0; j < width; ++j) {
      const Derivatives<T> d = Kind::at(scale * z[j], a[j], b[j]);
      y[j] = d.g;
      first[j] = scale * d.d1;
      second[j] = scale * scale * d.d2;
      third[j] = scale * scale * scale * d.d3;
    }
    for (index k = 0; k < K; ++k) {
      const T* zk = z + (1 + k) * width;
      T* yk = y + (1 + k) * width;
#pragma omp simd
      for (index j = 0; j < width; ++j) yk[j] = first[j] * zk[j];
      if (slope == nullptr) continue;
      T* to = mix + (i * K + k) * width;
#pragma omp simd
      for (index j = 0; j < width; ++j) to[j] = second[j] * zk[j];
    }
    for (index s = 0; s < S; ++s) {
      T* ys = y + (1 + K + s) * width;   // holds q_s first
      bool started = false;
      for (index k = 0; k < K; ++k) {
        const T w = T(channels.weights[s * K + k]);
        if (w == T(0)) continue;
        const T* zk = z + (1 + k) * width;
        if (started) {
#pragma omp simd
          for (index j = 0; j < width; ++j) ys[j] += w * zk[j] * zk[j];
        } else {
#pragma omp simd
          for (index j = 0; j < width; ++j) ys[j] = w * zk[j] * zk[j];
        }
        started = true;
      }
      if (!started)
        for (index j = 0; j < width; ++j) ys[j] = T(0);
      const T* zs = given == C ? z + (1 + K + s) * width : nullptr;
      if (slope != nullptr) {
        T* to = bend + (i * S + s) * width;
#pragma omp simd
        for (index j = 0; j < width; ++j) to[j] = third[j] * ys[j];
        if (zs != nullptr) {
#pragma omp simd
          for (index j = 0; j < width; ++j) to[j] += second[j] * zs[j];
        }
      }
#pragma omp simd
      for (index j = 0; j < width; ++j) ys[j] *= second[j];
      if (zs != nullptr) {
#pragma omp simd
        for (index j = 0; j < width; ++j) ys[j] += first[j] * zs[j];
      }
    }
  }
}

template <class T>
void jet_activation(Activation kind, index points, index width, index given, const Channels& channels, T scale, const T* z,
                    const T* a, const T* b, T* y, T* slope, T* mix, T* bend, T* scratch) {
  const auto run = [&](auto of) {
    jet_activation_of<T, decltype(of)>(points, width, given, channels, scale, z, a, b, y, slope, mix, bend, scratch);
  };
  switch (kind) {
    case Activation::identity: break;
    case Activation::tanh: return run(Tanh{});
    case Activation::sigmoid: return run(Sigmoid{});
    case Activation::sin: return run(Sin{});
    case Activation::cos: return run(Cos{});
    case Activation::exp: return run(Exp{});
    case Activation::square: return run(Square{});
    case Activation::relu: return run(Relu{});
    case Activation::softplus: return run(Softplus{});
    case Activation::silu: return run(Silu{});
    case Activation::gelu: return run(Gelu{});
  }
}

// z_bar from y_bar, both (points, C, width).
template <class T>
void jet_adjoint_rows(index points, index width, const Channels& channels, const T* slope, const T* mix, const T* bend,
                      const T* y_bar, T* z_bar) {
  const index K = channels.first, S = channels.second, C = channels.count();
  for (index i = 0; i < points; ++i, slope += width, mix += K * width, bend += S * width, y_bar += C * width, z_bar += C * width) {
    for (index c = 0; c < C; ++c) {
#pragma omp simd
      for (index j = 0; j < width; ++j) z_bar[c * width + j] = slope[j] * y_bar[c * width + j];
    }
    for (index k = 0; k < K; ++k) {
      const T *m = mix + k * width, *yk = y_bar + (1 + k) * width;
      T* zk = z_bar + (1 + k) * width;
#pragma omp simd
      for (index j = 0; j < width; ++j) z_bar[j] += m[j] * yk[j];
      for (index s = 0; s < S; ++s) {
        const T w = T(2 * channels.weights[s * K + k]);
        if (w == T(0)) continue;
        const T* ys = y_bar + (1 + K + s) * width;
#pragma omp simd
        for (index j = 0; j < width; ++j) zk[j] += w * m[j] * ys[j];
      }
    }
    for (index s = 0; s < S; ++s) {
      const T *from = bend + s * width, *ys = y_bar + (1 + K + s) * width;
#pragma omp simd
      for (index j = 0; j < width; ++j) z_bar[j] += from[j] * ys[j];
    }
  }
}
