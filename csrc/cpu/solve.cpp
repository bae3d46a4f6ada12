#include "solve.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../plan/blas.h"
#include "simd.h"

namespace pgdfast {
namespace {

template <class T>
void ensure(std::vector<T>& buffer, index size) {
  if (index(buffer.size()) < size) buffer.resize(std::size_t(size));
}

double cholesky_flops(index n) { return double(n) * double(n) * double(n) / 3.0; }

// Copies the upper triangle (row-major) plus a diagonal, widening where F is wider, and factors it. LAPACK reads it as a
// lower triangle.
template <class F, class S, class D>
int factor(const S* matrix, index n, D diagonal, std::vector<F>& out) {
  ensure(out, n * n);
  for (index i = 0; i < n; ++i) {
    std::copy(matrix + i * n + i, matrix + (i + 1) * n, out.data() + i * n + i);
    out[std::size_t(i * n + i)] += F(diagonal(i));
  }
  // Small factors are faster on one thread: below some 400 in double and 600 in float, measured with MKL.
  BlasThreads threads(n < (std::is_same_v<F, float> ? 600 : 400) ? 1 : threads_for(cholesky_flops(n)));
  return blas<F>().potrf('L', int(n), out.data(), int(n));
}

template <class F>
void solve_in_place(const std::vector<F>& factored, index n, F* x) {
  blas<F>().potrs('L', int(n), 1, factored.data(), int(n), x, int(n));
}

// (matrix + diag) x = b with the factor in F; x may be b. LAPACK's info.
template <class F, class S, class D, class T>
int factor_and_solve(const S* matrix, index n, D diagonal, std::vector<F>& factored, const T* b, T* x) {
  const int info = factor(matrix, n, diagonal, factored);
  if (info != 0) return info;
  if constexpr (std::is_same_v<F, T>) {
    std::copy(b, b + n, x);
    solve_in_place(factored, n, x);
  } else {
    std::vector<F> y(b, b + n);
    solve_in_place(factored, n, y.data());
    std::copy(y.begin(), y.end(), x);
  }
  return 0;
}

}  // namespace

template <class T>
T* Solver<T>::arena_data() {
  ensure(arena, std::max<index>(structure.arena_size, 1));
  return arena.data();
}

template <class T>
Outcome Solver<T>::dual(const T* r, const T* weights, double shift, const T* q, T* delta) {
  const index M = structure.num_residuals, P = structure.num_parameters;
  const int buffers = structure.num_parameter_buffers;
  const bool fresh = held != Held::gram || !std::equal(weights, weights + buffers, weights_used.begin());
  if (fresh) {
    held = Held::nothing;
    ensure(matrix, M * M);
    gram(program, layout, weights, work, matrix.data());
    weights_used.assign(weights, weights + buffers);
    held = Held::gram;
  }
  Outcome outcome;
  for (index e = 0; e < M; ++e) outcome.trace += double(matrix[std::size_t(e * M + e)]) / shift;
  ensure(rhs, M);
  ensure(scratch_u, M);
  T* arena_ = arena_data();
  const auto each_parameter = [&](auto&& body) {
    for (int l = 0; l < buffers; ++l) {
      const Buffer& buffer = structure.buffers[std::size_t(l)];
      for (index i = 0; i < buffer.size; ++i) body(weights[l], buffer.offset + i);
    }
  };
  // Right-hand side in residual order, then in K order.
  if (q) {
    each_parameter([&](T w, index i) { delta[i] = w * q[i] / T(shift); });
    jvp(program, delta, scratch_u.data(), arena_);
    for (index e = 0; e < M; ++e) scratch_u[std::size_t(e)] = r[e] - scratch_u[std::size_t(e)];
  } else {
    std::copy(r, r + M, scratch_u.begin());
  }
  for (index e = 0; e < M; ++e) rhs[std::size_t(layout.k_of[std::size_t(e)])] = scratch_u[std::size_t(e)];
  const auto diagonal = [&](index) { return shift; };
  int info;
  if (std::is_same_v<T, double> || M <= kDoubleFactor)
    info = factor_and_solve(matrix.data(), M, diagonal, wide_factor, rhs.data(), rhs.data());
  else
    info = factor_and_solve(matrix.data(), M, diagonal, narrow_factor, rhs.data(), rhs.data());
  if (info != 0) {
    std::fill(delta, delta + P, T(0));
    outcome.status = Status::not_positive_definite;
    return outcome;
  }
  // J delta = r - s y: the predicted reduction needs no further product.
  for (index e = 0; e < M; ++e) {
    const T y = rhs[std::size_t(layout.k_of[std::size_t(e)])];
    scratch_u[std::size_t(e)] = y;
    outcome.gain += double(r[e]) * (double(r[e]) - shift * double(y));
  }
  if (!vjp_from_units(program, layout, work, rhs.data(), delta, arena_)) vjp(program, scratch_u.data(), delta, arena_);
  if (q) {
    each_parameter([&](T w, index i) {
      delta[i] = w * (delta[i] + q[i] / T(shift));
      outcome.gain += double(q[i]) * double(delta[i]);
    });
  } else if (!std::all_of(weights, weights + buffers, [](T w) { return w == T(1); })) {
    each_parameter([&](T w, index i) { delta[i] *= w; });
  }
  outcome.square = simd<T>().dot(P, delta, delta);
  return outcome;
}

template <class T>
Outcome Solver<T>::primal(const T* r, const T* d, const T* q, T* delta) {
  const index M = structure.num_residuals, P = structure.num_parameters;
  const bool use_wide = std::is_same_v<T, double> || P <= kWideFactor;
  if (held != Held::normal) {
    held = Held::nothing;
    ensure(J, M * P);
    dense(program, layout, work, J.data());
    BlasThreads threads(threads_for(double(M) * double(P) * double(P)));
    // Upper triangle of J^T J by row panels; float rows are widened a chunk at a time where the factor is wide.
    const auto panels = [&](auto* H, const auto* rows, index count, bool first) {
      using F = std::remove_const_t<std::remove_reference_t<decltype(*H)>>;
      constexpr index width = 256;
      for (index j = 0; j < P; j += width) {
        const index w = std::min(width, P - j);
        gemm<F>(w, P - j, count, F(1), rows + j, 1, P, rows + j, P, 1, F(first ? 0 : 1), H + j * P + j, P, 1);
      }
    };
    if constexpr (std::is_same_v<T, double>) {
      ensure(wide_matrix, P * P);
      panels(wide_matrix.data(), J.data(), M, true);
    } else if (use_wide) {
      ensure(wide_matrix, P * P);
      constexpr index chunk = 512;
      std::vector<double> rows(std::size_t(std::min(chunk, M) * P));
      for (index i = 0; i < M; i += chunk) {
        const index count = std::min(chunk, M - i);
        std::copy(J.begin() + i * P, J.begin() + (i + count) * P, rows.begin());
        panels(wide_matrix.data(), rows.data(), count, i == 0);
      }
    } else {
      ensure(matrix, P * P);
      panels(matrix.data(), J.data(), M, true);
    }
    held = Held::normal;
  }
  Outcome outcome;
  for (index i = 0; i < P; ++i)
    outcome.trace += (use_wide ? wide_matrix[std::size_t(i * P + i)] : double(matrix[std::size_t(i * P + i)])) / double(d[i]);
  ensure(rhs, P);
  vjp(program, r, rhs.data(), arena_data());
  if (q)
    for (index i = 0; i < P; ++i) rhs[std::size_t(i)] += q[i];
  const auto diagonal = [&](index i) { return d[i]; };
  const int info = use_wide ? factor_and_solve(wide_matrix.data(), P, diagonal, wide_factor, rhs.data(), delta)
                            : factor_and_solve(matrix.data(), P, diagonal, narrow_factor, rhs.data(), delta);
  if (info != 0) {
    std::fill(delta, delta + P, T(0));
    outcome.status = Status::not_positive_definite;
    return outcome;
  }
  outcome.gain = simd<T>().dot(P, rhs.data(), delta);
  outcome.square = simd<T>().dot(P, delta, delta);
  return outcome;
}

template <class T>
void Solver<T>::gram_matrix(T* K) {
  const index M = structure.num_residuals;
  std::vector<T> ones(std::size_t(structure.num_parameter_buffers), T(1));
  std::vector<T> ordered(std::size_t(M * M));
  gram(program, layout, ones.data(), work, ordered.data());
  for (index i = 0; i < M; ++i)
    for (index j = 0; j < M; ++j) {
      const index a = layout.k_of[std::size_t(i)], b = layout.k_of[std::size_t(j)];
      K[i * M + j] = ordered[std::size_t(std::min(a, b) * M + std::max(a, b))];
    }
}

template struct Solver<float>;
template struct Solver<double>;

}  // namespace pgdfast
