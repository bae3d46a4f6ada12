#include "ensemble.h"

#include <algorithm>

#include "../plan/cg_rules.h"
#include "ensemble_sweep.h"

namespace pgdfast::cuda {
namespace {

// What a block needs, in shared memory as long as it fits, in this order; else in its part of the workspace.
enum Region : int { matrix = 0, dual_vector = 1, residuals = 2, arenas = 3, explicit_rows = 4, vectors = 5, regions = 6 };
struct Places {
  index at[regions];      // bytes; negative: -1 - bytes into the workspace
  index shared, global;   // bytes
};

template <class T>
struct Args {
  index M, P, arena;
  EnsembleProblem problem;
  MemberPlaces plan;
  Places places;
};

#define PGDFAST_EACH(i, count) for (index i = threadIdx.x; i < (count); i += blockDim.x)

template <class T>
__device__ PGDFAST_NOINLINE double dot(index count, const T* x, const T* y, double* scratch) {
  double sum = 0;
  PGDFAST_EACH(i, count) sum += double(x[i]) * double(y[i]);
  return block_sum(sum, scratch);
}

// Adds the rows of explicit uses to J, M x columns.
template <class T>
__device__ PGDFAST_NOINLINE void add_rows(const Args<T>& a, const Member<T>& member, const T* arenas_, T* J) {
  const index* table = a.problem.table;
  PGDFAST_EACH(i, a.M * a.plan.columns) J[i] = T(0);
  __syncthreads();
  const MemberRows* uses = reinterpret_cast<const MemberRows*>(table + a.plan.rows);
  for (index number = 0; number < a.plan.num_row_uses; ++number) {
    const MemberRows& use = uses[number];
    T alpha;
    const bool gathers = use.gathers != 0;
    const T* c = gathers ? nullptr : coefficient(member, use.constant, use.c_offset, use.alpha, &alpha);
    if (gathers) alpha = T(use.alpha);
    const index* positions = gathers ? member.positions(use.constant, use.c_offset) : nullptr;
    for (index o = 0; o < a.plan.outputs; ++o) {
      const T* y = arenas_ + o * a.arena + use.y;
      PGDFAST_EACH(item, a.plan.num_rows * use.lanes) {
        const index row = item / use.lanes, k = item % use.lanes;
        const index element = table[a.plan.element + row * a.plan.outputs + o];
        if (element < 0) continue;
        for (index e = table[use.starts + row]; e < table[use.starts + row + 1]; ++e) {
          const index* entry = table + use.entries + 3 * e;
          index x = entry[1] + k * use.xk;
          T value = alpha * y[entry[0]];
          if (gathers) {
            const index from = positions[entry[2]];
            if (from < 0) continue;
            x += from * use.x_row;
          } else if (c) {
            value *= c[entry[2] + k * use.ck];
          }
          J[element * a.plan.columns + use.offset + x] += value;
        }
      }
      __syncthreads();
    }
  }
}

constexpr int R = 4;   // rows and columns of K per thread and turn

// acc = the products of R vectors with R others.
template <class T>
__device__ void products(index depth, const T* const (&left)[R], index left_step, const T* const (&right)[R], index right_step,
                         T (&acc)[R][R]) {
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) acc[i][j] = 0;
  for (index d = 0; d < depth; ++d) {
    T x[R], y[R];
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = left[i][d * left_step], y[i] = right[i][d * right_step];
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < R; ++j) acc[i][j] += x[i] * y[j];
  }
}

// The lower triangle of K + mu, row-major in residual order.
template <class T, class F>
__device__ PGDFAST_NOINLINE void gram(const Args<T>& a, const Member<T>& member, const T* arenas_, const T* J, double mu, F* K) {
  const index *table = a.problem.table, *row_of = table + a.plan.row_of, *output_of = table + a.plan.output_of;
  const MemberFactor* factors = reinterpret_cast<const MemberFactor*>(table + a.plan.factors);
  const MemberPair* pairs = reinterpret_cast<const MemberPair*>(table + a.plan.pairs);
  const index M = a.M, tiles = (M + R - 1) / R;
  PGDFAST_EACH(tile, tiles * (tiles + 1) / 2) {
    index ti = 0, rest = tile;
    for (; rest > ti; ++ti) rest -= ti + 1;
    const index i0 = ti * R, j0 = rest * R;   // j0 <= i0
    index rows_i[R], rows_j[R], outputs_i[R], outputs_j[R];
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const index i = i0 + k < M ? i0 + k : M - 1, j = j0 + k < M ? j0 + k : M - 1;
      rows_i[k] = row_of[i], outputs_i[k] = output_of[i];
      rows_j[k] = row_of[j], outputs_j[k] = output_of[j];
    }
    T sum[R][R] = {};
    for (index number = 0; number < a.plan.num_pairs; ++number) {
      const MemberPair& pair = pairs[number];
      const MemberFactor &p = factors[pair.left], &q = factors[pair.right];
      // Rows that a use does not reach take its first one, and nothing of the product.
      const T *cp[R], *yp[R], *cq[R], *yq[R];
      bool in_p[R], in_q[R], any_p = false, any_q = false;
#pragma unroll
      for (int k = 0; k < R; ++k) {
        const index at_p = rows_i[k] - p.row0, at_q = rows_j[k] - q.row0;
        in_p[k] = at_p >= 0 && at_p < p.n, in_q[k] = at_q >= 0 && at_q < q.n;
        any_p = any_p || in_p[k], any_q = any_q || in_q[k];
        const index n_p = in_p[k] ? at_p : 0, n_q = in_q[k] ? at_q : 0;
        cp[k] = member.data(p.constant, p.c_offset) + n_p * p.cn;
        cq[k] = member.data(q.constant, q.c_offset) + n_q * q.cn;
        yp[k] = arenas_ + outputs_i[k] * a.arena + p.y + n_p * p.yn;
        yq[k] = arenas_ + outputs_j[k] * a.arena + q.y + n_q * q.yn;
      }
      if (!any_p || !any_q) continue;
      T first[R][R], second[R][R];
      if (pair.alike) {
        products(p.k, cp, p.ck, cq, q.ck, first);
        products(p.m, yp, p.ym, yq, q.ym, second);
      } else {   // the cotangents of one run along the dimension of the weight that the constants of the other do
        products(p.m, yp, p.ym, cq, q.ck, first);
        products(p.k, cp, p.ck, yq, q.ym, second);
      }
      const T shift = pair.biased ? T(1) : T(0);
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < R; ++j)
          if (in_p[i] && in_q[j]) sum[i][j] += (first[i][j] + shift) * second[i][j];
    }
    if (a.plan.columns > 0) {
      const T *left[R], *right[R];
#pragma unroll
      for (int k = 0; k < R; ++k) {
        left[k] = J + (i0 + k < M ? i0 + k : M - 1) * a.plan.columns;
        right[k] = J + (j0 + k < M ? j0 + k : M - 1) * a.plan.columns;
      }
      T all[R][R];
      products(a.plan.columns, left, 1, right, 1, all);
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < R; ++j) sum[i][j] += all[i][j];
    }
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < R; ++j)
        if (i0 + i < M && j0 + j <= i0 + i) K[(i0 + i) * M + j0 + j] = F(sum[i][j]) + (i0 + i == j0 + j ? F(mu) : F(0));
  }
  __syncthreads();
}

// K = L L^T in place, by columns from the left; false, in all threads, where K is not positive definite.
template <class F>
__device__ PGDFAST_NOINLINE bool cholesky(index M, F* K) {
  for (index j = 0; j < M; ++j) {
    const F pivot = K[j * M + j];
    if (!(pivot > F(0))) return false;   // NaN, too
    const F inverse = F(1) / sqrt(pivot);
    __syncthreads();
    PGDFAST_EACH(i, M - j) K[(j + i) * M + j] *= inverse;
    __syncthreads();
    // Rows by thread groups of 16, columns within: neighbouring threads write neighbouring elements.
    const index lane = threadIdx.x % 16, groups = blockDim.x / 16;
    for (index i = j + 1 + threadIdx.x / 16; i < M; i += groups) {
      const F left = K[i * M + j];
      for (index k = j + 1 + lane; k <= i; k += 16) K[i * M + k] -= left * K[k * M + j];
    }
    __syncthreads();
  }
  return true;
}

// y = (L L^T)^-1 y.
template <class F>
__device__ PGDFAST_NOINLINE void substitute(index M, const F* L, F* y) {
  for (index j = 0; j < M; ++j) {
    const F value = y[j] / L[j * M + j];
    __syncthreads();
    if (threadIdx.x == 0) y[j] = value;
    PGDFAST_EACH(i, M - j - 1) y[j + 1 + i] -= L[(j + 1 + i) * M + j] * value;
    __syncthreads();
  }
  for (index j = M; j-- > 0;) {
    const F value = y[j] / L[j * M + j];
    __syncthreads();
    if (threadIdx.x == 0) y[j] = value;
    PGDFAST_EACH(i, j) y[i] -= L[j * M + i] * value;
    __syncthreads();
  }
}

struct Outcome {
  Status status = Status::solved;
  int iterations = 0;
  double norm = 0, gain = 0, square = 0, trace = 0, slack = 0;
};

template <class T, class F>
__device__ PGDFAST_NOINLINE Outcome solve_dual(const Args<T>& a, Member<T>& member, const T* r, double mu, unsigned char* const (&at)[regions],
                              double* scratch) {
  T *u = reinterpret_cast<T*>(at[residuals]), *all = reinterpret_cast<T*>(at[arenas]), *step = member.v;
  T* J = reinterpret_cast<T*>(at[explicit_rows]);
  F *K = reinterpret_cast<F*>(at[matrix]), *y = reinterpret_cast<F*>(at[dual_vector]);
  const index* output_of = a.problem.table + a.plan.output_of;
  member.u = u;
  for (index o = 0; o < a.plan.outputs; ++o) {
    PGDFAST_EACH(e, a.M) u[e] = output_of[e] == o;
    member.arena = all + o * a.arena;
    __syncthreads();
    member_adjoint(member, a.plan, a.problem.table, false);
  }
  if (a.plan.columns > 0) add_rows(a, member, all, J);
  gram(a, member, all, J, mu, K);
  Outcome outcome;
  double trace = 0;
  PGDFAST_EACH(e, a.M) trace += (double(K[e * a.M + e]) - mu) / mu;
  outcome.trace = block_sum(trace, scratch);
  __syncthreads();
  if (!cholesky(a.M, K)) {
    outcome.status = Status::not_positive_definite;
    return outcome;
  }
  PGDFAST_EACH(e, a.M) y[e] = F(r[e]);
  __syncthreads();
  substitute(a.M, K, y);
  double gain = 0;   // J step = r - mu y
  PGDFAST_EACH(e, a.M) {
    u[e] = T(y[e]);
    gain += double(r[e]) * (double(r[e]) - mu * double(y[e]));
  }
  outcome.gain = block_sum(gain, scratch);
  __syncthreads();
  member.arena = all;
  member_adjoint(member, a.plan, a.problem.table, true);
  outcome.square = dot(a.P, step, step, scratch);
  if (!isfinite(outcome.gain) || !isfinite(outcome.square)) outcome.status = Status::not_positive_definite;
  return outcome;
}

// As ../cpu/cg.cpp, without preconditioner and path.
template <class T>
__device__ PGDFAST_NOINLINE Outcome solve_cg(const Args<T>& a, Member<T>& member, const T* r, double mu, unsigned char* const (&at)[regions],
                            double* scratch) {
  const index P = a.P;
  T *x = member.v, *u = reinterpret_cast<T*>(at[residuals]), *b = reinterpret_cast<T*>(at[vectors]);
  T *res = b + P, *p = res + P, *Ap = p + P, *safe = Ap + P;
  member.arena = reinterpret_cast<T*>(at[arenas]);
  const auto apply = [&](T* w) {   // Ap = (mu + J^T J) w; w . Ap
    member.v = w, member.u = u;
    member_forward(member, a.plan, a.problem.table);
    member.v = Ap;
    member_adjoint(member, a.plan, a.problem.table, true);
    member.v = x;
    PGDFAST_EACH(i, P) Ap[i] += T(mu) * w[i];
    __syncthreads();
    return dot(P, w, Ap, scratch);
  };
  PGDFAST_EACH(e, a.M) u[e] = r[e];
  __syncthreads();
  member.v = b, member.u = u;
  member_adjoint(member, a.plan, a.problem.table, true);
  member.v = x;
  PGDFAST_EACH(i, P) {
    x[i] = safe[i] = T(0);
    res[i] = p[i] = b[i];
  }
  __syncthreads();
  Outcome outcome;
  const CGLimits rules{a.problem.max_iterations, a.problem.tolerance, a.problem.absolute, 0, 0};
  const double square = dot(P, b, b, scratch);
  CGState s = cg_begin(sqrt(square), rules, false);
  if (s.phase == CGPhase::ended) return outcome;
  s.norm = s.b_norm;
  s.rz = square;
  for (;;) {
    cg_judge(s, rules, nullptr);
    if (s.restore_safe) PGDFAST_EACH(i, P) x[i] = safe[i];
    if (s.keep_safe) PGDFAST_EACH(i, P) safe[i] = x[i];
    if (s.phase == CGPhase::ended) break;
    if (s.phase == CGPhase::iterate) {
      const T beta = T(s.beta);
      PGDFAST_EACH(i, P) p[i] = res[i] + beta * p[i];
      __syncthreads();
      if (!cg_step(s, apply(p))) continue;
      const T step = T(s.step);
      PGDFAST_EACH(i, P) {
        x[i] += step * p[i];
        res[i] -= step * Ap[i];
      }
    } else {
      __syncthreads();
      apply(x);
      PGDFAST_EACH(i, P) res[i] = b[i] - Ap[i];
    }
    __syncthreads();
    s.rz = dot(P, res, res, scratch);
    s.norm = sqrt(s.rz);
    if (s.phase != CGPhase::check) continue;
    s.gain = dot(P, b, x, scratch);
    s.slack = dot(P, res, x, scratch);
  }
  __syncthreads();
  outcome.status = s.status;
  outcome.iterations = s.iteration;
  outcome.norm = s.norm / s.b_norm;
  outcome.gain = dot(P, b, x, scratch);
  outcome.square = dot(P, x, x, scratch);
  outcome.slack = dot(P, res, x, scratch);
  if (!isfinite(outcome.gain) || !isfinite(outcome.square)) outcome.status = Status::breakdown;
  return outcome;
}

// theta -= rate delta for one member.
template <class T>
__device__ void update(const Args<T>& a, index b, const T* step) {
  const index* sizes = a.problem.table + a.plan.sizes;
  const T rate = T(a.problem.rates[b]);
  for (index l = 0; l < a.plan.num_parameter_buffers; ++l) {
    T* theta = static_cast<T*>(a.problem.parameters[l]) + b * sizes[l];
    PGDFAST_EACH(i, sizes[l]) theta[i] -= rate * step[i];
    step += sizes[l];
  }
}

template <class T, class F>
__global__ void __launch_bounds__(256, 1) members(const __grid_constant__ Args<T> a) {
  PGDFAST_DYNAMIC_SHARED(raw);
  __shared__ double scratch[32];
  unsigned char* at[regions];
  unsigned char* own = static_cast<unsigned char*>(a.problem.workspace) + index(blockIdx.x) * a.places.global;
  for (int k = 0; k < regions; ++k) at[k] = a.places.at[k] < 0 ? own - 1 - a.places.at[k] : raw + a.places.at[k];
  for (index b = blockIdx.x; b < a.problem.members; b += gridDim.x) {
    T* step = static_cast<T*>(a.problem.step) + b * a.P;
    double* report = a.problem.report + kReport * b;
    if (!a.problem.active[b]) {   // the same in all threads of the block
      PGDFAST_EACH(i, a.P) step[i] = T(0);
      if (threadIdx.x == 0)
        for (int k = 0; k < kReport; ++k) report[k] = k == 0 ? -1 : 0;
      continue;
    }
    Member<T> member{step, nullptr, nullptr, b, a.problem.constants};
    const T* r = static_cast<const T*>(a.problem.r) + b * a.M;
    const double mu = a.problem.mu[b];
    const Outcome outcome = a.problem.method == Method::dual ? solve_dual<T, F>(a, member, r, mu, at, scratch)
                                                             : solve_cg<T>(a, member, r, mu, at, scratch);
    const bool usable = outcome.status != Status::not_positive_definite && outcome.status != Status::breakdown;
    const bool partial = outcome.status == Status::breakdown && outcome.gain > 0 && isfinite(outcome.square);
    __syncthreads();
    if (!usable && !partial)
      PGDFAST_EACH(i, a.P) step[i] = T(0);
    else if (a.problem.parameters)
      update(a, b, step);
    if (threadIdx.x == 0) {
      report[0] = int(outcome.status);
      report[1] = outcome.iterations;
      report[2] = outcome.norm;
      report[3] = usable || partial ? outcome.gain : 0;
      report[4] = usable || partial ? outcome.square : 0;
      report[5] = outcome.trace;
      report[6] = usable || partial ? outcome.slack : 0;
    }
    __syncthreads();
  }
}

Places places(const Structure& s, const EnsemblePlan& plan, Method method, bool wide, index limit) {
  const index M = s.num_residuals, P = s.num_parameters, T = wide ? 8 : 4, F = wide || M <= limits::kDoubleFactor ? 8 : 4;
  const bool dual = method == Method::dual;
  const index bytes[regions] = {dual ? M * M * F : 0, dual ? M * F : 0, M * T, s.arena_size * T * (dual ? plan.outputs : 1),
                                dual ? M * plan.columns * T : 0, dual ? 0 : 5 * P * T};
  Places found{};
  for (int k = 0; k < regions; ++k) {
    const index size = (bytes[k] + 15) / 16 * 16;
    if (found.shared + size <= limit) {
      found.at[k] = found.shared;
      found.shared += size;
    } else {
      found.at[k] = -1 - found.global;
      found.global += size;
    }
  }
  return found;
}

index limit() { return index(shared_limit()) - 1024; }   // static shared memory, and what the system takes of it

}  // namespace

EnsembleLayout ensemble_layout(const Structure& s, const EnsemblePlan& plan, Method method, index members, bool wide) {
  const Places found = places(s, plan, method, wide, limit());
  const index resident = found.shared > 0 ? std::max<index>(limit() / found.shared, 1) : 4;
  const index blocks = std::min(members, std::min<index>(resident, 4) * multiprocessors());
  return {blocks, std::max<index>(blocks * found.global, 16)};
}

template <class T>
void ensemble(const Structure& s, const EnsemblePlan& plan, const EnsembleProblem& problem, Stream stream) {
  const bool wide = sizeof(T) == 8;
  Args<T> args{s.num_residuals, s.num_parameters, s.arena_size, problem, plan, places(s, plan, problem.method, wide, limit())};
  const unsigned blocks = unsigned(ensemble_layout(s, plan, problem.method, problem.members, wide).blocks);
  const std::size_t shared = std::size_t(args.places.shared);
  const auto go = [&](auto kernel) {
    allow_shared(kernel, shared);
    launch(kernel, blocks, kThreads, shared, stream, args);
  };
  if (wide || s.num_residuals <= limits::kDoubleFactor) go(members<T, double>);
  else go(members<T, T>);
}

template void ensemble<float>(const Structure&, const EnsemblePlan&, const EnsembleProblem&, Stream);
template void ensemble<double>(const Structure&, const EnsemblePlan&, const EnsembleProblem&, Stream);

}  // namespace pgdfast::cuda
