// LSMR, D. C.-L. Fong and M. Saunders, SIAM J. Sci. Comput. 33 (2011); letters and rotations as there, section 2 and 3.
// It works with [J W; damp I], whose condition is the square root of that of the normal equations CG works with.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "simd.h"
#include "solve.h"

namespace pgdfast {
namespace {

struct Rotation {
  double c, s, r;
};

// c a + s b = r, s a - c b = 0.
Rotation rotate(double a, double b) {
  const double r = std::hypot(a, b);
  return r != 0 ? Rotation{a / r, b / r, r} : Rotation{1, 0, 0};
}

}  // namespace

template <class T>
Outcome Solver<T>::lsmr(const T* r, const T* d, const T* root, double damp, const T* q, int max_iterations, double tolerance,
                        T* delta) {
  const index M = structure.num_residuals, P = structure.num_parameters;
  const Simd<T>& body = simd<T>();
  T* arena_ = arena_data();
  for (auto* x : {&rhs, &cg_r, &cg_p, &cg_Ap, &cg_z}) ensure(*x, P);
  ensure(cg_u, M);
  ensure(scratch_u, M);
  T *t = cg_r.data(), *v = cg_p.data(), *h = cg_Ap.data(), *hbar = cg_z.data(), *u = cg_u.data(), *Jx = scratch_u.data();
  const auto scaled = [&](const T* x, T* out) {   // out = W x
    if (root) body.muladd(P, T(1), root, 1, x, 1, out, 1, true);
    else std::memcpy(out, x, sizeof(T) * std::size_t(P));
  };
  const auto normalize = [&](index n, T* x) {
    const double norm = std::sqrt(body.dot(n, x, x));
    if (norm > 0) body.muladd(n, T(1 / norm), nullptr, 0, x, 1, x, 1, true);
    return norm;
  };
  const auto bidiagonalize = [&](double beta) {   // v = W J^T u - beta v
    vjp(program, u, t, arena_);
    if (root) body.muladd(P, T(1), root, 1, t, 1, t, 1, true);
    body.axpby(P, T(1), t, T(-beta), v);
    return normalize(P, v);
  };

  std::memset(delta, 0, sizeof(T) * std::size_t(P));
  std::memset(v, 0, sizeof(T) * std::size_t(P));
  std::memset(hbar, 0, sizeof(T) * std::size_t(P));
  std::memcpy(u, r, sizeof(T) * std::size_t(M));
  if (q) {
    for (index i = 0; i < P; ++i) t[i] = q[i] / d[i];
    jvp(program, t, Jx, arena_);
    body.axpby(M, T(-1), Jx, T(1), u);
  }
  double beta = normalize(M, u), alpha = beta > 0 ? bidiagonalize(0) : 0;
  std::memcpy(h, v, sizeof(T) * std::size_t(P));
  const double b_norm = beta, lowest = 0.01 * std::numeric_limits<T>::epsilon();
  double zetabar = alpha * beta, alphabar = alpha, rho = 1, rhobar = 1, cbar = 1, sbar = 0, zeta = 0;
  double betadd = beta, betad = 0, rhod = 1, tautilde = 0, thetatilde = 0, rest = 0, A_square = alpha * alpha;
  const double first = std::abs(zetabar);
  Outcome outcome;
  outcome.status = zetabar == 0 ? Status::solved : Status::max_iterations;
  while (outcome.status == Status::max_iterations && outcome.iterations < max_iterations) {
    ++outcome.iterations;
    scaled(v, t);
    jvp(program, t, Jx, arena_);
    body.axpby(M, T(1), Jx, T(-alpha), u);
    beta = normalize(M, u);
    A_square += beta * beta;
    if (beta > 0) alpha = bidiagonalize(beta);
    else alpha = 0;
    const double A_norm = std::sqrt(A_square + damp * damp);
    A_square += alpha * alpha;

    const Rotation hat = rotate(alphabar, damp), turn = rotate(hat.r, beta);
    const double rho_old = rho, rhobar_old = rhobar, zeta_old = zeta;
    rho = turn.r;
    const double theta_new = turn.s * alpha, thetabar = sbar * rho;
    alphabar = turn.c * alpha;
    const Rotation bar = rotate(cbar * rho, theta_new);
    cbar = bar.c, sbar = bar.s, rhobar = bar.r;
    if (!(rho * rhobar > 0)) {   // no curvature left, or not finite
      outcome.status = Status::breakdown;
      break;
    }
    zeta = cbar * zetabar;
    zetabar = -sbar * zetabar;
    body.axpby(P, T(1), h, T(-thetabar * rho / (rho_old * rhobar_old)), hbar);
    body.muladd(P, T(zeta / (rho * rhobar)), nullptr, 0, hbar, 1, delta, 1, false);
    body.axpby(P, T(1), v, T(-theta_new / rho), h);

    // Norm of the residual of [J W; damp I].
    const double acute = hat.c * betadd, check = -hat.s * betadd, betahat = turn.c * acute;
    betadd = -turn.s * acute;
    const Rotation tilde = rotate(rhod, thetabar);
    const double thetatilde_old = thetatilde;
    thetatilde = tilde.s * rhobar;
    rhod = tilde.c * rhobar;
    betad = -tilde.s * betad + tilde.c * betahat;
    tautilde = (zeta_old - thetatilde_old * tautilde) / tilde.r;
    const double tau = (zeta - thetatilde * tautilde) / rhod;
    rest += check * check;
    const double r_norm = std::sqrt(rest + (betad - tau) * (betad - tau) + betadd * betadd);
    const double x_norm = std::sqrt(body.dot(P, delta, delta));
    const double normal = std::abs(zetabar);   // of the normal equations' residual, in the variables y
    if (normal <= tolerance * first)
      outcome.status = Status::solved;
    else if (r_norm <= lowest * (b_norm + A_norm * x_norm) || normal <= lowest * A_norm * r_norm)
      outcome.status = Status::stagnated;
  }
  if (root) body.muladd(P, T(1), root, 1, delta, 1, delta, 1, true);
  if (q)
    for (index i = 0; i < P; ++i) delta[i] += q[i] / d[i];

  T *b = rhs.data(), *error = cg_r.data();
  vjp(program, r, b, arena_);
  if (q) body.axpby(P, T(1), q, T(1), b);
  jvp(program, delta, Jx, arena_);
  vjp(program, Jx, error, arena_);
  body.muladd(P, T(1), d, 1, delta, 1, error, 1, false);
  body.axpby(P, T(1), b, T(-1), error);
  const double g_norm = std::sqrt(body.dot(P, b, b));
  outcome.residual_norm = g_norm > 0 ? std::sqrt(body.dot(P, error, error)) / g_norm : 0;
  outcome.gain = body.dot(P, b, delta);
  outcome.square = body.dot(P, delta, delta);
  outcome.slack = body.dot(P, error, delta);
  return outcome;
}

#define PGDFAST_INSTANTIATE(T) \
  template Outcome Solver<T>::lsmr(const T*, const T*, const T*, double, const T*, int, double, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
