#include "sweep.h"

#include <algorithm>
#include <cstring>

#include "../plan/blas.h"
#include "../plan/cut.h"
#include "parallel.h"
#include "simd.h"

namespace pgdfast {
namespace {

// Multiply-adds from which a second thread saves much more than the microseconds it takes to start, or the milliseconds
// that it may take on a busy machine.
constexpr index kParallelWork = 1 << 18;
constexpr index kSparseRows = 16, kSparseSize = 1 << 12;   // products worth a look whether most of the constant is zero
constexpr index kSmallProduct = 1 << 13;       // multiply-adds below which a call of the BLAS costs more than it saves

// Offsets of the rows of a strided index space, one after the other: dimensions before the last, for several operands.
template <int operands>
struct Rows {
  int ndim;
  const index* shape;
  const index* strides[operands];

  template <class F>
  void each(index begin, index end, F&& body) const {
    for (index i = begin; i < end; ++i) {
      index rest = i, offset[operands] = {};
      for (int d = ndim - 1; d >= 0; --d) {
        const index id = rest % shape[d];
        rest /= shape[d];
        for (int k = 0; k < operands; ++k) offset[k] += id * strides[k][d];
      }
      body(offset);
    }
  }
};

index product(int ndim, const index* shape) {
  index count = 1;
  for (int d = 0; d < ndim; ++d) count *= shape[d];
  return count;
}

// One muladd with source and target given explicitly, so that the adjoint is the same code with the two exchanged.
template <class T>
void run_muladd(const MulAdd& op, T alpha, const T* c, const T* source, const index* ss, T* target, const index* ts,
                bool overwrite) {
  const Simd<T>& body = simd<T>();
  const index *shape = op.shape.data(), *cs = op.cs.data();
  if (op.ndim == 0) {
    body.muladd(1, alpha, c, 0, source, 0, target, 1, overwrite);
    return;
  }
  // Split where the target moves: the outermost such dimension.
  int split = 0;
  while (split < op.ndim && (ts[split] == 0 || shape[split] == 1)) ++split;
  const bool worth = split < op.ndim && product(op.ndim, shape) > kParallelWork;
  const int last = op.ndim - 1;
  in_parts(worth ? shape[split] : 1, worth, [&](index begin, index end) {
    std::array<index, kMaxDims> part = op.shape;
    index so = 0, to = 0, co = 0;
    if (worth) {
      part[std::size_t(split)] = end - begin;
      so = begin * ss[split];
      to = begin * ts[split];
      co = begin * cs[split];
    }
    const Rows<3> rows{last, part.data(), {ss, ts, cs}};
    rows.each(0, product(last, part.data()), [&](const index* at) {
      body.muladd(part[std::size_t(last)], alpha, c ? c + co + at[2] : nullptr, cs[last], source + so + at[0], ss[last],
                  target + to + at[1], ts[last], overwrite);
    });
  });
}

// A strided stack of matrices.
template <class T>
struct Stack {
  T* data;
  index outer, batch, row, column;
  T* at(index i, index batches) const { return data + i / batches * outer + i % batches * batch; }
};

// Whether at most a tenth of a matrix is not zero, by a sample: one-hot inputs.
template <class T>
bool mostly_zero(index rows, index columns, const T* b, index row, index column) {
  constexpr index kSample = 256;
  const index size = rows * columns;
  index found = 0;
  for (index s = 0; s < kSample; ++s) {
    const index i = s * size / kSample;
    found += b[i / columns * row + i % columns * column] != T(0);
  }
  return found <= kSample / 10;
}

// The same as gemm by the elements of b that are not zero: c[:, j] += alpha b[p, j] a[:, p].
template <class T>
void gemm_nonzero(index m, index n, index k, T alpha, const T* a, index a_row, index a_col, const T* b, index b_row,
                  index b_col, T* c, index c_row, index c_col, bool overwrite) {
  static thread_local std::vector<T> packed, sums;   // grown where an exception is caught: see parallel.h
  const Simd<T>& body = simd<T>();
  const T* from = a;
  index from_col = a_col, to_col = c_col;
  if (a_row != 1) {
    packed.resize(std::size_t(m * k));
    for (index p = 0; p < k; ++p)
      for (index i = 0; i < m; ++i) packed[std::size_t(p * m + i)] = a[i * a_row + p * a_col];
    from = packed.data();
    from_col = m;
  }
  T* to = c;
  if (c_row != 1) {
    sums.assign(std::size_t(m * n), T(0));
    to = sums.data();
    to_col = m;
  } else if (overwrite) {
    for (index j = 0; j < n; ++j) std::fill(c + j * c_col, c + j * c_col + m, T(0));
  }
  const auto add = [&](index p, index j) {
    const T value = b[p * b_row + j * b_col];
    if (value != T(0)) body.muladd(m, alpha * value, nullptr, 0, from + p * from_col, 1, to + j * to_col, 1, false);
  };
  if (b_row <= b_col) {   // along the memory of b
    for (index j = 0; j < n; ++j)
      for (index p = 0; p < k; ++p) add(p, j);
  } else {
    for (index p = 0; p < k; ++p)
      for (index j = 0; j < n; ++j) add(p, j);
  }
  if (to == c) return;
  for (index i = 0; i < m; ++i)
    for (index j = 0; j < n; ++j) {
      T& out = c[i * c_row + j * c_col];
      out = (overwrite ? T(0) : out) + to[j * m + i];
    }
}

// out[b] (+)= alpha * left[b] @ right[b], (m, k) @ (k, n); right is constant.
template <class T>
void multiply(index outer, index batches, index m, index n, index k, T alpha, const Stack<const T>& left,
              const Stack<const T>& right, const Stack<T>& out, bool overwrite) {
  const bool small = m * n * k <= kSmallProduct && outer * batches > 1;
  const bool sparse = !small && m >= kSparseRows && n * k >= kSparseSize && outer * batches == 1 &&
                      mostly_zero(k, n, right.at(0, batches), right.row, right.column);
  const auto one = [&](index i) {
    const T *a = left.at(i, batches), *b = right.at(i, batches);
    T* c = out.at(i, batches);
    if (small)
      simd<T>().small_gemm(m, n, k, alpha, a, left.row, left.column, b, right.row, right.column, c, out.row, out.column,
                           overwrite);
    else if (sparse)
      gemm_nonzero<T>(m, n, k, alpha, a, left.row, left.column, b, right.row, right.column, c, out.row, out.column, overwrite);
    else
      gemm<T>(m, n, k, alpha, a, left.row, left.column, b, right.row, right.column, T(overwrite ? 0 : 1), c, out.row,
              out.column);
  };
  // A stack is split by its matrices, each then on one thread.
  const bool apart = (outer == 1 || out.outer != 0) && (batches == 1 || out.batch != 0);
  const index count = outer * batches;
  if (count >= thread_limit() && count > 1 && apart) {
    in_parts(count, count * m * n * k >= kParallelWork, [&](index begin, index end) {
      const BlasThreads inside(1);
      for (index i = begin; i < end; ++i) one(i);
    });
    return;
  }
  for (index i = 0; i < count; ++i) one(i);
}

template <class T>
void run_matmul(const MatMul& g, T alpha, const T* c, const T* x, T* y, bool overwrite) {
  multiply<T>(g.outer, g.b, g.m, g.n, g.k, alpha, {x, g.xo, g.xb, g.xm, g.xk}, {c, g.co, g.cb, g.ck, g.cn},
              {y, g.yo, g.yb, g.ym, g.yn}, overwrite);
}

template <class T>
void run_matmul_adjoint(const MatMul& g, T alpha, const T* c, const T* y, T* x, bool overwrite) {
  if (g.n == 1 && g.xk == 1 && g.outer == 1) {   // an outer product, row by row: what a BLAS does slowly
    for (index b = 0; b < g.b; ++b)
      for (index m = 0; m < g.m; ++m)
        simd<T>().muladd(g.k, alpha * y[b * g.yb + m * g.ym], nullptr, 0, c + b * g.cb, g.ck, x + b * g.xb + m * g.xm, 1,
                         overwrite);
    return;
  }
  multiply<T>(g.outer, g.b, g.m, g.k, g.n, alpha, {y, g.yo, g.yb, g.ym, g.yn}, {c, g.co, g.cb, g.cn, g.ck},
              {x, g.xo, g.xb, g.xm, g.xk}, overwrite);
}

template <class T>
void run_gather(const Gather& g, T alpha, const index* positions, const T* x, T* y, bool overwrite) {
  const Simd<T>& body = simd<T>();
  in_parts(g.rows, g.rows * g.width > kParallelWork, [&](index begin, index end) {
    for (index i = begin; i < end; ++i) {
      T* row = y + i * g.y_row;
      if (positions[i] >= 0) body.muladd(g.width, alpha, nullptr, 0, x + positions[i] * g.x_row, 1, row, 1, overwrite);
      else if (overwrite) std::fill(row, row + g.width, T(0));
    }
  });
}

// Rows may meet in one row of x: threads take columns each, so that sums keep their order.
template <class T>
void run_gather_adjoint(const Gather& g, T alpha, const index* positions, const T* y, T* x) {
  const Simd<T>& body = simd<T>();
  in_parts(g.width, g.width >= 32 && g.rows * g.width > kParallelWork, [&](index begin, index end) {
    for (index i = 0; i < g.rows; ++i)
      if (positions[i] >= 0)
        body.muladd(end - begin, alpha, nullptr, 0, y + i * g.y_row + begin, 1, x + positions[i] * g.x_row + begin, 1, false);
  });
}

// In the adjoint the scale comes first and each term's l and r change places.
template <class T>
void run_project(const Project& p, T alpha, const std::vector<Constant<T>>& constants, bool adjoint, const T* source,
                 const index* ss, T* target, const index* ts, bool overwrite) {
  constexpr int kOperands = 1 + 2 * kMaxTerms;
  const int last = p.ndim - 1, among = std::max(last - 1, 0), operands = 1 + 2 * p.terms;   // `among`: the innermost rows
  const index n = p.shape[std::size_t(last)], inner = last > 0 ? p.shape[std::size_t(among)] : 1;
  const index outer = product(among, p.shape.data());
  Coefficients<T> base[kOperands];
  Rows<2 + kOperands> walk{among, p.shape.data(), {ss, ts}};
  for (int k = 0; k < kOperands; ++k) {
    const auto& strides = p.cs[std::size_t(k)];
    walk.strides[2 + k] = strides.data();
    const int number = k < operands ? p.constants[std::size_t(k)] : -1;
    if (number < 0) continue;
    base[k] = {constants[std::size_t(number)].data + p.offsets[std::size_t(k)], last > 0 ? strides[std::size_t(among)] : 0,
               strides[std::size_t(last)]};
  }
  const Coefficients<T> x{source, last > 0 ? ss[among] : 0, ss[last]};
  const index y_row = last > 0 ? ts[among] : 0;
  const auto run = [&](index from, index to, const index* at) {   // inner rows [from, to)
    const auto moved = [&](Coefficients<T> c, index offset) {
      if (c.data) c.data += offset + from * c.row;
      return c;
    };
    Coefficients<T> c[kOperands], left[kMaxTerms], right[kMaxTerms];
    for (int k = 0; k < operands; ++k) c[k] = moved(base[k], at[2 + k]);
    for (int t = 0; t < p.terms; ++t) {
      left[t] = c[1 + 2 * t + adjoint];
      right[t] = c[2 + 2 * t - adjoint];
    }
    const Coefficients<T> ones;
    simd<T>().project(to - from, n, alpha, p.terms, adjoint ? c[0] : ones, adjoint ? ones : c[0], left, right,
                      moved(x, at[0]), target + at[1] + from * y_row, y_row, ts[last], overwrite);
  };
  const bool worth = outer * inner * n * (1 + 2 * p.terms) >= kParallelWork, apart = outer >= thread_limit();
  in_parts(apart ? outer : 1, worth && apart, [&](index begin, index end) {
    walk.each(begin, apart ? end : outer, [&](const index* at) {
      in_parts(inner, worth && !apart, [&](index from, index to) { run(from, to, at); });
    });
  });
}

template <class T>
struct Operands {
  T alpha;
  const T* c;
  const index* positions = nullptr;
};

template <class T>
Operands<T> operands(const Bound<T>& program, const Instruction& op) {
  if (op.constant < 0) return {T(op.alpha), nullptr};
  const Constant<T>& constant = program.constants[std::size_t(op.constant)];
  if (constant.positions) return {T(op.alpha), nullptr, constant.positions + op.c_offset};
  if (constant.data == nullptr) return {T(op.alpha) * constant.value, nullptr};
  return {T(op.alpha), constant.data + op.c_offset};
}

// The three memories a buffer can live in.
template <class T>
struct Memory {
  T *v, *u, *arena;
  T* at(const Buffer& buffer) const {
    T* base = buffer.role == Role::parameter ? v : buffer.role == Role::residual ? u : arena;
    return base + buffer.offset;
  }
};

// Which instructions of the adjoint sweep to run: those that write intermediate results, those that write parameters.
enum class Part { inner, uses, all };

template <class T>
void clear(const Structure& s, const std::vector<char>& marked, const Memory<T>& memory, Part part) {
  for (std::size_t i = 0; i < s.buffers.size(); ++i) {
    if (!marked[i] || part == (s.buffers[i].role == Role::parameter ? Part::inner : Part::uses)) continue;
    std::memset(memory.at(s.buffers[i]), 0, sizeof(T) * std::size_t(s.buffers[i].size));
  }
}

// One instruction in the forward direction.
template <class T>
void forward(const Bound<T>& program, const Memory<T>& memory, const Instruction& op) {
  const Structure& s = *program.structure;
  const T* from = memory.at(s.buffers[std::size_t(op.x)]) + op.x_offset;
  T* to = memory.at(s.buffers[std::size_t(op.y)]) + op.y_offset;
  const Operands<T> o = operands(program, op);
  switch (op.kind) {
    case Kind::muladd:
      run_muladd(op.muladd, o.alpha, o.c, from, op.muladd.xs.data(), to, op.muladd.ys.data(), op.overwrite_y);
      break;
    case Kind::matmul:
      run_matmul(op.matmul, o.alpha, o.c, from, to, op.overwrite_y);
      break;
    case Kind::gather:
      run_gather(op.gather, o.alpha, o.positions, from, to, op.overwrite_y);
      break;
    case Kind::project:
      run_project(op.project, o.alpha, program.constants, false, from, op.project.xs.data(), to, op.project.ys.data(),
                  op.overwrite_y);
      break;
  }
}

// The same backward, cotangents of y to those of x.
template <class T>
void backward(const Bound<T>& program, const Memory<T>& memory, const Instruction& op) {
  const Structure& s = *program.structure;
  const T* from = memory.at(s.buffers[std::size_t(op.y)]) + op.y_offset;
  T* to = memory.at(s.buffers[std::size_t(op.x)]) + op.x_offset;
  const Operands<T> o = operands(program, op);
  switch (op.kind) {
    case Kind::muladd:
      run_muladd(op.muladd, o.alpha, o.c, from, op.muladd.ys.data(), to, op.muladd.xs.data(), op.overwrite_x);
      break;
    case Kind::matmul:
      run_matmul_adjoint(op.matmul, o.alpha, o.c, from, to, op.overwrite_x);
      break;
    case Kind::gather:
      run_gather_adjoint(op.gather, o.alpha, o.positions, from, to);
      break;
    case Kind::project:
      run_project(op.project, o.alpha, program.constants, true, from, op.project.ys.data(), to, op.project.xs.data(),
                  op.overwrite_x);
      break;
  }
}

constexpr index kLargeWeight = 1 << 23;   // bytes of a weight that is better read once, by a product on all threads
constexpr index kCache = 1 << 20;   // bytes of a few rows' buffers and constants that stay in the second-level cache

// Rows of a component to take at once: few enough for the cache, many enough for products with its largest weight, which
// are packed anew for every piece; and pieces for all threads.
template <class T>
index pieces_of(const Component& part, int threads) {
  if (part.rows == 1) return 1;
  const index cached = kCache / std::max<index>(2 * part.row_elements * index(sizeof(T)), 1);
  const index least = std::clamp<index>(part.largest_weight * index(sizeof(T)) / 4096, 16, 512);
  const index pieces = (part.rows - 1) / std::max(cached, least) + 1;
  if (part.largest_weight * index(sizeof(T)) >= kLargeWeight) return pieces;
  return std::min(part.rows, (pieces + threads - 1) / threads * threads);
}

// Runs body(instruction) for all instructions, a few rows at a time.
template <class T, class F>
void by_rows(const Structure& s, bool reversed, F&& body) {
  struct Job {
    const Component* part;
    index begin, end;
  };
  std::vector<Job> jobs;
  const int threads = threads_for(s.flops);
  for (const Component& part : s.parts) {
    const index pieces = pieces_of<T>(part, part.flops < 0.1 * s.flops ? 1 : threads);
    for (index i = 0; i < pieces; ++i) jobs.push_back({&part, part.rows * i / pieces, part.rows * (i + 1) / pieces});
  }
  // One large product at a time is left to the threads of the BLAS.
  const bool apart = jobs.size() >= std::size_t(threads) && threads > 1;
  BlasThreads outside(apart ? 1 : threads_for(s.largest));
  each_item(apart ? threads : 1, index(jobs.size()), [&](index number, int) {
    const BlasThreads inside(apart ? 1 : threads_for(s.largest));
    const Job& job = jobs[std::size_t(number)];
    const bool whole = job.end - job.begin == job.part->rows;
    const std::size_t count = job.part->cuts.size();
    for (std::size_t i = 0; i < count; ++i) {
      const RowCut& cut = job.part->cuts[reversed ? count - 1 - i : i];
      const Instruction& op = s.instructions[std::size_t(cut.instruction)];
      if (whole) body(op);
      else body(restricted(op, cut, job.begin, job.end));
    }
  });
}

// The cotangents of the residuals, times the row scale where there is one.
template <class T>
const T* scaled_rows(const Bound<T>& program, const T* u) {
  if (program.row_scale == nullptr) return u;
  static thread_local std::vector<T> scaled;   // grown where an exception is caught: see parallel.h
  const index count = program.structure->num_residuals;
  ensure(scaled, count);
  for (index e = 0; e < count; ++e) scaled[std::size_t(e)] = program.row_scale[e] * u[e];
  return scaled.data();
}

template <class T>
void adjoint(const Bound<T>& program, const Memory<T>& memory, Part part) {
  const Structure& s = *program.structure;
  clear(s, s.zero_adjoint, memory, part);
  const auto uses_parameter = [&](const Instruction& op) { return s.buffers[std::size_t(op.x)].role == Role::parameter; };
  if (part != Part::uses)
    by_rows<T>(s, true, [&](const Instruction& op) {
      if (!uses_parameter(op)) backward(program, memory, op);
    });
  if (part == Part::inner) return;
  BlasThreads threads(threads_for(s.largest));   // these sum over all rows
  for (std::size_t i = s.instructions.size(); i-- > 0;)
    if (uses_parameter(s.instructions[i])) backward(program, memory, s.instructions[i]);
}

}  // namespace

template <class T>
void jvp(const Bound<T>& program, const T* v, T* u, T* arena) {
  const Structure& s = *program.structure;
  const Memory<T> memory{const_cast<T*>(v), u, arena};   // parameters are only read in this direction
  clear(s, s.zero_forward, memory, Part::inner);
  by_rows<T>(s, false, [&](const Instruction& op) { forward(program, memory, op); });
  if (program.row_scale)
    for (index e = 0; e < s.num_residuals; ++e) u[e] *= program.row_scale[e];
}

template <class T>
void vjp(const Bound<T>& program, const T* u, T* v, T* arena) {
  adjoint(program, Memory<T>{v, const_cast<T*>(scaled_rows(program, u)), arena}, Part::all);
}

template <class T>
void adjoint_to_uses(const Bound<T>& program, const T* u, T* arena) {
  adjoint(program, Memory<T>{nullptr, const_cast<T*>(scaled_rows(program, u)), arena}, Part::inner);
}

template <class T>
void adjoint_from_uses(const Bound<T>& program, T* v, T* arena) {
  adjoint(program, Memory<T>{v, nullptr, arena}, Part::uses);
}

#define PGDFAST_INSTANTIATE(T)                                       \
  template void jvp<T>(const Bound<T>&, const T*, T*, T*);           \
  template void vjp<T>(const Bound<T>&, const T*, T*, T*);           \
  template void adjoint_to_uses<T>(const Bound<T>&, const T*, T*);   \
  template void adjoint_from_uses<T>(const Bound<T>&, T*, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
