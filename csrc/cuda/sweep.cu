#include "sweep.h"

#include <algorithm>

namespace pgdfast::cuda {
namespace {

constexpr int kOperands = 1 + 2 * kMaxTerms;

// --- muladd ---------------------------------------------------------------------------------------------------------------

template <class T>
struct LinkArgs {
  const T* source;
  T* target;
  const T* c;
  T alpha;
  bool from_register, same_target, overwrite, last;   // last: of those that add to one target
  index ss[kMaxDims], ts[kMaxDims], cs[kMaxDims];
};

template <class T>
struct ChainArgs {
  int ndim, count;
  unsigned shape[kMaxDims], total;
  LinkArgs<T> links[kMaxChain];
};

// y[i] (+)= alpha c[i] x[i], one after the other for every i of a common index space; lanes never meet (schedule.cpp).
template <class T>
__global__ void chain(ChainArgs<T> args) {
  for (std::uint64_t item = blockIdx.x * std::uint64_t(blockDim.x) + threadIdx.x; item < args.total;
       item += std::uint64_t(gridDim.x) * blockDim.x) {
    unsigned rest = unsigned(item), at[kMaxDims] = {};
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d)   // fixed extents keep `at` in registers
      if (d < args.ndim) {
        at[d] = d == 0 ? rest : rest % args.shape[d];
        rest /= args.shape[d];
      }
    T value = 0;
    for (int k = 0; k < args.count; ++k) {
      const LinkArgs<T>& link = args.links[k];
      index so = 0, to = 0, co = 0;
#pragma unroll
      for (int d = 0; d < kMaxDims; ++d) {   // strides beyond ndim are zero
        so += at[d] * link.ss[d];
        to += at[d] * link.ts[d];
        co += at[d] * link.cs[d];
      }
      T x = link.alpha * (link.from_register ? value : link.source[so]);
      if (link.c) x *= __ldg(link.c + co);
      value = link.same_target ? value + x : link.overwrite ? x : link.target[to] + x;
      if (link.last) link.target[to] = value;
    }
  }
}

template <class T>
struct ReduceArgs {
  int ndim, kept;
  unsigned shape[kMaxDims], targets, summed, splits;
  LinkArgs<T> link;
  T* partial;
};

template <class T>
__device__ index strided(unsigned i, int begin, int end, const unsigned* shape, const index* strides) {
  index offset = 0;
  for (int d = end - 1; d >= begin; --d) {
    offset += index(i % shape[d]) * strides[d];
    i /= shape[d];
  }
  return offset;
}

// y[t] (+)= alpha sum_i c[t, i] x[t, i]: lanes along the targets, threadIdx.y along the sum; block y takes one part of it.
template <class T>
__global__ void reduce(ReduceArgs<T> args) {
  PGDFAST_DYNAMIC_SHARED(raw);
  T* sums = reinterpret_cast<T*>(raw);
  const LinkArgs<T>& link = args.link;
  const unsigned target = blockIdx.x * blockDim.x + threadIdx.x, parts = blockDim.y;
  const unsigned chunk = (args.summed + args.splits - 1) / args.splits;
  const unsigned begin = blockIdx.y * chunk, end = begin + chunk < args.summed ? begin + chunk : args.summed;
  T sum = 0;
  if (target < args.targets) {
    const T* x = link.source + strided<T>(target, 0, args.kept, args.shape, link.ss);
    const T* c = link.c ? link.c + strided<T>(target, 0, args.kept, args.shape, link.cs) : nullptr;
    for (unsigned i = begin + threadIdx.y; i < end; i += parts) {
      const T value = x[strided<T>(i, args.kept, args.ndim, args.shape, link.ss)];
      sum += c ? value * __ldg(c + strided<T>(i, args.kept, args.ndim, args.shape, link.cs)) : value;
    }
  }
  sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || target >= args.targets) return;
  for (unsigned p = 1; p < parts; ++p) sum += sums[p * blockDim.x + threadIdx.x];
  if (args.splits > 1) {
    args.partial[std::size_t(blockIdx.y) * args.targets + target] = sum;
    return;
  }
  T* y = link.target + strided<T>(target, 0, args.kept, args.shape, link.ts);
  *y = link.overwrite ? link.alpha * sum : *y + link.alpha * sum;
}

// The second stage: partial sums in their order.
template <class T>
__global__ void reduce_partial(ReduceArgs<T> args) {
  const LinkArgs<T>& link = args.link;
  const unsigned target = blockIdx.x * blockDim.x + threadIdx.x;
  if (target >= args.targets) return;
  T sum = 0;
  for (unsigned p = 0; p < args.splits; ++p) sum += args.partial[std::size_t(p) * args.targets + target];
  T* y = link.target + strided<T>(target, 0, args.kept, args.shape, link.ts);
  *y = link.overwrite ? link.alpha * sum : *y + link.alpha * sum;
}

// --- products ---------------------------------------------------------------------------------------------------------------

constexpr int kTile = 32, kDepth = 16;   // of the small product: out tile, and how much of the sum is in shared memory at once

template <class T>
struct ProductArgs {
  Product p;
  bool overwrite, sums_outer, sums_batch;   // sums_*: the dimension is summed, as out does not move along it
  unsigned tiles_m, tiles_n;
  T alpha;
  const T *left, *right;
  T* out;
};

// One 32 x 32 tile of out per block, 2 x 2 per thread; batches that out does not tell apart are summed one after the other.
template <class T>
__global__ void tile_product(ProductArgs<T> args) {
  __shared__ T left[kDepth][kTile + 1], right[kDepth][kTile + 1];
  const Product& p = args.p;
  unsigned number = blockIdx.x;
  const index n0 = index(number % args.tiles_n) * kTile;
  number /= args.tiles_n;
  const index m0 = index(number % args.tiles_m) * kTile;
  number /= args.tiles_m;
  const index batches = args.sums_batch ? 1 : p.batch, b0 = number % batches, o0 = number / batches;
  const index outer_sums = args.sums_outer ? p.outer : 1, batch_sums = args.sums_batch ? p.batch : 1;
  const int thread = int(threadIdx.x), tx = thread % 16, ty = thread / 16;
  T sum[2][2] = {};
  for (index o = 0; o < outer_sums; ++o)
    for (index b = 0; b < batch_sums; ++b) {
      const T* a = args.left + (o0 + o) * p.left.outer + (b0 + b) * p.left.batch;
      const T* c = args.right + (o0 + o) * p.right.outer + (b0 + b) * p.right.batch;
      for (index k0 = 0; k0 < p.k; k0 += kDepth) {
        for (int i = thread; i < kTile * kDepth; i += int(kThreads)) {
          // Neighbouring threads read along the contiguous dimension.
          const bool along_k = p.left.column == 1;
          const index k = along_k ? i % kDepth : i / kTile, m = along_k ? i / kDepth : i % kTile;
          left[k][m] = m0 + m < p.m && k0 + k < p.k ? a[(m0 + m) * p.left.row + (k0 + k) * p.left.column] : T(0);
          const bool along_n = p.right.column == 1;
          const index l = along_n ? i / kTile : i % kDepth, n = along_n ? i % kTile : i / kDepth;
          right[l][n] = n0 + n < p.n && k0 + l < p.k ? c[(k0 + l) * p.right.row + (n0 + n) * p.right.column] : T(0);
        }
        __syncthreads();
        for (int k = 0; k < kDepth; ++k)
          for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) sum[i][j] += left[k][ty + 16 * i] * right[k][tx + 16 * j];
        __syncthreads();
      }
    }
  T* out = args.out + o0 * p.out.outer + b0 * p.out.batch;
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      const index m = m0 + ty + 16 * i, n = n0 + tx + 16 * j;
      if (m >= p.m || n >= p.n) continue;
      T& y = out[m * p.out.row + n * p.out.column];
      y = args.overwrite ? args.alpha * sum[i][j] : y + args.alpha * sum[i][j];
    }
}

// --- gather ---------------------------------------------------------------------------------------------------------------

// y[i, :] (+)= alpha x[p[i], :], nothing where p[i] = -1.
template <class T>
__global__ void gather(Gather g, T alpha, const index* positions, const T* x, T* y, bool overwrite) {
  for (index item = blockIdx.x * index(blockDim.x) + threadIdx.x; item < g.rows * g.width; item += index(gridDim.x) * blockDim.x) {
    const index i = item / g.width, j = item % g.width, from = positions[i];
    const T value = from < 0 ? T(0) : alpha * x[from * g.x_row + j];
    T& to = y[i * g.y_row + j];
    to = overwrite ? value : to + value;
  }
}

// x[p[i], :] += alpha y[i, :], rows that meet summed in their order: one block per row of x (grid y: columns) looks for its own.
template <class T>
__global__ void scatter_by_row(Gather g, T alpha, const index* positions, const T* y, T* x) {
  __shared__ index seen[128];
  const index row = blockIdx.x, j = blockIdx.y * index(blockDim.x) + threadIdx.x;
  T sum = 0;
  bool any = false;
  for (index i0 = 0; i0 < g.rows; i0 += blockDim.x) {
    const index i = i0 + threadIdx.x, count = g.rows - i0 < blockDim.x ? g.rows - i0 : blockDim.x;
    __syncthreads();
    seen[threadIdx.x] = i < g.rows ? positions[i] : -1;
    __syncthreads();
    for (index k = 0; k < count; ++k) {
      if (seen[k] != row || j >= g.width) continue;
      sum += y[(i0 + k) * g.y_row + j];
      any = true;
    }
  }
  if (any) x[row * g.x_row + j] += alpha * sum;
}

// The same for many rows of x: one thread per column.
template <class T>
__global__ void scatter_by_column(Gather g, T alpha, const index* positions, const T* y, T* x) {
  const index j = blockIdx.x * index(blockDim.x) + threadIdx.x;
  if (j >= g.width) return;
  for (index i = 0; i < g.rows; ++i)
    if (positions[i] >= 0) x[positions[i] * g.x_row + j] += alpha * y[i * g.y_row + j];
}

// --- project --------------------------------------------------------------------------------------------------------------

template <class T>
struct ProjectArgs {
  int ndim, terms;
  bool adjoint, overwrite;
  index shape[kMaxDims + 1], ss[kMaxDims + 1], ts[kMaxDims + 1];
  index cs[kOperands][kMaxDims + 1];
  const T* c[kOperands];   // a, then l and r of each term; null: ones
  T alpha;
  const T* source;
  T* target;
  index rows;
};

// y (+)= a * (x - alpha sum_t l_t <r_t, x>) along the last dimension; the adjoint scales first and exchanges l and r. A warp per
// row.
template <class T>
__global__ void project(ProjectArgs<T> args) {
  const int lane = int(threadIdx.x % 32), last = args.ndim - 1;
  const index warps = index(gridDim.x) * (blockDim.x / 32), first = index(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const index n = args.shape[last];
  for (index row = first; row < args.rows; row += warps) {
    index rest = row, so = 0, to = 0, co[kOperands] = {};
    for (int d = last - 1; d >= 0; --d) {
      const index i = rest % args.shape[d];
      rest /= args.shape[d];
      so += i * args.ss[d];
      to += i * args.ts[d];
      for (int k = 0; k < kOperands; ++k) co[k] += i * args.cs[k][d];
    }
    const auto c = [&](int k, index j) { return args.c[k] ? args.c[k][co[k] + j * args.cs[k][last]] : T(1); };
    const auto x = [&](index j) { return args.source[so + j * args.ss[last]] * (args.adjoint ? c(0, j) : T(1)); };
    T dots[kMaxTerms] = {};
    for (int t = 0; t < args.terms; ++t) {
      const int right = args.adjoint ? 1 + 2 * t : 2 + 2 * t;
      T sum = 0;
      for (index j = lane; j < n; j += 32) sum += c(right, j) * x(j);
      dots[t] = warp_sum(sum);
    }
    for (index j = lane; j < n; j += 32) {
      T value = 0;
      for (int t = 0; t < args.terms; ++t) value += c(args.adjoint ? 2 + 2 * t : 1 + 2 * t, j) * dots[t];
      value = x(j) - args.alpha * value;
      if (!args.adjoint) value *= c(0, j);
      T& y = args.target[to + j * args.ts[last]];
      y = args.overwrite ? value : y + value;
    }
  }
}

template <class T, class X>
__global__ void evaluate_kernel(int function, index count, const X* x, T* out) {
  for (index i = blockIdx.x * index(blockDim.x) + threadIdx.x; i < count; i += index(gridDim.x) * blockDim.x) {
    const T c = T(x[i]);
    out[i] = function == 1 ? 1 - c * c : function == 2 ? c - c * c : c;
  }
}

// --- launches -------------------------------------------------------------------------------------------------------------

index checked(index extent) {
  if (extent > 0xffffffffll) throw std::runtime_error("an operation over more than 2^32 elements");
  return extent;
}

template <class T>
struct Runner {
  const Bound<T>& program;
  Direction direction;
  const Memory<T>& memory;
  Stream stream;
  const Structure& s = *program.structure;

  const T* source(const Instruction& op) const {
    const bool forward = direction == Direction::forward;
    return memory.at(s.buffers[std::size_t(forward ? op.x : op.y)]) + (forward ? op.x_offset : op.y_offset);
  }
  T* target(const Instruction& op) const {
    const bool forward = direction == Direction::forward;
    return memory.at(s.buffers[std::size_t(forward ? op.y : op.x)]) + (forward ? op.y_offset : op.x_offset);
  }
  LinkArgs<T> link(const Link& from) const {
    const Instruction& op = s.instructions[std::size_t(from.instruction)];
    const Coefficient<T> c = coefficient(program, op);
    LinkArgs<T> to{source(op), target(op), c.data, c.alpha, from.from_register, from.same_target, from.overwrite, true,
                   {}, {}, {}};
    std::copy(from.source.begin(), from.source.end(), to.ss);
    std::copy(from.target.begin(), from.target.end(), to.ts);
    std::copy(from.constant.begin(), from.constant.end(), to.cs);
    return to;
  }

  void operator()(const Launch& l) const {
    switch (l.task) {
      case Task::clear: {
        const Buffer& buffer = s.buffers[std::size_t(l.buffer)];
        return clear(memory.at(buffer), sizeof(T) * std::size_t(buffer.size), stream);
      }
      case Task::chain: return chained(l);
      case Task::reduce: return reduced(l);
      case Task::blas:
      case Task::small_product: return multiplied(l);
      case Task::gather:
      case Task::scatter: return gathered(l);
      case Task::project: return projected(l);
    }
  }

  void chained(const Launch& l) const {
    ChainArgs<T> args{};
    args.ndim = l.ndim;
    index total = 1;
    for (int d = 0; d < l.ndim; ++d) {
      args.shape[d] = unsigned(checked(l.shape[std::size_t(d)]));
      total *= l.shape[std::size_t(d)];
    }
    args.total = unsigned(checked(total));
    args.count = int(l.links.size());
    for (int k = 0; k < args.count; ++k) {
      args.links[k] = link(l.links[std::size_t(k)]);
      if (args.links[k].same_target) args.links[k - 1].last = false;
    }
    launch(chain<T>, std::min(blocks_for(total, kThreads), 1u << 20), kThreads, 0, stream, args);
  }

  void reduced(const Launch& l) const {
    ReduceArgs<T> args{};
    args.ndim = l.ndim;
    args.kept = l.kept;
    index targets = 1, summed = 1;
    for (int d = 0; d < l.ndim; ++d) {
      args.shape[d] = unsigned(checked(l.shape[std::size_t(d)]));
      (d < l.kept ? targets : summed) *= l.shape[std::size_t(d)];
    }
    args.targets = unsigned(checked(targets));
    args.summed = unsigned(checked(summed));
    args.splits = unsigned(l.splits);
    args.link = link(l.links[0]);
    args.link.overwrite = l.overwrite;
    args.partial = memory.scratch;
    const unsigned lanes = targets == 1 ? 1 : 32;
    const dim3 block(lanes, kThreads / lanes), grid(blocks_for(targets, lanes), args.splits);
    launch(reduce<T>, grid, block, sizeof(T) * kThreads, stream, args);
    if (args.splits > 1) launch(reduce_partial<T>, blocks_for(targets, kThreads), kThreads, 0, stream, args);
  }

  void multiplied(const Launch& l) const {
    const Instruction& op = s.instructions[std::size_t(l.instruction)];
    const Coefficient<T> c = coefficient(program, op);
    const auto multiply = l.task == Task::blas ? blas_product<T> : small_product<T>;
    multiply(l.product, c.alpha, source(op), c.data, target(op), l.overwrite, stream);
  }

  void gathered(const Launch& l) const {
    const Instruction& op = s.instructions[std::size_t(l.instruction)];
    const Gather& g = op.gather;
    const Coefficient<T> c = coefficient(program, op);
    if (g.rows * g.width == 0) return;
    if (l.task == Task::gather) {
      launch(gather<T>, std::min(blocks_for(g.rows * g.width, kThreads), 1u << 20), kThreads, 0, stream, g, c.alpha,
             c.positions, source(op), target(op), l.overwrite);
    } else if (g.rows * g.count <= index(1) << 28) {
      launch(scatter_by_row<T>, dim3(unsigned(g.count), blocks_for(g.width, 128)), 128, 0, stream, g, c.alpha, c.positions,
             source(op), target(op));
    } else {
      launch(scatter_by_column<T>, blocks_for(g.width, 32), 32, 0, stream, g, c.alpha, c.positions, source(op), target(op));
    }
  }

  void projected(const Launch& l) const {
    const Instruction& op = s.instructions[std::size_t(l.instruction)];
    const Project& p = op.project;
    const bool forward = direction == Direction::forward;
    ProjectArgs<T> args{};
    args.ndim = p.ndim;
    args.terms = p.terms;
    args.adjoint = !forward;
    args.overwrite = l.overwrite;
    args.rows = 1;
    bool apart = true;   // no two rows write one element
    for (std::size_t d = 0; d < std::size_t(p.ndim); ++d) {
      args.shape[d] = p.shape[d];
      args.ss[d] = (forward ? p.xs : p.ys)[d];
      args.ts[d] = (forward ? p.ys : p.xs)[d];
      for (std::size_t k = 0; k < std::size_t(kOperands); ++k) args.cs[k][d] = p.cs[k][d];
      if (int(d) == p.ndim - 1) continue;
      args.rows *= p.shape[d];
      apart = apart && (p.shape[d] == 1 || args.ts[d] != 0);
    }
    for (int k = 0; k < 1 + 2 * p.terms; ++k) {
      const int number = p.constants[std::size_t(k)];
      if (number >= 0) args.c[k] = program.constants[std::size_t(number)].data + p.offsets[std::size_t(k)];
    }
    args.alpha = T(op.alpha);
    args.source = source(op);
    args.target = target(op);
    const unsigned warps = apart ? kThreads / 32 : 1;
    launch(project<T>, apart ? std::min(blocks_for(args.rows, warps), 1u << 20) : 1u, 32 * warps, 0, stream, args);
  }
};

}  // namespace

template <class T>
void run(const Bound<T>& program, const Schedule& schedule, Direction direction, const Memory<T>& memory, Stream stream) {
  const Runner<T> one{program, direction, memory, stream};
  for (const Launch& l : schedule.launches) one(l);
}

template <class T>
void evaluate(int function, index count, const void* x, bool x_is_float, T* out, Stream stream) {
  const unsigned blocks = std::min(blocks_for(count, kThreads), 1u << 16);
  if (x_is_float)
    launch(evaluate_kernel<T, float>, blocks, kThreads, 0, stream, function, count, static_cast<const float*>(x), out);
  else
    launch(evaluate_kernel<T, T>, blocks, kThreads, 0, stream, function, count, static_cast<const T*>(x), out);
}

template <class T>
void small_product(const Product& p, T alpha, const T* left, const T* right, T* out, bool overwrite, Stream stream) {
  ProductArgs<T> args{p, overwrite, p.outer > 1 && p.out.outer == 0, p.batch > 1 && p.out.batch == 0,
                      blocks_for(p.m, kTile), blocks_for(p.n, kTile), alpha, left, right, out};
  const index batches = (args.sums_outer ? 1 : p.outer) * (args.sums_batch ? 1 : p.batch);
  launch(tile_product<T>, blocks_for(batches * args.tiles_m * args.tiles_n, 1), kThreads, 0, stream, args);
}

#define PGDFAST_INSTANTIATE(T)                                                                              \
  template void run<T>(const Bound<T>&, const Schedule&, Direction, const Memory<T>&, Stream);              \
  template void evaluate<T>(int, index, const void*, bool, T*, Stream);                                     \
  template void small_product<T>(const Product&, T, const T*, const T*, T*, bool, Stream);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast::cuda
