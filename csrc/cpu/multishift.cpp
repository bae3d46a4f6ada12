// Multi-shift CG: B. Jegerlehner, hep-lat/9612014; A. Frommer and P. Maass, SIAM J. Sci. Comput. 20 (1999). Letters as there.
//
// The residuals of all systems (A + sigma_k I) x_k = b, begun at zero, are multiples zeta_k r of those of the base system,
// sigma = 0: one product with A serves all. Within a block of iterations x_k and p_k are combinations of p_k at its beginning
// and of the base's residuals since; so those are kept, and two matrix products move all x_k and p_k at the block's end, where
// updates in every iteration would read and write 2 K vectors.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../plan/blas.h"
#include "parallel.h"
#include "simd.h"
#include "solve.h"

namespace pgdfast {
namespace {

constexpr index kPanel = limits::kShiftPanel, kProbes = limits::kShiftProbes;
constexpr double kEarly = limits::kShiftEarly, kDrift = limits::kShiftDrift;
static_assert(kPanel > 4 * kProbes, "the panel's memory serves the probes, their products and one residual at the end");

// What shift k knows: x = X + e P + sum_j cx_j r_j and p = a P + sum_j cp_j r_j, X and P of the block's beginning.
struct Shift {
  double sigma, zeta = 1, ratio = 1, e = 0, a = 0, claim = 0;
  double cx[kPanel] = {}, cp[kPanel] = {};
  bool active = true;
};

// A number between 0.75 and 1.25 with a random sign; the same at every run.
double next_weight(std::uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  const double size = 0.75 + 0.5 * double(state >> 12) / 4503599627370496.0;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 63 ? size : -size;
}

}  // namespace

template <class T>
std::vector<Outcome> Solver<T>::multishift(const T* r, const T* q, const double* mu, index K, const T* scale, const T* penalty,
                                           int max_iterations, double tolerance, double absolute, T* steps) {
  const index M = structure.num_residuals, P = structure.num_parameters;
  const Simd<T>& body = simd<T>();
  T* arena_ = arena_data();
  for (auto* v : {&rhs, &cg_r, &cg_p, &cg_Ap, &cg_z}) ensure(*v, P);
  ensure(cg_u, M);
  ensure(shift_p, (K - 1) * P);
  ensure(shift_r, (kPanel + kProbes) * P);
  ensure(small, 2 * K * kPanel);
  ensure(cg_safe, scale ? 2 * P : P);
  T *b = rhs.data(), *res = cg_r.data(), *p = cg_p.data(), *Ap = cg_Ap.data(), *t = cg_z.data(), *x = steps;
  T *panel = shift_r.data(), *claimed = panel + kPanel * P, *coefficients = small.data();
  // In the variables D^1/2 delta: the matrix is W (J^T J + c) W + mu I with W = D^-1/2.
  T *d = cg_safe.data(), *W = scale ? d + P : nullptr;
  for (index i = 0; i < P; ++i) {
    if (scale) W[i] = T(1) / std::sqrt(scale[i]);
    d[i] = T(mu[0] + (penalty ? double(penalty[i]) / (scale ? double(scale[i]) : 1.0) : 0.0));
  }
  const auto scaled = [&](const T* v, T* out) { body.muladd(P, T(1), W, 1, v, 1, out, 1, true); };
  const auto apply = [&](const T* v, T* out) {   // out = A v, of the base; <v, out>
    if (W) scaled(v, t);
    jvp(program, W ? t : v, cg_u.data(), arena_);
    vjp(program, cg_u.data(), out, arena_);
    if (W) scaled(out, out);
    return body.damped_dot(P, d, v, out);
  };
  const auto norm_of = [&](const T* v) {   // of a residual in the parameters themselves
    if (!W) return std::sqrt(body.dot(P, v, v));
    body.muladd(P, T(1), scale, 1, v, 1, t, 1, true);
    return std::sqrt(body.dot(P, v, t));
  };

  std::vector<Outcome> outcomes(static_cast<std::size_t>(K));
  std::vector<Shift> shifts(static_cast<std::size_t>(K));
  for (index k = 0; k < K; ++k) shifts[std::size_t(k)].sigma = mu[k] - mu[0];
  std::memset(steps, 0, sizeof(T) * std::size_t(K * P));
  std::memset(claimed, 0, sizeof(T) * std::size_t(kProbes * P));
  vjp(program, r, b, arena_);
  if (q) body.axpby(P, T(1), q, T(1), b);
  const double b_norm = std::sqrt(body.dot(P, b, b)), target = std::max(tolerance * b_norm, absolute);
  if (b_norm == 0) return outcomes;
  if (W) scaled(b, b);
  for (T* v : {res, p, panel}) std::memcpy(v, b, sizeof(T) * std::size_t(P));

  std::vector<double> weights(std::size_t(kProbes * K));
  std::uint64_t state = 1;
  for (double& w : weights) w = next_weight(state);
  double norm = b_norm, rz = body.dot(P, b, b), alpha_before = 1, beta = 0;
  index used = 1, active = K, live = K;   // residuals in the panel; shifts on their way; rows that a block still moves
  bool first = true;
  for (Shift& s : shifts) s.cp[0] = 1;
  int i = 0;
  const auto freeze = [&](index k, Status status) {
    Shift& s = shifts[std::size_t(k)];
    s.active = false;
    s.claim = s.zeta * norm;
    outcomes[std::size_t(k)].status = status;
    outcomes[std::size_t(k)].iterations = i;
    for (index m = 0; m < kProbes; ++m)
      body.axpby(P, T(weights[std::size_t(m * K + k)] * s.zeta), res, T(1), claimed + m * P);
    --active;
  };
  const auto flush = [&] {   // the rows from 1 to live: x += e P + Cx R, P <- a P + Cp R
    const index rows = live - 1;
    if (rows > 0) {
      T *cx = coefficients, *cp = coefficients + rows * kPanel, *Q = shift_p.data(), *X = steps + P;
      for (index k = 0; k < rows; ++k) {
        Shift& s = shifts[std::size_t(k + 1)];
        for (index j = 0; j < used; ++j) {
          cx[k * kPanel + j] = T(s.cx[j]);
          cp[k * kPanel + j] = T(s.cp[j]);
          s.cx[j] = s.cp[j] = 0;
        }
        if (!first) {
          body.axpby(P, T(s.e), Q + k * P, T(1), X + k * P);
          body.muladd(P, T(s.a), nullptr, 0, Q + k * P, 1, Q + k * P, 1, true);
        }
        s.e = 0;
        s.a = 1;
      }
      const BlasThreads threads(threads_for(2.0 * double(rows * used) * double(P)));
      gemm<T>(rows, P, used, T(1), cx, kPanel, 1, panel, P, 1, T(1), X, P, 1);
      if (active > 0) gemm<T>(rows, P, used, T(1), cp, kPanel, 1, panel, P, 1, T(first ? 0 : 1), Q, P, 1);
    }
    first = false;
    used = 0;
    while (live > 1 && !shifts[std::size_t(live - 1)].active) --live;
  };

  for (index k = 0; k < K; ++k)
    if (norm <= target) freeze(k, Status::solved);
  Status over = Status::max_iterations;
  while (active > 0 && i < max_iterations) {
    const double curvature = apply(p, Ap);
    if (!(curvature > 0 && rz > 0)) {
      over = Status::breakdown;
      break;
    }
    const double alpha = rz / curvature, before = rz;
    for (index k = 0; k < K; ++k) {
      Shift& s = shifts[std::size_t(k)];
      if (!s.active) continue;
      s.ratio = 1 / (1 + s.sigma * alpha + alpha * beta / alpha_before * (1 - s.ratio));
      s.zeta *= s.ratio;
      if (k == 0) continue;
      const double step = alpha * s.ratio;
      s.e += step * s.a;
      for (index j = 0; j < used; ++j) s.cx[j] += step * s.cp[j];
    }
    double sums[2];
    body.cg_update(P, T(alpha), p, Ap, W ? scale : nullptr, x, res, sums);
    norm = std::sqrt(sums[1]);
    rz = sums[0];
    ++i;
    beta = rz / before;
    alpha_before = alpha;
    for (index k = 0; k < K; ++k) {
      const Shift& s = shifts[std::size_t(k)];
      if (s.active && s.zeta * norm <= kEarly * target) freeze(k, Status::solved);
    }
    if (active == 0) break;
    if (i % limits::kCheckEvery == 0) {   // what the recurrence says of the base, against the truth
      apply(x, Ap);
      body.axpby(P, T(1), b, T(-1), Ap);
      if (!(norm_of(Ap) <= kDrift * norm)) {
        over = Status::stagnated;
        break;
      }
    }
    for (index k = 1; k < K; ++k) {
      Shift& s = shifts[std::size_t(k)];
      if (!s.active) continue;
      const double turn = beta * s.ratio * s.ratio;
      s.a *= turn;
      for (index j = 0; j < used; ++j) s.cp[j] *= turn;
    }
    if (used == kPanel) flush();
    std::memcpy(panel + used * P, res, sizeof(T) * std::size_t(P));
    for (index k = 1; k < K; ++k) shifts[std::size_t(k)].cp[used] = shifts[std::size_t(k)].active ? shifts[std::size_t(k)].zeta : 0;
    ++used;
    body.cg_direction(P, T(beta), nullptr, res, p);
  }
  for (index k = 0; k < K; ++k)
    if (shifts[std::size_t(k)].active) freeze(k, over);
  flush();

  // What true residuals and claims differ by, in all shifts at once: sum w (b - (A + sigma) x) - sum w zeta r. The squares of these
  // sums are those of the differences, summed over the shifts; a shift's own is taken to be at most twice their mean, and never
  // below half of the whole. Shifts that this does not clear are checked one by one, and all where there are few.
  T *combined = panel, *residual = panel + 2 * kProbes * P;
  const index probes = K > kProbes + 1 ? kProbes : 0;
  for (index m = 0; m < probes; ++m)
    for (index k = 0; k < K; ++k) {
      const double w = weights[std::size_t(m * K + k)];
      coefficients[m * K + k] = T(w);
      coefficients[(kProbes + m) * K + k] = T(w * shifts[std::size_t(k)].sigma);
    }
  if (probes) {
    const BlasThreads threads(threads_for(4.0 * double(kProbes * K) * double(P)));
    gemm<T>(2 * kProbes, P, K, T(1), coefficients, K, 1, steps, P, 1, T(0), combined, P, 1);
  }
  // Their products with A side by side, in memory that no panel needs any more.
  const index room = std::max<index>(structure.arena_size, 1);
  const int threads = int(std::min<index>(probes, threads_for(0.5 * double(probes) * structure.flops)));
  T *pushed = panel + (3 * kProbes + 1) * P, *products = panel + (2 * kProbes + 1) * P;
  const bool apart = threads > 1 && !W && room * index(sizeof(T)) <= limits::kOneArenaBytes / 8 && kProbes * M <= (kPanel - 4 * kProbes) * P;
  if (apart) {
    ensure(arenas, index(threads) * room);
    each_item(threads, probes, [&](index m, int thread) {
      const Alone alone;
      jvp(program, combined + m * P, pushed + m * M, arenas.data() + thread * room);
      vjp(program, pushed + m * M, products + m * P, arenas.data() + thread * room);
      body.damped_dot(P, d, combined + m * P, products + m * P);
    });
  }
  double off = 0;
  for (index m = 0; m < probes; ++m) {
    double sum = 0;
    for (index k = 0; k < K; ++k) sum += weights[std::size_t(m * K + k)];
    if (apart) std::memcpy(Ap, products + m * P, sizeof(T) * std::size_t(P));
    else apply(combined + m * P, Ap);
    body.axpby(P, T(sum), b, T(-1), Ap);
    body.axpby(P, T(-1), combined + (kProbes + m) * P, T(1), Ap);
    body.axpby(P, T(-1), claimed + m * P, T(1), Ap);
    const double size = norm_of(Ap);
    off += size * size / double(kProbes);
  }
  off = probes ? std::sqrt(off) * std::max(0.5, 2 / std::sqrt(double(K))) : INFINITY;
  for (index k = 0; k < K; ++k) {
    Outcome& o = outcomes[std::size_t(k)];
    T* xk = steps + k * P;
    double reached = shifts[std::size_t(k)].claim;
    o.gain = body.dot(P, b, xk);
    if (!(reached + off <= (o.status == Status::solved ? target : kDrift * reached))) {
      apply(xk, residual);
      body.axpby(P, T(1), b, T(-1), residual);
      body.axpby(P, T(-shifts[std::size_t(k)].sigma), xk, T(1), residual);
      o.slack = body.dot(P, residual, xk);
      reached = norm_of(residual);
      if (o.status == Status::solved && !(reached <= target)) o.status = Status::stagnated;
    }
    o.residual_norm = reached / b_norm;
    if (W) scaled(xk, xk);
    o.square = body.dot(P, xk, xk);
  }
  return outcomes;
}

#define PGDFAST_INSTANTIATE(T)                                                                                             \
  template std::vector<Outcome> Solver<T>::multishift(const T*, const T*, const double*, index, const T*, const T*, int, double, \
                                                      double, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
