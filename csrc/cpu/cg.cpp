#include <algorithm>
#include <cmath>
#include <cstring>

#include "../plan/blas.h"
#include "simd.h"
#include "solve.h"

namespace pgdfast {

// The model's reduction never falls in exact arithmetic. Where it has, by this part of it, rounding has taken over, and CG
// returns to the iterate of the last check.
constexpr double kFall = 1e-3;

template <class T>
Outcome Solver<T>::cg(const T* r, const T* d, const T* q, const CGOptions<T>& options, T* delta, std::vector<Kept>* kept) {
  const index M = structure.num_residuals, P = structure.num_parameters;
  const Simd<T>& body = simd<T>();
  const Preconditioner<T>& m = options.preconditioner;
  const bool sketched = m.rank > 0;
  T* arena_ = arena_data();
  for (auto* v : {&rhs, &cg_r, &cg_p, &cg_Ap}) ensure_size(*v, P);
  ensure_size(cg_u, M);
  if (sketched) ensure_size(cg_z, P);
  ensure_size(small, m.rank);
  T *b = rhs.data(), *res = cg_r.data(), *p = cg_p.data(), *Ap = cg_Ap.data(), *z = cg_z.data();
  const auto apply = [&](const T* x, T* out) {   // out = (diag(d) + J^T J) x; <x, out>
    jvp(program, x, cg_u.data(), arena_);
    vjp(program, cg_u.data(), out, arena_);
    return body.damped_dot(P, d, x, out);
  };
  // Norm of the residual, and <res, z>; makes z where the preconditioner is more than a diagonal.
  double norm = 0, rz = 0;
  const auto measure = [&](double square, double weighted) {
    norm = std::sqrt(square);
    rz = weighted;
    if (!sketched) return;
    gemm<T>(m.rank, 1, P, T(1), m.V, P, 1, res, 1, P, T(0), small.data(), 1, m.rank);
    for (index i = 0; i < m.rank; ++i) small[std::size_t(i)] *= m.c[i];
    if (m.inverse) body.muladd(P, T(1), m.inverse, 1, res, 1, z, 1, true);
    else std::memcpy(z, res, sizeof(T) * std::size_t(P));
    gemm<T>(1, P, m.rank, T(1), small.data(), m.rank, 1, m.V, P, 1, T(1), z, P, 1);
    rz = body.dot(P, res, z);
  };
  const auto advance = [&](double step) {
    double sums[2];
    body.cg_update(P, T(step), p, Ap, m.inverse, delta, res, sums);
    measure(sums[0], sums[1]);
  };
  const auto turn = [&](double beta) {
    if (sketched) body.axpby(P, T(1), z, T(beta), p);
    else body.cg_direction(P, T(beta), m.inverse, res, p);
  };

  const auto true_residual = [&] {
    apply(delta, Ap);
    body.axpby(P, T(1), b, T(0), res);
    body.axpby(P, T(-1), Ap, T(1), res);
    advance(0);
  };

  Outcome outcome;
  if (kept) kept->assign(std::size_t(options.path_slots), {});
  std::memset(delta, 0, sizeof(T) * std::size_t(P));
  std::memset(p, 0, sizeof(T) * std::size_t(P));
  std::memset(Ap, 0, sizeof(T) * std::size_t(P));
  vjp(program, r, b, arena_);
  if (q) body.axpby(P, T(1), q, T(1), b);
  std::memcpy(res, b, sizeof(T) * std::size_t(P));
  const double b_norm = std::sqrt(body.dot(P, b, b)), target = std::max(options.tolerance * b_norm, options.absolute);
  if (b_norm == 0) return outcome;
  double value = 0;   // the model's reduction so far, 1/2 <b + res, delta>
  if (options.start) {
    const double along = body.dot(P, b, options.start), curvature = apply(options.start, Ap);
    if (std::isfinite(along) && curvature > 0 && std::isfinite(curvature)) {
      const double t = along / curvature;
      body.axpby(P, T(t), options.start, T(0), p);   // p = t start, Ap = A start: one update moves delta and residual
      body.axpby(P, T(1), p, T(0), delta);
      body.axpby(P, T(-t), Ap, T(1), res);
      value = 0.5 * t * along;
    } else {
      std::memset(Ap, 0, sizeof(T) * std::size_t(P));   // it may hold NaN, which the first update must not meet
    }
  }
  advance(0);
  turn(0);
  std::vector<double> values = {value};
  double last_claim = b_norm, safe = value;
  if (options.max_iterations > 50) cg_safe.assign(delta, delta + P);
  outcome.status = norm <= target ? Status::solved : Status::max_iterations;
  while (outcome.status == Status::max_iterations && outcome.iterations < options.max_iterations) {
    const double curvature = apply(p, Ap);
    if (!(curvature > 0 && rz > 0)) {   // exact solution in a singular direction, or lost to rounding
      outcome.status = Status::breakdown;
      break;
    }
    const double step = rz / curvature, before = rz;
    values.push_back(values.back() + 0.5 * step * rz);
    advance(step);
    const int i = ++outcome.iterations;
    if (kept && (i & (i - 1)) == 0) {
      const int slot = int(std::log2(i) + 0.5) % int(options.path_slots);
      std::memcpy(options.path + slot * P, delta, sizeof(T) * std::size_t(P));
      (*kept)[std::size_t(slot)] = {i, body.dot(P, b, delta), body.dot(P, delta, delta), body.dot(P, res, delta)};
    }
    bool restart = false;
    const bool claim = norm <= target;
    if (claim || i % 50 == 0) {
      const double recurrence = norm;
      true_residual();
      if (norm <= target) {
        outcome.status = Status::solved;
        break;
      }
      const double reached = 0.5 * (body.dot(P, b, delta) + body.dot(P, res, delta));
      if (!(reached >= (1 - kFall) * safe)) {
        std::memcpy(delta, cg_safe.data(), sizeof(T) * std::size_t(P));
        true_residual();
        outcome.status = Status::stagnated;
        break;
      }
      if (i % 50 == 0) {
        safe = reached;
        cg_safe.assign(delta, delta + P);
      }
      restart = claim || norm > 1.1 * recurrence;
      if (restart && norm > 0.5 * last_claim) {
        outcome.status = Status::stagnated;
        break;
      }
      if (restart) last_claim = norm;
    }
    const int k = std::max(10, i / 10);
    const double now = values[std::size_t(i)];
    if (options.progress > 0 && i > k && now - values[std::size_t(i - k)] < k * options.progress * now) {
      outcome.status = Status::progress;
      break;
    }
    turn(restart ? 0 : rz / before);
  }
  outcome.residual_norm = norm / b_norm;
  outcome.gain = body.dot(P, b, delta);
  outcome.square = body.dot(P, delta, delta);
  outcome.slack = body.dot(P, res, delta);
  return outcome;
}

#define PGDFAST_INSTANTIATE(T) \
  template Outcome Solver<T>::cg(const T*, const T*, const T*, const CGOptions<T>&, T*, std::vector<Kept>*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
