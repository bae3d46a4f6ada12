#include "rows.h"

#include <algorithm>
#include <cstring>

#include "../plan/blas.h"
#include "../plan/limits.h"
#include "parallel.h"
#include "simd.h"

namespace pgdfast {
namespace {

constexpr index kLongRow = 8;   // elements next to each other from which on a loop along them is the faster one

}  // namespace

template <class T>
void unit_sweeps(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work) {
  const Structure& s = *program.structure;
  if (work.unit_cotangents_valid) return;
  ensure(work.arenas, s.arena_size * layout.max_outputs);
  ensure(work.unit, s.num_residuals);
  for (index o = 0; o < layout.max_outputs; ++o) {
    for (index e = 0; e < s.num_residuals; ++e) work.unit[std::size_t(e)] = layout.output_of[std::size_t(e)] == o;
    adjoint_to_uses(program, work.unit.data(), work.arenas.data() + o * s.arena_size);
  }
}

template <class T>
void add_rows(const Bound<T>& program, const RowLayout& layout, const Use& use, const Instruction& op, const T* arena,
              const std::vector<index>& row_index, index output, T* J, index ld, Folding columns) {
  const Structure& s = *program.structure;
  const Simd<T>& body = simd<T>();
  const std::int32_t* label = layout.labels[std::size_t(op.y)].data() + op.y_offset;
  const T* y = cotangent(s, op, arena);
  const auto row_of = [&](index y_position) -> T* {
    const std::int32_t row = label[y_position];
    if (row < 0) return nullptr;
    const index k = row_index[std::size_t(row * layout.max_outputs + output)];
    return k < 0 ? nullptr : J + k * ld + columns.offset(op.x_offset);
  };
  const T* c = nullptr;
  T alpha = T(op.alpha);
  if (op.constant >= 0) {
    const Constant<T>& constant = program.constants[std::size_t(op.constant)];
    if (constant.data) c = constant.data + op.c_offset;
    else if (constant.positions == nullptr) alpha *= constant.value;
  }
  if (op.kind == Kind::matmul) {
    // J[x(b, m, k)] += alpha * y[b, m, n] * c[b, k, n]
    const MatMul& g = op.matmul;
    const index xb = columns.stride(g.xb), xm = columns.stride(g.xm), xk = columns.stride(g.xk);
    for (index b = 0; b < g.b; ++b)
      for (index n = 0; n < g.n; ++n) {
        const T* cn = c + b * g.cb + n * g.cn;
        const T* yn = y + b * g.yb + n * g.yn;
        if (use.row_per_n && xk == 1 && g.ck == 1 && g.k >= kLongRow) {
          if (T* row = row_of(b * g.yb + n * g.yn))
            body.small_gemm(g.m, g.k, 1, alpha, yn, g.ym, 1, cn, 1, 1, row + b * xb, xm, 1, false);
          continue;
        }
        if (use.row_per_n && g.m > g.k) {
          T* row = row_of(b * g.yb + n * g.yn);
          for (index k = 0; row && k < g.k; ++k)
            body.muladd(g.m, alpha * cn[k * g.ck], nullptr, 0, yn, g.ym, row + b * xb + k * xk, xm, false);
          continue;
        }
        for (index m = 0; m < g.m; ++m) {
          T* row = row_of(b * g.yb + m * g.ym + n * g.yn);
          if (row)
            body.muladd(g.k, alpha * yn[m * g.ym], nullptr, 0, cn, g.ck, row + b * xb + m * xm, xk, false);
        }
      }
    return;
  }
  if (op.kind == Kind::gather) {
    // J[x(p[i], :)] += alpha * y[i, :]
    const Gather& g = op.gather;
    const index* positions = program.constants[std::size_t(op.constant)].positions;
    for (index i = 0; i < g.rows; ++i) {
      if (positions[i] < 0) continue;
      const index at = positions[i] * g.x_row;
      if (use.row_per_n) {
        if (T* row = row_of(i * g.y_row))
          body.muladd(g.width, alpha, nullptr, 0, y + i * g.y_row, 1, row + at, 1, false);
        continue;
      }
      for (index j = 0; j < g.width; ++j)
        if (T* row = row_of(i * g.y_row + j)) row[at + j] += alpha * y[i * g.y_row + j];
    }
    return;
  }
  // J[x(i)] += alpha * c[i] * y[i], over the innermost index at once where that stays in one row.
  const MulAdd& f = op.muladd;
  const bool rows_inside = use.row_per_n && f.ndim > 0;
  const int outer_dims = rows_inside ? f.ndim - 1 : f.ndim;
  const std::size_t inner = rows_inside ? std::size_t(f.ndim - 1) : 0;
  index outer = 1;
  for (int d = 0; d < outer_dims; ++d) outer *= f.shape[std::size_t(d)];
  for (index i = 0; i < outer; ++i) {
    index rest = i, yo = 0, xo = 0, co = 0;
    for (int d = outer_dims - 1; d >= 0; --d) {
      const std::size_t k = std::size_t(d);
      const index id = rest % f.shape[k];
      rest /= f.shape[k];
      yo += id * f.ys[k];
      xo += id * f.xs[k];
      co += id * f.cs[k];
    }
    T* row = row_of(yo);
    if (!row) continue;
    if (rows_inside)
      body.muladd(f.shape[inner], alpha, c ? c + co : nullptr, f.cs[inner], y + yo, f.ys[inner], row + xo, f.xs[inner], false);
    else
      row[xo] += alpha * (c ? c[co] : T(1)) * y[yo];
  }
}

template <class T>
bool vjp_from_units(const Bound<T>& program, const RowLayout& layout, const Workspace<T>& work, const T* y, T* v, T* arena) {
  const Structure& s = *program.structure;
  if (layout.max_outputs != 1) return false;
  std::vector<char> used(s.buffers.size(), 0);
  for (const Use& use : layout.uses) {
    const std::size_t y = std::size_t(s.instructions[std::size_t(use.instruction)].y);
    if (layout.row_width[y] == 0) return false;
    used[y] = 1;
  }
  const Simd<T>& body = simd<T>();
  for (std::size_t b = 0; b < s.buffers.size(); ++b) {
    const index width = layout.row_width[b];
    if (!used[b]) continue;
    const T* unit = work.arenas.data() + s.buffers[b].offset;
    T* scaled = arena + s.buffers[b].offset;
    const index rows = s.buffers[b].size / width;
    for (index i = 0; i < rows; ++i)
      body.muladd(width, y[layout.k_index[std::size_t(layout.first_row[b] + i)]], nullptr, 0, unit + i * width, 1,
                  scaled + i * width, 1, true);
  }
  adjoint_from_uses(program, v, arena);
  return true;
}

namespace {

// body(i, line, arena) for `count` rows of J from `first` on, by products with J^T, or columns by those with J; several at a
// time where threads are to be had.
template <class T, class F>
void each_line(const Bound<T>& program, Workspace<T>& work, bool columns, index first, index count, F&& body) {
  const Structure& s = *program.structure;
  const index given = columns ? s.num_parameters : s.num_residuals, found = columns ? s.num_residuals : s.num_parameters;
  const bool large = s.arena_size * index(sizeof(T)) > limits::kOneArenaBytes / 8;
  const int threads = large ? 1 : int(std::min<index>(count, threads_for(0.5 * double(count) * s.flops)));
  const index own = s.arena_size + given + found;   // of one thread: an arena, a unit vector, a line
  ensure(work.arenas, threads * own);
  for (int t = 0; t < threads; ++t) std::fill_n(work.arenas.data() + t * own + s.arena_size, given, T(0));
  each_item(threads, count, [&](index i, int thread) {
    T *arena = work.arenas.data() + thread * own, *unit = arena + s.arena_size, *line = unit + given;
    unit[first + i] = 1;
    if (columns) jvp(program, unit, line, arena);
    else vjp(program, unit, line, arena);
    body(i, line, arena);
    unit[first + i] = 0;
  });
}

// J by M products with J^T, or by P with J where those are fewer.
template <class T>
void dense_by_products(const Bound<T>& program, Workspace<T>& work, T* J) {
  const index M = program.structure->num_residuals, P = program.structure->num_parameters;
  const bool columns = P < M;
  each_line(program, work, columns, index(0), std::min(M, P), [&](index i, const T* line, T*) {
    if (!columns) std::copy(line, line + P, J + i * P);
    for (index e = 0; columns && e < M; ++e) J[e * P + i] = line[e];
  });
}

}  // namespace

template <class T>
void dense(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* J) {
  const Structure& s = *program.structure;
  if (!layout.local) return dense_by_products(program, work, J);
  std::vector<index> start;
  for (int l = 0; l < s.num_parameter_buffers; ++l) start.push_back(s.buffers[std::size_t(l)].offset);
  dense_columns(program, layout, work, start, s.num_parameters, J);
}

template <class T>
void dense_columns(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, const std::vector<index>& start,
                   index width, T* J) {
  const Structure& s = *program.structure;
  unit_sweeps(program, layout, work);
  std::memset(J, 0, sizeof(T) * std::size_t(s.num_residuals * width));
  for (const Use& use : layout.uses)
    for (index o = 0; o < layout.max_outputs && start[std::size_t(use.parameter)] >= 0; ++o)
      add_rows(program, layout, use, s.instructions[std::size_t(use.instruction)], work.arenas.data() + o * s.arena_size,
               layout.element, o, J + start[std::size_t(use.parameter)], width);
}

template <class T>
void each_rows(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, index most, T* J,
               const std::function<void(index rows)>& body) {
  const Structure& s = *program.structure;
  const index M = s.num_residuals, P = s.num_parameters;
  if (!layout.local) {
    for (index first = 0; first < M; first += most) {
      const index rows = std::min(most, M - first);
      each_line(program, work, false, first, rows,
                [&](index i, const T* line, T*) { std::copy(line, line + P, J + i * P); });
      body(rows);
    }
    return;
  }
  unit_sweeps(program, layout, work);
  std::vector<index> row_index(layout.k_index.size());
  std::vector<char> reached(std::size_t(layout.max_outputs));
  for (index first = 0; first < M; first += most) {
    const index rows = std::min(most, M - first);
    std::fill(reached.begin(), reached.end(), char(0));
    for (std::size_t i = 0; i < row_index.size(); ++i) {
      const index k = layout.k_index[i] - first;
      row_index[i] = k >= 0 && k < rows ? k : -1;
      if (row_index[i] >= 0) reached[i % reached.size()] = 1;
    }
    std::memset(J, 0, sizeof(T) * std::size_t(rows * P));
    for (const Use& use : layout.uses)
      for (index o = 0; o < layout.max_outputs; ++o)
        if (reached[std::size_t(o)])
          add_rows(program, layout, use, s.instructions[std::size_t(use.instruction)], work.arenas.data() + o * s.arena_size,
                   row_index, o, J + s.buffers[std::size_t(use.parameter)].offset, P);
    body(rows);
  }
}

template <class T>
void normal_by_products(const Bound<T>& program, Workspace<T>& work, T* H, index ld) {
  const index P = program.structure->num_parameters;
  each_line(program, work, true, index(0), P, [&](index i, T* line, T* arena) {
    thread_local std::vector<T> row;   // grown where an exception is caught: see parallel.h
    ensure(row, P);
    vjp(program, line, row.data(), arena);
    for (index j = i; j < P; ++j) H[i * ld + j] += row[std::size_t(j)];
  });
}

template <class T>
void diagonal(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* d) {
  const Structure& s = *program.structure;
  const index M = s.num_residuals, P = s.num_parameters;
  std::fill(d, d + P, T(0));
  const auto add_squares = [](index rows, index columns, const T* J, T* sum) {
    for (index i = 0; i < rows; ++i)
      for (index j = 0; j < columns; ++j) sum[j] += J[i * columns + j] * J[i * columns + j];
  };
  if (!layout.local) {
    std::vector<T> J(std::size_t(M * P));
    dense(program, layout, work, J.data());
    add_squares(M, P, J.data(), d);
    return;
  }
  unit_sweeps(program, layout, work);
  std::vector<int> uses(std::size_t(s.num_parameter_buffers), 0);
  for (const Use& use : layout.uses) ++uses[std::size_t(use.parameter)];
  const auto square = [](T x) { return x * x; };
  std::vector<T> squares_c, squares_y, rows;
  for (int l = 0; l < s.num_parameter_buffers; ++l) {
    const Buffer& buffer = s.buffers[std::size_t(l)];
    rows.clear();
    for (const Use& use : layout.uses) {
      if (use.parameter != l) continue;
      const Instruction& op = s.instructions[std::size_t(use.instruction)];
      for (index o = 0; o < layout.max_outputs; ++o) {
        const T* arena = work.arenas.data() + o * s.arena_size;
        if (use.form == Form::factored && uses[std::size_t(l)] == 1) {
          // Rows are outer products: the squares of their factors make the squares of J, summed by one product.
          const MatMul& g = op.matmul;
          const T* c = program.constants[std::size_t(op.constant)].data + op.c_offset;
          const T* y = cotangent(s, op, arena);
          squares_c.resize(std::size_t(g.k * g.n));
          squares_y.resize(std::size_t(g.m * g.n));
          for (index n = 0; n < g.n; ++n) {
            for (index k = 0; k < g.k; ++k) squares_c[std::size_t(n * g.k + k)] = square(c[k * g.ck + n * g.cn]);
            for (index m = 0; m < g.m; ++m) squares_y[std::size_t(n * g.m + m)] = square(y[m * g.ym + n * g.yn]);
          }
          gemm<T>(g.m, g.k, g.n, T(1), squares_y.data(), 1, g.m, squares_c.data(), g.k, 1, T(1),
                  d + buffer.offset + op.x_offset, g.xm, g.xk);
          continue;
        }
        if (rows.empty()) rows.assign(std::size_t(M * buffer.size), T(0));
        add_rows(program, layout, use, op, arena, layout.k_index, o, rows.data(), buffer.size);
      }
    }
    if (!rows.empty()) add_squares(M, buffer.size, rows.data(), d + buffer.offset);
  }
}

#define PGDFAST_INSTANTIATE(T)                                                                   \
  template void unit_sweeps<T>(const Bound<T>&, const RowLayout&, Workspace<T>&);                \
  template void add_rows<T>(const Bound<T>&, const RowLayout&, const Use&, const Instruction&,   \
                            const T*, const std::vector<index>&, index, T*, index, Folding);     \
  template void dense<T>(const Bound<T>&, const RowLayout&, Workspace<T>&, T*);                  \
  template void dense_columns<T>(const Bound<T>&, const RowLayout&, Workspace<T>&, const std::vector<index>&, index, T*); \
  template void diagonal<T>(const Bound<T>&, const RowLayout&, Workspace<T>&, T*);              \
  template void each_rows<T>(const Bound<T>&, const RowLayout&, Workspace<T>&, index, T*,        \
                             const std::function<void(index)>&);                                 \
  template void normal_by_products<T>(const Bound<T>&, Workspace<T>&, T*, index);               \
  template bool vjp_from_units<T>(const Bound<T>&, const RowLayout&, const Workspace<T>&, const T*, T*, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
