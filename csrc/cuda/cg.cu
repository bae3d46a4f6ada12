#include "cg.h"

#include <algorithm>

#include "../plan/cg_rules.h"

namespace pgdfast::cuda {
namespace {

constexpr int kBlocks = 128, kSums = 5;   // partial sums: at most so many per quantity, added up in their order
// Every block of a kernel works out the next state for itself from the last one and the partial sums; the first block writes it
// down, beside the old one, which the others may still be reading.
using State = CGState;

template <class T>
struct Vectors {
  T *b, *x, *res, *p, *w, *Ap, *z, *safe, *u, *small;
};

template <class T>
struct Args {
  index P;
  CGProblem<T> problem;
  CGLimits rules;
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
  const State s = cg_begin(sqrt(square), a.rules, a.problem.start != nullptr);
  a.states[0] = a.states[1] = s;
}

// Ap += d w; sums of w . Ap and b . w.
template <class T>
__global__ void damp(Args<T> a) {
  __shared__ double scratch[32];
  if (a.states[0].phase == CGPhase::ended) return;
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
  if (s.phase == CGPhase::ended) {
    if (blockIdx.x == 0 && threadIdx.x == 0) a.states[1] = s;
    return;
  }
  const double curvature = total(a.first, 0, a.blocks, scratch), along = total(a.first, 1, a.blocks, scratch);
  const bool moves = s.phase == CGPhase::iterate || s.phase == CGPhase::start;
  s.step = 0;
  if (s.phase == CGPhase::iterate) cg_step(s, curvature);
  else if (s.phase == CGPhase::start) cg_start(s, along, curvature);
  const T step = T(s.step);
  double sums[kSums] = {};
  PGDFAST_EACH(i) {
    const T b = a.v.b[i];
    T x = a.v.x[i], res = a.v.res[i];
    if (moves) {
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
  if (a.states[1].phase == CGPhase::ended) return;
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
  if (a.states[1].phase == CGPhase::ended) return;
  double weighted = 0;
  PGDFAST_EACH(i) {
    T z = preconditioned(a, i, a.v.res[i]);
    for (index k = 0; k < a.problem.rank; ++k) z += a.problem.V[k * a.P + i] * a.v.small[k];
    a.v.z[i] = z;
    weighted += double(a.v.res[i]) * double(z);
  }
  leave(weighted, a.second, 1, scratch);
}

// States[0] from states[1]: judges, and makes what the next product is taken of.
template <class T>
__global__ void turn(Args<T> a) {
  __shared__ double scratch[32];
  State s = a.states[1];
  const bool writes = blockIdx.x == 0 && threadIdx.x == 0;
  if (s.phase == CGPhase::ended) {
    if (writes) a.states[0] = s;
    return;
  }
  s.norm = sqrt(total(a.second, 0, a.blocks, scratch));
  s.rz = total(a.second, 1, a.blocks, scratch);
  s.gain = total(a.second, 2, a.blocks, scratch);
  s.square = total(a.second, 3, a.blocks, scratch);
  s.slack = total(a.second, 4, a.blocks, scratch);
  cg_judge(s, a.rules, a.values);
  const T beta = T(s.beta);
  PGDFAST_EACH(i) {
    const T x = s.restore_safe ? a.v.safe[i] : a.v.x[i];
    if (s.restore_safe) a.v.x[i] = x;
    if (s.keep_safe) a.v.safe[i] = x;
    if (s.slot >= 0) a.problem.path[s.slot * a.P + i] = x;
    if (s.phase == CGPhase::iterate) {
      const T z = a.problem.V ? a.v.z[i] : preconditioned(a, i, a.v.res[i]);
      const T p = s.beta == 0 ? z : z + beta * a.v.p[i];
      a.v.p[i] = a.v.w[i] = p;
    } else if (s.phase == CGPhase::check || s.phase == CGPhase::restore) {
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
  if (s.phase == CGPhase::ended && a.problem.ended) {
    *a.problem.ended = 1;
    threadfence_system();
  }
}

template <class T>
__global__ void finish(Args<T> a) {
  const State s = a.states[0];
  double* report = a.problem.report;
  report[0] = int(s.status);
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
  const CGLimits rules{problem.max_iterations, problem.tolerance, problem.absolute, problem.progress,
                       problem.path ? int(problem.slots) : 0};
  Args<T> args{P, problem, rules, {w, problem.delta, w + P, w + 2 * P, w + 3 * P, w + 4 * P, w + 5 * P, w + 6 * P, w + 7 * P, w + 7 * P + M},
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
  const int claims = limits::claims_within(std::min(problem.tolerance, limits::kLeastTolerance));
  const int products = problem.max_iterations + problem.max_iterations / limits::kCheckEvery + claims + (problem.start != nullptr);
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
