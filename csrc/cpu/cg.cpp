#include <algorithm>
#include <cmath>
#include <cstring>

#include "../plan/blas.h"
#include "../plan/cg_rules.h"
#include "simd.h"
#include "solve.h"

namespace pgdfast {

template <class T>
Outcome Solver<T>::cg(const T* r, const T* d, const T* q, const CGOptions<T>& options, T* delta, std::vector<Kept>* kept) {
  const index M = structure.num_residuals, P = structure.num_parameters;
  const Simd<T>& body = simd<T>();
  const Preconditioner<T>& m = options.preconditioner;
  const bool sketched = m.rank > 0;
  T* arena_ = arena_data();
  for (auto* v : {&rhs, &cg_r, &cg_p, &cg_Ap}) ensure(*v, P);
  ensure(cg_u, M);
  if (sketched) ensure(cg_z, P);
  ensure(small, m.rank);
  T *b = rhs.data(), *res = cg_r.data(), *p = cg_p.data(), *Ap = cg_Ap.data(), *z = cg_z.data();
  const auto apply = [&](const T* x, T* out) {   // out = (diag(d) + J^T J) x; <x, out>
    jvp(program, x, cg_u.data(), arena_);
    vjp(program, cg_u.data(), out, arena_);
    return body.damped_dot(P, d, x, out);
  };
  // ||res|| and <res, z>; makes z where the preconditioner is more than a diagonal.
  CGState s{};
  const auto measure = [&](double square, double weighted) {
    s.norm = std::sqrt(square);
    s.rz = weighted;
    if (!sketched) return;
    gemm<T>(m.rank, 1, P, T(1), m.V, P, 1, res, 1, P, T(0), small.data(), 1, m.rank);
    for (index i = 0; i < m.rank; ++i) small[std::size_t(i)] *= m.c[i];
    if (m.inverse) body.muladd(P, T(1), m.inverse, 1, res, 1, z, 1, true);
    else std::memcpy(z, res, sizeof(T) * std::size_t(P));
    gemm<T>(1, P, m.rank, T(1), small.data(), m.rank, 1, m.V, P, 1, T(1), z, P, 1);
    s.rz = body.dot(P, res, z);
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

  if (kept) kept->assign(std::size_t(options.path_slots), {});
  std::memset(delta, 0, sizeof(T) * std::size_t(P));
  std::memset(p, 0, sizeof(T) * std::size_t(P));
  std::memset(Ap, 0, sizeof(T) * std::size_t(P));
  vjp(program, r, b, arena_);
  if (q) body.axpby(P, T(1), q, T(1), b);
  std::memcpy(res, b, sizeof(T) * std::size_t(P));
  const CGLimits rules{options.max_iterations, options.tolerance, options.absolute, options.progress,
                       kept ? int(options.path_slots) : 0};
  s = cg_begin(std::sqrt(body.dot(P, b, b)), rules, options.start != nullptr);
  if (s.phase == CGPhase::ended) return {};
  if (options.start) {
    const double along = body.dot(P, b, options.start), curvature = apply(options.start, Ap);
    if (cg_start(s, along, curvature)) {
      body.axpby(P, T(s.step), options.start, T(0), p);   // p = t start, Ap = A start: one update moves delta and residual
      body.axpby(P, T(1), p, T(0), delta);
      body.axpby(P, T(-s.step), Ap, T(1), res);
    } else {
      std::memset(Ap, 0, sizeof(T) * std::size_t(P));   // it may hold NaN, which the first update must not meet
    }
  }
  advance(0);
  std::vector<double> values;   // the model's reduction at every iterate
  for (;;) {
    cg_judge(s, rules, values.data());
    if (s.iteration == index(values.size())) values.push_back(s.value);
    if (s.restore_safe) std::memcpy(delta, cg_safe.data(), sizeof(T) * std::size_t(P));
    if (s.keep_safe) cg_safe.assign(delta, delta + P);
    if (s.slot >= 0) {
      std::memcpy(options.path + s.slot * P, delta, sizeof(T) * std::size_t(P));
      (*kept)[std::size_t(s.slot)] = {s.iteration, body.dot(P, b, delta), body.dot(P, delta, delta), body.dot(P, res, delta)};
    }
    if (s.phase == CGPhase::ended) break;
    if (s.phase == CGPhase::iterate) {
      turn(s.beta);
      if (cg_step(s, apply(p, Ap))) advance(s.step);
      continue;
    }
    true_residual();
    if (s.phase == CGPhase::check) {
      s.gain = body.dot(P, b, delta);
      s.slack = body.dot(P, res, delta);
    }
  }
  Outcome outcome;
  outcome.status = s.status;
  outcome.iterations = s.iteration;
  outcome.residual_norm = s.norm / s.b_norm;
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
