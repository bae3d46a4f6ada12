#include "cg.h"

#include <algorithm>

namespace pgdfast::cuda {
namespace {

constexpr int kBlocks = 128, kSums = 5;   // partial sums: at most so many per quantity, added up in their order
constexpr double kFall = 1e-3;            // see ../cpu/cg.cpp
constexpr int kEvery = 50;                // iterations from one true residual to the next
constexpr int kClaims = 34;               // further true residuals: a claim that fails has to halve the last one

enum Phase : int { direction = 0, starting = 1, checking = 2, restored = 3, ended = 4 };
// As in ../cpu/solve.h.
enum Status : int { solved = 0, max_iterations = 2, breakdown = 3, stagnated = 4, progress = 5 };

// The scalars of the iteration. Every block of a kernel works out the next state for itself from the last one and the partial
// sums; the first block writes it down, beside the old one, which the others may still be reading.
struct State {
  int phase, status, iteration, claimed, broken, slot, keep_safe, restore;
  double b_norm, target, norm, rz, before, beta, step, value, recurrence, last_claim, safe, gain, square, slack;
};

template <class T>
struct Vectors {
  T *b, *x, *res, *p, *w, *Ap, *z, *safe, *u, *small;
};

template <class T>
struct Args {
  index P;
  CGProblem<T> problem;
  Vectors<T> v;
  State *states;           // two
  double *values;          // the model's reduction at every iterate
  double *first, *second;  // partial sums of the product and of the update, [sum][block]
  int blocks;
};

__device__ double total(const double* partial, int sum, int blocks, double* scratch) {
  const double x = int(threadIdx.x) < blocks ? partial[sum * kBlocks + threadIdx.x] : 0.0;
  return block_sum(x, scratch);
}

__device__ void leave(double x, double* partial, int sum, double* scratch) {
  x = block_sum(x, scratch);
  if (threadIdx.x == 0) partial[sum * kBlocks + blockIdx.x] = x;
}

template <class T>
__device__ T preconditioned(const Args<T>& a, index i, T x) {
  return a.problem.inverse ? a.problem.inverse[i] * x : x;
}

#define PGDFAST_EACH(i) \
  for (index i = blockIdx.x * index(blockDim.x) + threadIdx.x; i < a.P; i += index(gridDim.x) * blockDim.x)

// b += q, x = 0, res = b; sums of b^2 and res . z.
template <class T>
__global__ void begin(Args<T> a) {
  __shared__ double scratch[32];
  double square = 0, weighted = 0;
  PGDFAST_EACH(i) {
    const T b = a.problem.q ? a.v.b[i] + a.problem.q[i] : a.v.b[i];
    a.v.b[i] = a.v.res[i] = b;
    a.v.x[i] = a.v.p[i] = a.v.safe[i] = T(0);
    a.v.w[i] = a.problem.start ? a.problem.start[i] : T(0);
    square += double(b) * double(b);
    weighted += double(b) * double(preconditioned(a, i, b));
  }
  leave(square, a.second, 0, scratch);
  leave(weighted, a.second, 1, scratch);
  for (int sum = 2; sum < kSums; ++sum) leave(0.0, a.second, sum, scratch);
}

// The first state, before the sums of `begin` are judged by `turn`.
template <class T>
__global__ void first_state(Args<T> a) {
  __shared__ double scratch[32];
  const double square = total(a.second, 0, a.blocks, scratch);
  if (threadIdx.x != 0) return;
  State s{};
  s.phase = a.problem.start ? starting : checking;   // without a start the first residual is b, true already
  s.status = max_iterations;
  s.b_norm = s.last_claim = sqrt(square);
  s.target = a.problem.tolerance * s.b_norm > a.problem.absolute ? a.problem.tolerance * s.b_norm : a.problem.absolute;
  s.iteration = 0;
  if (s.b_norm == 0) s.phase = ended, s.status = solved;
  a.states[0] = a.states[1] = s;
}

// Ap += d w; sums of w . Ap and b . w.
template <class T>
__global__ void damp(Args<T> a) {
  __shared__ double scratch[32];
  if (a.states[0].phase == ended) return;
  double curvature = 0, along = 0;
  PGDFAST_EACH(i) {
    const T w = a.v.w[i], Ap = a.v.Ap[i] + a.problem.d[i] * w;
    a.v.Ap[i] = Ap;
    curvature += double(w) * double(Ap);
    along += double(a.v.b[i]) * double(w);
  }
  leave(curvature, a.first, 0, scratch);
  leave(along, a.first, 1, scratch);
}

// States[1] from states[0]: the step length; x, res; sums for `turn`.
template <class T>
__global__ void advance(Args<T> a) {
  __shared__ double scratch[32];
  State s = a.states[0];
  if (s.phase == ended) {
    if (blockIdx.x == 0 && threadIdx.x == 0) a.states[1] = s;
    return;
  }
  const double curvature = total(a.first, 0, a.blocks, scratch), along = total(a.first, 1, a.blocks, scratch);
  s.step = 0;
  if (s.phase == direction) {
    s.broken = !(curvature > 0 && s.rz > 0);   // exact solution in a singular direction, or lost to rounding
    if (!s.broken) s.step = s.rz / curvature;
    s.before = s.rz;
  } else if (s.phase == starting && isfinite(along) && curvature > 0 && isfinite(curvature)) {
    s.step = along / curvature;
    s.value = 0.5 * s.step * along;
  }
  const T step = T(s.step);
  double sums[kSums] = {};
  PGDFAST_EACH(i) {
    const T b = a.v.b[i];
    T x = a.v.x[i], res = a.v.res[i];
    if (s.phase == direction || s.phase == starting) {
      if (s.step != 0) {
        x += step * a.v.w[i];
        res -= step * a.v.Ap[i];
        a.v.x[i] = x;
        a.v.res[i] = res;
      }
    } else {
      res = b - a.v.Ap[i];
      a.v.res[i] = res;
    }
    sums[0] += double(res) * double(res);
    sums[1] += double(res) * double(preconditioned(a, i, res));
    sums[2] += double(b) * double(x);
    sums[3] += double(x) * double(x);
    sums[4] += double(res) * double(x);
  }
  for (int sum = 0; sum < kSums; ++sum) leave(sums[sum], a.second, sum, scratch);
  if (blockIdx.x == 0 && threadIdx.x == 0) a.states[1] = s;
}

// small = c * (V res): one block a row of the sketch.
template <class T>
__global__ void sketch(Args<T> a) {
  __shared__ double scratch[32];
  if (a.states[1].phase == ended) return;
  const T* row = a.problem.V + blockIdx.x * a.P;
  double sum = 0;
  for (index i = threadIdx.x; i < a.P; i += blockDim.x) sum += double(row[i]) * double(a.v.res[i]);
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) a.v.small[blockIdx.x] = a.problem.c[blockIdx.x] * T(sum);
}

// z = inverse * res + V^T small; res . z in place of the sum of `advance`.
template <class T>
__global__ void unsketch(Args<T> a) {
  __shared__ double scratch[32];
  if (a.states[1].phase == ended) return;
  double weighted = 0;
  PGDFAST_EACH(i) {
    T z = preconditioned(a, i, a.v.res[i]);
    for (index k = 0; k < a.problem.rank; ++k) z += a.problem.V[k * a.P + i] * a.v.small[k];
    a.v.z[i] = z;
    weighted += double(a.v.res[i]) * double(z);
  }
  leave(weighted, a.second, 1, scratch);
}

// What follows from the sums: the end, the next direction, or a true residual.
__device__ void judge(State& s, int limit, double progress_bound, index slots, const double* values, bool has_path) {
  const auto end = [&](int status) {
    s.phase = ended;
    s.status = status;
  };
  const auto go_on = [&](bool restart) {
    const int i = s.iteration, k = i / 10 > 10 ? i / 10 : 10;
    if (progress_bound > 0 && i > k && s.value - values[i - k] < k * progress_bound * s.value) return end(progress);
    if (i >= limit) return end(max_iterations);
    s.beta = restart || s.before == 0 ? 0.0 : s.rz / s.before;
    s.phase = direction;
  };
  s.slot = -1;
  s.keep_safe = s.restore = 0;
  switch (s.phase) {
    case starting:
      s.safe = s.value;
      s.keep_safe = 1;
      if (s.norm <= s.target) return end(solved);
      return go_on(true);
    case direction: {
      if (s.broken) return end(breakdown);
      const int i = ++s.iteration;
      s.value += 0.5 * s.step * s.before;
      if (has_path && (i & (i - 1)) == 0) {
        int power = 0;
        while (i >> (power + 1)) ++power;
        s.slot = power % int(slots);
      }
      s.claimed = s.norm <= s.target;
      if (s.claimed || i % kEvery == 0) {
        s.recurrence = s.norm;
        s.phase = checking;
        return;
      }
      return go_on(false);
    }
    case checking: {
      if (s.norm <= s.target) return end(solved);
      if (s.iteration == 0) return go_on(true);   // the first residual of a solve from zero
      const double reached = 0.5 * (s.gain + s.slack);
      if (!(reached >= (1 - kFall) * s.safe)) {
        s.restore = 1;
        s.phase = restored;
        return;
      }
      if (s.iteration % kEvery == 0) {
        s.safe = reached;
        s.keep_safe = 1;
      }
      const bool restart = s.claimed || s.norm > 1.1 * s.recurrence;
      if (restart && s.norm > 0.5 * s.last_claim) return end(stagnated);
      if (restart) s.last_claim = s.norm;
      return go_on(restart);
    }
    default:
      return end(stagnated);   // restored: the residual of the iterate that CG went back to is known now
  }
}

// States[0] from states[1]: judges, and makes what the next product is taken of.
template <class T>
__global__ void turn(Args<T> a) {
  __shared__ double scratch[32];
  State s = a.states[1];
  const bool writes = blockIdx.x == 0 && threadIdx.x == 0;
  if (s.phase == ended) {
    if (writes) a.states[0] = s;
    return;
  }
  s.norm = sqrt(total(a.second, 0, a.blocks, scratch));
  s.rz = total(a.second, 1, a.blocks, scratch);
  s.gain = total(a.second, 2, a.blocks, scratch);
  s.square = total(a.second, 3, a.blocks, scratch);
  s.slack = total(a.second, 4, a.blocks, scratch);
  judge(s, a.problem.max_iterations, a.problem.progress, a.problem.slots, a.values, a.problem.path != nullptr);
  const T beta = T(s.beta);
  PGDFAST_EACH(i) {
    const T x = s.restore ? a.v.safe[i] : a.v.x[i];
    if (s.restore) a.v.x[i] = x;
    if (s.keep_safe) a.v.safe[i] = x;
    if (s.slot >= 0) a.problem.path[s.slot * a.P + i] = x;
    if (s.phase == direction) {
      const T z = a.problem.V ? a.v.z[i] : preconditioned(a, i, a.v.res[i]);
      const T p = s.beta == 0 ? z : z + beta * a.v.p[i];
      a.v.p[i] = a.v.w[i] = p;
    } else if (s.phase == checking || s.phase == restored) {
      a.v.w[i] = x;
    }
  }
  if (!writes) return;
  a.states[0] = s;
  a.values[s.iteration] = s.value;
  if (s.slot >= 0) {
    double* kept = a.problem.report + 6 + 5 * s.slot;
    kept[0] = s.iteration, kept[1] = s.gain, kept[2] = s.square, kept[3] = s.slack;
  }
  if (s.phase == ended && a.problem.ended) {
    *a.problem.ended = 1;
    threadfence_system();
  }
}

template <class T>
__global__ void finish(Args<T> a) {
  const State s = a.states[0];
  double* report = a.problem.report;
  report[0] = s.status;
  report[1] = s.iteration;
  report[2] = s.b_norm > 0 ? s.norm / s.b_norm : 0;
  report[3] = s.gain;
  report[4] = s.square;
  report[5] = s.slack;
}

}  // namespace

index cg_vectors(index P, index M, index rank) { return 7 * P + M + rank; }
index cg_scalars(int iterations) { return 2 * index(sizeof(State) / sizeof(double)) + 2 * kSums * kBlocks + iterations + 2; }

template <class T>
void cg(const Bound<T>& program, const Schedule& forward, const Schedule& adjoint, T* arena, T* scratch,
        const CGProblem<T>& problem, Stream stream) {
  static_assert(sizeof(State) % sizeof(double) == 0);
  const Structure& s = *program.structure;
  const index P = s.num_parameters, M = s.num_residuals;
  T* w = problem.work;
  Args<T> args{P, problem, {w, problem.delta, w + P, w + 2 * P, w + 3 * P, w + 4 * P, w + 5 * P, w + 6 * P, w + 7 * P, w + 7 * P + M},
               nullptr, nullptr, nullptr, nullptr, 0};
  double* at = problem.scalars;
  args.states = reinterpret_cast<State*>(at);
  args.first = at + 2 * sizeof(State) / sizeof(double);
  args.second = args.first + kSums * kBlocks;
  args.values = args.second + kSums * kBlocks;
  args.blocks = int(std::clamp<index>((P + 4 * kThreads - 1) / (4 * kThreads), 1, kBlocks));
  const unsigned blocks = unsigned(args.blocks);
  clear(problem.report, sizeof(double) * std::size_t(6 + 5 * problem.slots), stream);
  run(program, adjoint, Direction::adjoint, Memory<T>{args.v.b, const_cast<T*>(problem.r), arena, scratch}, stream);
  launch(begin<T>, blocks, kThreads, 0, stream, args);
  launch(first_state<T>, 1u, kThreads, 0, stream, args);
  const auto precondition = [&] {
    if (problem.V == nullptr) return;
    launch(sketch<T>, unsigned(problem.rank), kThreads, 0, stream, args);
    launch(unsketch<T>, blocks, kThreads, 0, stream, args);
  };
  if (!problem.start) {
    precondition();
    launch(turn<T>, blocks, kThreads, 0, stream, args);
  }
  const int products = problem.max_iterations + problem.max_iterations / kEvery + kClaims + (problem.start != nullptr);
  for (int i = 0; i < products; ++i) {
    if (problem.ended && *problem.ended) break;   // a look, no wait: what is enqueued beyond the end does nothing
    run(program, forward, Direction::forward, Memory<T>{args.v.w, args.v.u, arena, scratch}, stream);
    run(program, adjoint, Direction::adjoint, Memory<T>{args.v.Ap, args.v.u, arena, scratch}, stream);
    launch(damp<T>, blocks, kThreads, 0, stream, args);
    launch(advance<T>, blocks, kThreads, 0, stream, args);
    precondition();
    launch(turn<T>, blocks, kThreads, 0, stream, args);
  }
  launch(finish<T>, 1u, 1u, 0, stream, args);
}

#define PGDFAST_INSTANTIATE(T)                                                                                      \
  template void cg<T>(const Bound<T>&, const Schedule&, const Schedule&, T*, T*, const CGProblem<T>&, Stream);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast::cuda
