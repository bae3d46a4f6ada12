#include "solve.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "../plan/blas.h"
#include "../plan/environment.h"
#include "normal.h"
#include "parallel.h"
#include "simd.h"

namespace pgdfast {
namespace {

// So many products with J^T are worth forming J, where it is smaller than what each sweep reads and writes (PINNs).
constexpr index kManyProducts = 4;

}  // namespace

template <class T>
T* Solver<T>::arena_data() {
  // A large program has one arena, that of the unit sweeps, whose cotangents are then lost.
  if (structure.arena_size * index(sizeof(T)) > limits::kOneArenaBytes && index(work.arenas.size()) >= structure.arena_size) {
    work.unit_cotangents_valid = false;
    return work.arenas.data();
  }
  ensure(arena, std::max<index>(structure.arena_size, 1));
  return arena.data();
}

template <class T>
Outcome Solver<T>::dual(const T* r, const T* weights, double shift, const T* q, T* delta) {
  const index M = structure.num_residuals, P = structure.num_parameters;
  const int buffers = structure.num_parameter_buffers;
  const bool fresh = held != Held::gram || !std::equal(weights, weights + buffers, weights_used.begin());
  const index ld = gram_stride<T>(M);
  if (fresh) {
    held = Held::nothing;
    ensure(matrix, M * ld);
    gram(program, layout, weights, work, matrix.data());
    work.unit_cotangents_valid = true;
    weights_used.assign(weights, weights + buffers);
    held = Held::gram;
  }
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
  Outcome outcome;
  if (!solve_direct(ld, M, [&](index) { return shift; }, &layout.k_of, rhs.data(), delta, outcome)) return outcome;
  // J delta = r - s y: the predicted reduction needs no further product.
  std::vector<T>& dual_vector = factor->dual_vector;
  dual_vector.resize(std::size_t(M));
  for (index e = 0; e < M; ++e) {
    const T y = rhs[std::size_t(layout.k_of[std::size_t(e)])];
    dual_vector[std::size_t(e)] = y;
    outcome.gain += double(r[e]) * (double(r[e]) - shift * double(y));
  }
  if (!work.unit_cotangents_valid || !vjp_from_units(program, layout, work, rhs.data(), delta, arena_))
    vjp(program, dual_vector.data(), delta, arena_);
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
bool Solver<T>::normal_pays() const {
  if (!layout.local || layout.max_outputs < 2) return false;
  double factored = 0, explicit_columns = 0;   // of J, by form
  for (const Use& use : layout.uses) {
    const MatMul& g = structure.instructions[std::size_t(use.instruction)].matmul;
    if (use.form == Form::factored) factored += double(g.m) * double(g.k);
    else explicit_columns += double(structure.buffers[std::size_t(use.parameter)].size);
  }
  // Explicit columns pass through products of single elements, about eight times as slow, and sums over outputs.
  const double single = explicit_columns * (factored + explicit_columns), P = double(structure.num_parameters);
  const double own = factored * factored + (8 + 3 * double(layout.max_outputs)) * single;
  return double(layout.num_rows) * own < double(structure.num_residuals) * P * P;
}

template <class T>
void Solver<T>::normal_matrix(T* H, bool add, index most) {
  const index M = structure.num_residuals, P = structure.num_parameters, ld = gram_stride<T>(P);
  if (normal_pays()) {
    if (!add) std::memset(H, 0, sizeof(T) * std::size_t(P * ld));
    return normal(program, layout, work, H, ld);
  }
  if (explicit_J || most >= M) {
    if (!explicit_J) {   // not set until it is there: memory may run out on the way
      ensure(J, M * P);
      dense(program, layout, work, J.data());
      explicit_J = M * P <= structure.arena_size;
    }
    return symmetric_product(J.data(), P, M, index(1), P, work, H, ld, add);
  }
  if (!layout.local && P < M) {
    if (!add) std::memset(H, 0, sizeof(T) * std::size_t(P * ld));
    return normal_by_products(program, work, H, ld);
  }
  ensure(J, most * P);
  each_rows<T>(program, layout, work, most, J.data(), [&](index rows) {
    symmetric_product(J.data(), P, rows, index(1), P, work, H, ld, add);
    add = true;
  });
}

template <class T>
void Solver<T>::add_normal(T* H) {
  // PGDFAST_PASS_BYTES forces another size, for tests.
  const index bytes = number_from_environment("PGDFAST_PASS_BYTES", limits::kRowsBytes);
  normal_matrix(H, true, std::max<index>(bytes / index(sizeof(T)) / std::max<index>(structure.num_parameters, 1), 1));
}

template <class T>
Outcome Solver<T>::primal(const T* r, const T* d, const T* q, T* delta) {
  const index M = structure.num_residuals, P = structure.num_parameters, ld = gram_stride<T>(P);
  if (held != Held::normal) {
    held = Held::nothing;
    ensure(matrix, (P + 1) * ld);
    normal_matrix(matrix.data(), false, M);
    held = Held::normal;
  }
  ensure(rhs, P);
  adjoint_product(r, rhs.data());
  if (q)
    for (index i = 0; i < P; ++i) rhs[std::size_t(i)] += q[i];
  std::copy(rhs.begin(), rhs.begin() + P, delta);
  Outcome outcome;
  if (!solve_direct(ld, P, [&](index i) { return d[i]; }, nullptr, delta, delta, outcome)) return outcome;
  outcome.gain = simd<T>().dot(P, rhs.data(), delta);
  outcome.square = simd<T>().dot(P, delta, delta);
  return outcome;
}

template <class T>
template <class D>
bool Solver<T>::solve_direct(index ld, index n, D&& added, const std::vector<index>* positions, T* x, T* delta,
                             Outcome& outcome) {
  for (index i = 0; i < n; ++i) outcome.trace += double(matrix[std::size_t(i * ld + i)]) / double(added(i));
  if (!factor || factor.use_count() > 1) factor = std::make_shared<Factor<T>>();
  std::atomic_thread_fence(std::memory_order_acquire);   // whoever let go of it may have done so on another thread
  factor->dual_vector.clear();
  if (factor->factor(matrix.data(), ld, n, added, positions, factor_scratch)) {
    factor->solve_in_place(x);
    return true;
  }
  std::fill(delta, delta + structure.num_parameters, T(0));
  outcome.status = Status::not_positive_definite;
  return false;
}

template <class T>
void Solver<T>::product(const T* v, T* u) {
  if (!explicit_J) return jvp(program, v, u, arena_data());
  const index M = structure.num_residuals, P = structure.num_parameters;
  const BlasThreads threads(threads_for(2.0 * double(M) * double(P)));
  gemm<T>(M, 1, P, T(1), J.data(), P, 1, v, 1, 1, T(0), u, 1, 1);
}

template <class T>
void Solver<T>::adjoint_product(const T* u, T* v) {
  if (!explicit_J) return vjp(program, u, v, arena_data());
  const index M = structure.num_residuals, P = structure.num_parameters;
  const BlasThreads threads(threads_for(2.0 * double(M) * double(P)));
  gemm<T>(1, P, M, T(1), u, 1, 1, J.data(), P, 1, T(0), v, P, 1);
}

template <class T>
void Solver<T>::adjoint_products(const T* U, index K, T* V) {
  const index M = structure.num_residuals, P = structure.num_parameters, size = std::max<index>(structure.arena_size, 1);
  if (!explicit_J && K >= kManyProducts && layout.local && M * P <= structure.arena_size) {
    ensure(J, M * P);
    dense(program, layout, work, J.data());
    explicit_J = true;
  }
  if (explicit_J) {
    const BlasThreads threads(threads_for(2.0 * double(K) * double(M) * double(P)));
    return gemm<T>(K, P, M, T(1), U, M, 1, J.data(), P, 1, T(0), V, P, 1);
  }
  // Large arenas are not multiplied: a large sweep has threads of its own.
  const bool large = size * index(sizeof(T)) > limits::kOneArenaBytes / 8;
  const int threads = large ? 1 : int(std::min<index>(K, threads_for(0.5 * double(K) * structure.flops)));
  if (!large) ensure(arenas, index(threads) * size);
  each_item(threads, K, [&](index k, int thread) {
    const T* u = U + k * M;
    T* own = large ? arena_data() : arenas.data() + thread * size;
    if (work.unit_cotangents_valid && layout.max_outputs == 1) {
      thread_local std::vector<T> ordered;
      ensure(ordered, M);
      for (index e = 0; e < M; ++e) ordered[std::size_t(layout.k_of[std::size_t(e)])] = u[e];
      if (vjp_from_units(program, layout, work, ordered.data(), V + k * P, own)) return;
    }
    vjp(program, u, V + k * P, own);
  });
}

template <class T>
void Solver<T>::gram_matrix(const T* weights, T* K) {
  const index M = structure.num_residuals, ld = gram_stride<T>(M);
  std::vector<T> ordered(std::size_t(M * ld));
  gram(program, layout, weights, work, ordered.data());
  work.unit_cotangents_valid = true;
  for (index i = 0; i < M; ++i)
    for (index j = 0; j < M; ++j) {
      const index a = layout.k_of[std::size_t(i)], b = layout.k_of[std::size_t(j)];
      K[i * M + j] = ordered[std::size_t(std::min(a, b) * ld + std::max(a, b))];
    }
}

template <class T>
void Solver<T>::columns(const std::vector<int>& parameters, T* J) {
  std::vector<index> start(std::size_t(structure.num_parameter_buffers), -1);
  index width = 0;
  for (int l : parameters) {
    start[std::size_t(l)] = width;
    width += structure.buffers[std::size_t(l)].size;
  }
  dense_columns(program, layout, work, start, width, J);
  work.unit_cotangents_valid = true;   // further columns are likely to follow
}

template <class T>
void Solver<T>::squared(const T* A, index n, index depth, index row, index column, T* K) {
  const index ld = gram_stride<T>(n);
  held = Held::nothing;
  ensure(matrix, (n + 1) * ld);
  symmetric_product(A, n, depth, row, column, work, matrix.data(), ld);
  constexpr index kTile = 32;   // rows and columns of a piece whose transpose stays in the cache
  for (index a = 0; a < n; a += kTile)
    for (index b = a; b < n; b += kTile)
      for (index i = a; i < std::min(a + kTile, n); ++i)
        for (index j = std::max(b, i); j < std::min(b + kTile, n); ++j)
          K[i * n + j] = K[j * n + i] = matrix[std::size_t(i * ld + j)];
}

template struct Solver<float>;
template struct Solver<double>;

}  // namespace pgdfast
