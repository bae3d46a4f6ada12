// Sweeps of one member by one block: what sweep.cu does with launches, done with barriers. Every sum has one order.
#pragma once

#include "ensemble.h"

namespace pgdfast::cuda {

template <class T>
struct Member {
  T *v, *u, *arena;
  index number;
  const EnsembleConstant* constants;

  __device__ T* at(index role, index place) const {
    return (role == index(Role::parameter) ? v : role == index(Role::residual) ? u : arena) + place;
  }
  __device__ const T* data(index constant, index offset) const {
    const EnsembleConstant& c = constants[constant];
    return static_cast<const T*>(c.data) + c.shift * number + offset;
  }
  __device__ const index* positions(index constant, index offset) const {
    const EnsembleConstant& c = constants[constant];
    return static_cast<const index*>(c.data) + c.shift * number + offset;
  }
};

// Alpha times a scalar constant, and the tensor, if the constant is one.
template <class T>
__device__ const T* coefficient(const Member<T>& member, index constant, index offset, double alpha, T* scaled) {
  *scaled = T(alpha);
  if (constant < 0) return nullptr;
  if (member.constants[constant].data) return member.data(constant, offset);
  *scaled *= T(member.constants[constant].value);
  return nullptr;
}

// Target elements (dimensions along which it moves) shared out among threads, or warps where there are few, the others summed.
template <class T>
__device__ PGDFAST_NOINLINE void member_muladd(const Member<T>& member, const MemberOp& op, const T* source, const index* ss, T* target,
                              const index* ts, bool overwrite) {
  T alpha;
  const T* c = coefficient(member, op.constant, op.c_offset, op.alpha, &alpha);
  unsigned targets = 1, summed = 1;
  for (int d = 0; d < op.ndim; ++d) (ts[d] != 0 || op.shape[d] == 1 ? targets : summed) *= unsigned(op.shape[d]);
  const bool by_warp = summed > 64 && targets < blockDim.x / 4;
  const unsigned lanes = by_warp ? 32 : 1, first = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  for (unsigned t = first; t < targets; t += blockDim.x / lanes) {
    T sum = 0;
    index to = 0;
    for (unsigned i = lane; i < summed; i += lanes) {
      unsigned kept = t, rest = i;
      index so = 0, co = 0;
      to = 0;
      for (int d = int(op.ndim) - 1; d >= 0; --d) {
        const unsigned extent = unsigned(op.shape[d]);
        unsigned& from = ts[d] != 0 || extent == 1 ? kept : rest;
        const index at = from % extent;
        from /= extent;
        so += at * ss[d];
        co += at * op.cs[0][d];
        to += at * ts[d];
      }
      sum += c ? c[co] * source[so] : source[so];
    }
    if (by_warp) {
      sum = warp_sum(sum);
      if (lane != 0) continue;
    }
    target[to] = overwrite ? alpha * sum : target[to] + alpha * sum;
  }
}

struct Matrices {
  index outer, batch, m, n, k;
  index lo, lb, lm, lk, ro, rb, rk, rn, to, tb, tm, tn;   // strides of left, right, target
};

// out (+)= alpha left right, R x R elements per thread and turn; batches that the target does not tell apart are summed.
template <class T, int R>
__device__ PGDFAST_NOINLINE void member_product(const Matrices& g, T alpha, const T* left, const T* right, T* target, bool overwrite) {
  const bool sums_outer = g.outer > 1 && g.to == 0, sums_batch = g.batch > 1 && g.tb == 0;
  const unsigned rows = unsigned((g.m + R - 1) / R), columns = unsigned((g.n + R - 1) / R);
  const unsigned batches = unsigned((sums_outer ? 1 : g.outer) * (sums_batch ? 1 : g.batch));
  for (unsigned item = threadIdx.x; item < batches * rows * columns; item += blockDim.x) {
    const index n0 = index(item % columns) * R, m0 = index(item / columns % rows) * R;
    const index both = item / columns / rows, own_batches = sums_batch ? 1 : g.batch;
    const index b0 = both % own_batches, o0 = both / own_batches;
    T sum[R][R] = {};
    for (index o = 0; o < (sums_outer ? g.outer : 1); ++o)
      for (index b = 0; b < (sums_batch ? g.batch : 1); ++b) {
        const T *a[R], *c[R];
#pragma unroll
        for (int i = 0; i < R; ++i) {   // those beyond the end repeat the last one, and are not written
          a[i] = left + (o0 + o) * g.lo + (b0 + b) * g.lb + (m0 + i < g.m ? m0 + i : g.m - 1) * g.lm;
          c[i] = right + (o0 + o) * g.ro + (b0 + b) * g.rb + (n0 + i < g.n ? n0 + i : g.n - 1) * g.rn;
        }
        for (index k = 0; k < g.k; ++k) {
          T x[R], y[R];
#pragma unroll
          for (int i = 0; i < R; ++i) x[i] = a[i][k * g.lk], y[i] = c[i][k * g.rk];
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < R; ++j) sum[i][j] += x[i] * y[j];
        }
      }
    T* out = target + o0 * g.to + b0 * g.tb;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < R; ++j) {
        if (m0 + i >= g.m || n0 + j >= g.n) continue;
        T& y = out[(m0 + i) * g.tm + (n0 + j) * g.tn];
        y = overwrite ? alpha * sum[i][j] : y + alpha * sum[i][j];
      }
  }
}

template <class T>
__device__ void member_matmul(const Member<T>& member, const MemberOp& op, bool adjoint, const T* source, T* target,
                              bool overwrite) {
  T alpha;
  const T* c = coefficient(member, op.constant, op.c_offset, op.alpha, &alpha);
  const index *s = op.shape, *y = op.ys, *x = op.xs, *r = op.cs[0];
  const Matrices g = adjoint ? Matrices{s[0], s[1], s[2], s[4], s[3], y[0], y[1], y[2], y[3], r[0], r[1], r[3], r[2],
                                        x[0], x[1], x[2], x[3]}
                             : Matrices{s[0], s[1], s[2], s[3], s[4], x[0], x[1], x[2], x[3], r[0], r[1], r[2], r[3],
                                        y[0], y[1], y[2], y[3]};
  const index elements = g.outer * g.batch * g.m * g.n;
  if (elements >= 16 * blockDim.x) member_product<T, 4>(g, alpha, source, c, target, overwrite);
  else if (elements >= 4 * blockDim.x) member_product<T, 2>(g, alpha, source, c, target, overwrite);
  else member_product<T, 1>(g, alpha, source, c, target, overwrite);
}

template <class T>
__device__ void member_gather(const Member<T>& member, const MemberOp& op, bool adjoint, const T* source, T* target,
                              bool overwrite) {
  const index rows = op.shape[0], width = op.shape[1], *p = member.positions(op.constant, op.c_offset);
  const T alpha = T(op.alpha);
  if (!adjoint) {
    for (index item = threadIdx.x; item < rows * width; item += blockDim.x) {
      const index i = item / width, j = item % width;
      const T value = p[i] < 0 ? T(0) : alpha * source[p[i] * op.xs[0] + j];
      T& y = target[i * op.ys[0] + j];
      y = overwrite ? value : y + value;
    }
    return;
  }
  for (index j = threadIdx.x; j < width; j += blockDim.x)   // rows may meet: one thread a column
    for (index i = 0; i < rows; ++i)
      if (p[i] >= 0) target[p[i] * op.xs[0] + j] += alpha * source[i * op.ys[0] + j];
}

template <class T>
__device__ PGDFAST_NOINLINE void member_project(const Member<T>& member, const MemberOp& op, bool adjoint, const T* source, const index* ss,
                               T* target, const index* ts, bool apart, bool overwrite) {
  constexpr int operands = 1 + 2 * kMaxTerms;
  const int last = int(op.ndim) - 1, lane = int(threadIdx.x % 32);
  const index n = op.shape[last];
  index rows = 1;
  for (int d = 0; d < last; ++d) rows *= op.shape[d];
  const index warps = apart ? blockDim.x / 32 : 1;
  if (threadIdx.x / 32 >= warps) return;
  for (index row = threadIdx.x / 32; row < rows; row += warps) {
    index rest = row, so = 0, to = 0, co[operands] = {};
    for (int d = last - 1; d >= 0; --d) {
      const index i = rest % op.shape[d];
      rest /= op.shape[d];
      so += i * ss[d];
      to += i * ts[d];
      for (int k = 0; k < operands; ++k) co[k] += i * op.cs[k][d];
    }
    const auto c = [&](int k, index j) {
      return op.constants[k] < 0 ? T(1) : member.data(op.constants[k], op.offsets[k])[co[k] + j * op.cs[k][last]];
    };
    const auto x = [&](index j) { return source[so + j * ss[last]] * (adjoint ? c(0, j) : T(1)); };
    T dots[kMaxTerms] = {};
    for (int t = 0; t < op.terms; ++t) {
      T sum = 0;
      for (index j = lane; j < n; j += 32) sum += c(adjoint ? 1 + 2 * t : 2 + 2 * t, j) * x(j);
      dots[t] = warp_sum(sum);
    }
    for (index j = lane; j < n; j += 32) {
      T value = 0;
      for (int t = 0; t < op.terms; ++t) value += c(adjoint ? 2 + 2 * t : 1 + 2 * t, j) * dots[t];
      value = x(j) - T(op.alpha) * value;
      if (!adjoint) value *= c(0, j);
      T& y = target[to + j * ts[last]];
      y = overwrite ? value : y + value;
    }
  }
}

template <class T>
__device__ PGDFAST_NOINLINE void member_op(const Member<T>& member, const MemberOp& op, bool adjoint) {
  const T* source = adjoint ? member.at(op.y_role, op.y) : member.at(op.x_role, op.x);
  T* target = adjoint ? member.at(op.x_role, op.x) : member.at(op.y_role, op.y);
  const index *ss = adjoint ? op.ys : op.xs, *ts = adjoint ? op.xs : op.ys;
  const bool overwrite = adjoint ? op.overwrite_x : op.overwrite_y;
  switch (static_cast<Kind>(op.kind)) {
    case Kind::muladd: member_muladd(member, op, source, ss, target, ts, overwrite); break;
    case Kind::matmul: member_matmul(member, op, adjoint, source, target, overwrite); break;
    case Kind::gather: member_gather(member, op, adjoint, source, target, overwrite && !adjoint); break;
    case Kind::project:
      member_project(member, op, adjoint, source, ss, target, ts, adjoint ? op.apart_x : op.apart_y, overwrite);
      break;
  }
  __syncthreads();
}

template <class T>
__device__ void member_clear(const Member<T>& member, const MemberBuffer* buffers, index count, bool parameters) {
  for (index i = 0; i < count; ++i) {
    if (!parameters && buffers[i].role == index(Role::parameter)) continue;
    T* to = member.at(buffers[i].role, buffers[i].offset);
    for (index e = threadIdx.x; e < buffers[i].size; e += blockDim.x) to[e] = T(0);
  }
  __syncthreads();
}

template <class T>
__device__ void member_forward(const Member<T>& member, const MemberPlaces& plan, const index* table) {
  member_clear(member, reinterpret_cast<const MemberBuffer*>(table + plan.clear_forward), plan.num_clear_forward, false);
  const MemberOp* ops = reinterpret_cast<const MemberOp*>(table + plan.ops);
  for (index i = 0; i < plan.num_ops; ++i) member_op(member, ops[i], false);
}

// What writes intermediate results, then, with `uses`, what writes parameters.
template <class T>
__device__ void member_adjoint(const Member<T>& member, const MemberPlaces& plan, const index* table, bool uses) {
  member_clear(member, reinterpret_cast<const MemberBuffer*>(table + plan.clear_adjoint), plan.num_clear_adjoint, uses);
  const MemberOp* ops = reinterpret_cast<const MemberOp*>(table + plan.ops);
  for (index i = plan.num_ops; i-- > 0;)
    if (!ops[i].uses_parameter) member_op(member, ops[i], true);
  for (index i = plan.num_ops; uses && i-- > 0;)
    if (ops[i].uses_parameter) member_op(member, ops[i], true);
}

}  // namespace pgdfast::cuda
