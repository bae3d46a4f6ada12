#include <cmath>
#include <cstring>

#include "simd.h"
#include "solve.h"

namespace pgdfast {
namespace {

template <class T>
void ensure(std::vector<T>& buffer, index size) {
  if (index(buffer.size()) < size) buffer.resize(std::size_t(size));
}

}  // namespace

template <class T>
Outcome Solver<T>::cg(const T* r, const T* d, const T* q, const T* inverse_preconditioner, int max_iterations,
                      double tolerance, T* delta) {
  const index M = structure.num_residuals, P = structure.num_parameters;
  const Simd<T>& body = simd<T>();
  T* arena_ = arena_data();
  for (auto* v : {&rhs, &cg_r, &cg_p, &cg_Ap, &cg_z}) ensure(*v, P);
  ensure(cg_u, M);
  T *b = rhs.data(), *res = cg_r.data(), *p = cg_p.data(), *Ap = cg_Ap.data(), *z = cg_z.data();
  const auto apply = [&](const T* x, T* out) {   // out = (diag(d) + J^T J) x
    jvp(program, x, cg_u.data(), arena_);
    vjp(program, cg_u.data(), out, arena_);
    body.muladd(P, T(1), d, 1, x, 1, out, 1, false);
  };
  const auto precondition = [&](const T* x, T* out) {
    if (inverse_preconditioner) body.muladd(P, T(1), inverse_preconditioner, 1, x, 1, out, 1, true);
    else std::memcpy(out, x, sizeof(T) * std::size_t(P));
  };
  const auto true_residual = [&] {
    apply(delta, res);
    body.axpby(P, T(1), b, T(-1), res);
  };

  vjp(program, r, b, arena_);
  if (q) body.axpby(P, T(1), q, T(1), b);
  std::memset(delta, 0, sizeof(T) * std::size_t(P));
  std::memcpy(res, b, sizeof(T) * std::size_t(P));
  const double b_norm = std::sqrt(body.dot(P, b, b));
  Outcome outcome;
  if (b_norm == 0) return outcome;
  precondition(res, z);
  std::memcpy(p, z, sizeof(T) * std::size_t(P));
  double rz = body.dot(P, res, z), norm = b_norm, last_claim = b_norm;
  outcome.status = Status::max_iterations;
  while (outcome.iterations < max_iterations) {
    apply(p, Ap);
    const double curvature = body.dot(P, p, Ap);
    if (!(curvature > 0)) {   // exact solution in a singular direction, or lost to rounding
      outcome.status = norm <= tolerance * b_norm ? Status::solved : Status::breakdown;
      break;
    }
    const double step = rz / curvature;
    body.axpby(P, T(step), p, T(1), delta);
    body.axpby(P, T(-step), Ap, T(1), res);
    ++outcome.iterations;
    norm = std::sqrt(body.dot(P, res, res));
    bool restart = false;
    const bool claim = norm <= tolerance * b_norm;
    if (claim || outcome.iterations % 50 == 0) {
      const double recurrence = norm;
      true_residual();
      norm = std::sqrt(body.dot(P, res, res));
      if (norm <= tolerance * b_norm) {
        outcome.status = Status::solved;
        break;
      }
      restart = claim || norm > 1.1 * recurrence;
      if (restart && norm > 0.5 * last_claim) {
        outcome.status = Status::stagnated;
        break;
      }
      if (restart) last_claim = norm;
    }
    precondition(res, z);
    const double next = body.dot(P, res, z);
    body.axpby(P, T(1), z, T(restart ? 0 : next / rz), p);
    rz = next;
  }
  outcome.residual_norm = norm / b_norm;
  outcome.gain = body.dot(P, b, delta);
  outcome.square = body.dot(P, delta, delta);
  return outcome;
}

template Outcome Solver<float>::cg(const float*, const float*, const float*, const float*, int, double, float*);
template Outcome Solver<double>::cg(const double*, const double*, const double*, const double*, int, double, double*);

}  // namespace pgdfast
