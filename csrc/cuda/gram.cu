#include "gram.h"

#include <algorithm>

namespace pgdfast::cuda {
namespace {

// --- packing --------------------------------------------------------------------------------------------------------------

template <class T>
struct PackArgs {
  Pack p;
  const T* x;
  index row, column, output;   // strides of x; output: from arena to arena
  T* out;
};

// out[d][o * rows + i] = x[o, i, d] for rows of the use, zero for others and in the padding.
template <class T>
__global__ void pack(PackArgs<T> args) {
  const Pack& p = args.p;
  for (index item = blockIdx.x * index(blockDim.x) + threadIdx.x; item < p.padded * p.ld; item += index(gridDim.x) * blockDim.x) {
    const index at = item % p.ld, d = item / p.ld, o = at / p.rows, i = at % p.rows;
    const bool there = d < p.depth && o < p.outputs && i >= p.begin && i < p.end;
    args.out[item] = there ? args.x[o * args.output + (i - p.begin) * args.row + d * args.column] : T(0);
  }
}

// --- explicit rows --------------------------------------------------------------------------------------------------------

template <class T>
struct RowArgs {
  RowUse use;
  index rows, outputs, output, arena;
  bool rows_first;      // neighbouring threads take neighbouring rows, else lanes
  const index* table;
  index row_at, row_step;
  const T *y, *c;
  const index* positions;
  const T* weight;      // of the parameter: its root scales the columns; null: none
  T alpha;
  T* J;
};

// J[row, x + k xk] += alpha y c over the entries of a row, in their order; one thread per row and lane, so that none meet.
template <class T>
__global__ void add_rows(RowArgs<T> args) {
  const RowUse& u = args.use;
  const T alpha = args.weight ? args.alpha * sqrt(*args.weight) : args.alpha;
  for (index item = blockIdx.x * index(blockDim.x) + threadIdx.x; item < args.rows * u.lanes;
       item += index(gridDim.x) * blockDim.x) {
    const index row = args.rows_first ? item % args.rows : item / u.lanes, k = args.rows_first ? item / args.rows : item % u.lanes;
    const index place = row * args.outputs + args.output, at = args.table[args.row_at + place];
    if (at < 0) continue;
    const index step = args.table[args.row_step + place];
    const index begin = args.table[u.starts + row], end = args.table[u.starts + row + 1];
    for (index e = begin; e < end; ++e) {
      const index* entry = args.table + u.entries + 3 * e;
      index x = entry[1] + k * u.xk;
      T value = alpha * args.y[entry[0]];
      if (u.gathers) {
        const index from = args.positions[entry[2]];
        if (from < 0) continue;
        x += from * u.x_row;
      } else if (args.c) {
        value *= args.c[entry[2] + k * u.ck];
      }
      args.J[at + (u.offset + x) * step] += value;
    }
  }
}

template <class T>
void add_all(const Bound<T>& program, const RowLayout& layout, const RowTable& rows, const index* table, const T* arenas,
             const T* weights, bool rows_first, T* J, Stream stream) {
  const Structure& s = *program.structure;
  for (const RowUse& row_use : rows.uses) {
    const Use& use = layout.uses[std::size_t(row_use.use)];
    const Instruction& op = s.instructions[std::size_t(use.instruction)];
    const Coefficient<T> c = coefficient(program, op);
    for (index o = 0; o < layout.max_outputs; ++o) {
      RowArgs<T> args{row_use, layout.num_rows, layout.max_outputs, o, s.arena_size, rows_first, table, rows.row_at,
                      rows.row_step, arenas + o * s.arena_size + s.buffers[std::size_t(op.y)].offset + op.y_offset, c.data,
                      c.positions, weights ? weights + use.parameter : nullptr, c.alpha, J};
      const index items = layout.num_rows * row_use.lanes;
      launch(add_rows<T>, std::min(blocks_for(items, kThreads), 1u << 20), kThreads, 0, stream, args);
    }
  }
}

// --- tiles of K -----------------------------------------------------------------------------------------------------------

constexpr int kStages = 3;   // steps of a product in shared memory: one in use, two on their way

template <class T, int R>
struct Shape {
  static constexpr int tile = 16 * R, depth = int(kGramDepth);
  static constexpr int vector = R < int(16 / sizeof(T)) ? R : int(16 / sizeof(T));   // elements of one shared-memory read
  static constexpr std::size_t stage = std::size_t(depth) * tile, bytes = 2 * kStages * stage * sizeof(T);
};

template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

// The R rows or columns of thread t lie in pieces of one vector, 16 vectors apart, so that a warp reads without conflicts.
template <class T, int R>
__device__ __forceinline__ int position(int t, int e) {
  constexpr int V = Shape<T, R>::vector;
  return e / V * 16 * V + t * V + e % V;
}

template <class T, int R>
__device__ __forceinline__ void fragment(const T* line, int t, T (&out)[R]) {
  constexpr int V = Shape<T, R>::vector;
#pragma unroll
  for (int piece = 0; piece < R / V; ++piece) {
    const Vector<T, V> read = *reinterpret_cast<const Vector<T, V>*>(line + piece * 16 * V + t * V);
#pragma unroll
    for (int v = 0; v < V; ++v) out[piece * V + v] = read.at[v];
  }
}

// acc = left^T right over `depth`, for panels [depth][ld]: three stages of shared memory, filled by asynchronous copies.
template <class T, int R>
__device__ __forceinline__ void tile_of(const T* left, index left_ld, const T* right, index right_ld, index depth, T* shared,
                                        T (&acc)[R][R]) {
  using S = Shape<T, R>;
  const int thread = int(threadIdx.x), tx = thread % 16, ty = thread / 16;
  const auto fetch = [&](index step) {
    T* to = shared + step % kStages * 2 * S::stage;
    constexpr int per_line = S::tile * int(sizeof(T)) / 16, elements = 16 / int(sizeof(T));
    for (int i = thread; i < S::depth * per_line; i += int(kThreads)) {
      const int line = i / per_line, at = i % per_line * elements;
      copy_async(to + line * S::tile + at, left + (step * S::depth + line) * left_ld + at);
      copy_async(to + S::stage + line * S::tile + at, right + (step * S::depth + line) * right_ld + at);
    }
  };
  const index steps = depth / S::depth;
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) acc[i][j] = 0;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    commit_copies();
  }
  for (index step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();   // the step is there for all, and all are done with the one whose place is filled next
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    commit_copies();
    const T* from = shared + step % kStages * 2 * S::stage;
#pragma unroll
    for (int d = 0; d < S::depth; ++d) {
      T a[R], b[R];
      fragment<T, R>(from + d * S::tile, ty, a);
      fragment<T, R>(from + S::stage + d * S::tile, tx, b);
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < R; ++j) acc[i][j] += a[i] * b[j];
    }
  }
  __syncthreads();
}

// One tile of K: both products of every pair of uses in registers, their elementwise product summed there, K written once.
template <class T, int R>
__global__ void __launch_bounds__(256, 1)
gram_tiles(const GramTile* tiles, const GramPair* pairs, const index* order, const T* packed, const T* weights, T* K, index M) {
  PGDFAST_DYNAMIC_SHARED(raw);
  T* shared = reinterpret_cast<T*>(raw);
  const GramTile tile = tiles[blockIdx.x];
  T sum[R][R] = {};
  for (index number = tile.first_pair; number < tile.first_pair + tile.pairs; ++number) {
    const GramPair pair = pairs[number];
    T first[R][R];
    tile_of<T, R>(packed + pair.left1 + tile.row, tile.row_ld, packed + pair.right1 + tile.column, tile.column_ld, pair.depth1,
                  shared, first);
    if (pair.depth2 == 0) {
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < R; ++j) sum[i][j] += first[i][j];
      continue;
    }
    T second[R][R];
    tile_of<T, R>(packed + pair.left2 + tile.row, tile.row_ld, packed + pair.right2 + tile.column, tile.column_ld, pair.depth2,
                  shared, second);
    const T weight = weights[pair.parameter], shift = pair.fused_bias >= 0 ? weights[pair.fused_bias] : T(0);
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < R; ++j) sum[i][j] += (weight * first[i][j] + shift) * second[i][j];
  }
  const int tx = int(threadIdx.x) % 16, ty = int(threadIdx.x) / 16;
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const index a = tile.row + position<T, R>(ty, i), b = tile.column + position<T, R>(tx, j);
      if (a >= tile.row_count || b >= tile.column_count || tile.row_base + a > tile.column_base + b) continue;
      const index p = order[tile.row_base + a], q = order[tile.column_base + b];
      K[p * M + q] = sum[i][j];
      K[q * M + p] = sum[i][j];
    }
}

template <class T>
__global__ void unit_kernel(const index* output_of, index output, index count, T* u) {
  for (index e = blockIdx.x * index(blockDim.x) + threadIdx.x; e < count; e += index(gridDim.x) * blockDim.x)
    u[e] = output_of[e] == output;
}

template <class T>
__global__ void squares_kernel(index rows, index columns, const T* J, T* d) {
  for (index j = blockIdx.x * index(blockDim.x) + threadIdx.x; j < columns; j += index(gridDim.x) * blockDim.x) {
    T sum = 0;
    for (index i = 0; i < rows; ++i) sum += J[i * columns + j] * J[i * columns + j];
    d[j] = sum;
  }
}

template <class T, int R>
void launch_tiles(const GramPlan& plan, const index* table, const T* packed, const T* weights, T* K, index M, Stream stream) {
  constexpr std::size_t bytes = Shape<T, R>::bytes;
  allow_shared(gram_tiles<T, R>, bytes);
  launch(gram_tiles<T, R>, unsigned(plan.num_tiles), kThreads, bytes, stream,
         reinterpret_cast<const GramTile*>(table + plan.tiles), reinterpret_cast<const GramPair*>(table + plan.pairs),
         table + plan.order, packed, weights, K, M);
}

}  // namespace

template <class T>
void unit(const index* output_of, index output, index count, T* u, Stream stream) {
  launch(unit_kernel<T>, blocks_for(count, kThreads), kThreads, 0, stream, output_of, output, count, u);
}

template <class T>
void gram(const Bound<T>& program, const RowLayout& layout, const GramPlan& plan, const index* table, const T* arenas,
          const T* weights, T* packed, T* K, Stream stream) {
  const Structure& s = *program.structure;
  for (const Pack& p : plan.packs) {
    const Use& use = layout.uses[std::size_t(p.use)];
    const Instruction& op = s.instructions[std::size_t(use.instruction)];
    const MatMul& g = op.matmul;
    PackArgs<T> args{p, nullptr, 0, 0, 0, packed + p.out};
    if (p.constants) {
      args.x = program.constants[std::size_t(op.constant)].data + op.c_offset + p.first * g.cn;
      args.row = g.cn, args.column = g.ck;
    } else {
      args.x = arenas + p.first_output * s.arena_size + s.buffers[std::size_t(op.y)].offset + op.y_offset + p.first * g.yn;
      args.row = g.yn, args.column = g.ym, args.output = s.arena_size;
    }
    launch(pack<T>, std::min(blocks_for(p.padded * p.ld, kThreads), 1u << 16), kThreads, 0, stream, args);
  }
  if (!plan.rows.uses.empty()) {
    clear(packed + plan.explicit_begin, sizeof(T) * std::size_t(plan.packed - plan.explicit_begin), stream);
    add_all(program, layout, plan.rows, table, arenas, weights, true, packed, stream);
  }
  const index M = s.num_residuals;
  const int rows = plan.tile / 16;
  if (rows == 2) return launch_tiles<T, 2>(plan, table, packed, weights, K, M, stream);
  if constexpr (sizeof(T) == 4) return launch_tiles<T, 8>(plan, table, packed, weights, K, M, stream);
  else return launch_tiles<T, 4>(plan, table, packed, weights, K, M, stream);
}

template <class T>
void dense_rows(const Bound<T>& program, const RowLayout& layout, const DensePlan& plan, const index* table, const T* arenas,
                T* J, Stream stream) {
  const Structure& s = *program.structure;
  clear(J, sizeof(T) * std::size_t(s.num_residuals * s.num_parameters), stream);
  add_all(program, layout, plan.rows, table, arenas, static_cast<const T*>(nullptr), false, J, stream);
}

template <class T>
void squares(index rows, index columns, const T* J, T* d, Stream stream) {
  launch(squares_kernel<T>, blocks_for(columns, kThreads), kThreads, 0, stream, rows, columns, J, d);
}

#define PGDFAST_INSTANTIATE(T)                                                                                            \
  template void unit<T>(const index*, index, index, T*, Stream);                                                          \
  template void gram<T>(const Bound<T>&, const RowLayout&, const GramPlan&, const index*, const T*, const T*, T*, T*,     \
                        Stream);                                                                                          \
  template void dense_rows<T>(const Bound<T>&, const RowLayout&, const DensePlan&, const index*, const T*, T*, Stream);   \
  template void squares<T>(index, index, const T*, T*, Stream);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast::cuda
