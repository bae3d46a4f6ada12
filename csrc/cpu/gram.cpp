#include "gram.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../plan/blas.h"
#include "simd.h"

namespace pgdfast {
namespace {

template <class T>
void ensure(std::vector<T>& buffer, std::size_t size) {
  if (buffer.size() < size) buffer.resize(size);
}

// Fills one arena per section with the cotangents that unit residuals produce.
template <class T>
void unit_sweeps(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work) {
  const Structure& s = *program.structure;
  ensure(work.arenas, std::size_t(s.arena_size * layout.max_sections));
  ensure(work.unit, std::size_t(s.num_residuals));
  for (index o = 0; o < layout.max_sections; ++o) {
    for (index e = 0; e < s.num_residuals; ++e) work.unit[std::size_t(e)] = layout.section_of[std::size_t(e)] == o;
    adjoint_to_uses(program, work.unit.data(), work.arenas.data() + o * s.arena_size);
  }
}

// A factor of a weight's Jacobian rows: `rows` x `size`, element (i, j) at data[i * row + j * column].
template <class T>
struct Factor {
  const T* data;
  index row, column, size;
  bool by_section;   // lives in the arenas: add section * arena_size
};

template <class T>
struct FactoredUse {
  index row0, rows;
  Factor<T> high, low;
  int parameter, companion;
};

// Where the cotangent of an instruction's result lies in the arena of a section. No use writes the residual itself.
template <class T>
const T* cotangent(const Structure& s, const Instruction& op, const T* arena) {
  return arena + s.buffers[std::size_t(op.y)].offset + op.y_offset;
}

template <class T>
FactoredUse<T> factors(const Bound<T>& program, const Use& use, const T* arena) {
  const Instruction& op = program.structure->instructions[std::size_t(use.instruction)];
  const MatMul& g = op.matmul;
  const T* c = program.constants[std::size_t(op.constant)].data + op.c_offset;
  const Factor<T> over_k{c, g.cn, g.ck, g.k, false};
  const Factor<T> over_m{cotangent(*program.structure, op, arena), g.yn, g.ym, g.m, true};
  FactoredUse<T> result{use.row0, g.n, over_m, over_k, use.parameter, use.companion};
  if (!use.m_is_high) std::swap(result.high, result.low);
  return result;
}

// Adds the Jacobian rows of one explicit use and section to J (leading dimension ld, origin at the parameter's columns).
// `row_index` maps row * max_sections + section to a row of J.
template <class T>
void add_rows(const Bound<T>& program, const RowLayout& layout, const Use& use, const T* arena,
              const std::vector<index>& row_index, index section, T* J, index ld) {
  const Structure& s = *program.structure;
  const Simd<T>& body = simd<T>();
  const Instruction& op = s.instructions[std::size_t(use.instruction)];
  const std::int32_t* label = layout.labels[std::size_t(op.y)].data() + op.y_offset;
  const T* y = cotangent(s, op, arena);
  const auto row_of = [&](index y_position) -> T* {
    const std::int32_t row = label[y_position];
    if (row < 0) return nullptr;
    const index k = row_index[std::size_t(row * layout.max_sections + section)];
    return k < 0 ? nullptr : J + k * ld + op.x_offset;
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
    for (index b = 0; b < g.b; ++b)
      for (index n = 0; n < g.n; ++n) {
        const T* cn = c + b * g.cb + n * g.cn;
        const T* yn = y + b * g.yb + n * g.yn;
        if (use.row_per_n && g.m > g.k) {
          T* row = row_of(b * g.yb + n * g.yn);
          for (index k = 0; row && k < g.k; ++k)
            body.muladd(g.m, alpha * cn[k * g.ck], nullptr, 0, yn, g.ym, row + b * g.xb + k * g.xk, g.xm, false);
          continue;
        }
        for (index m = 0; m < g.m; ++m) {
          T* row = row_of(b * g.yb + m * g.ym + n * g.yn);
          if (row)
            body.muladd(g.k, alpha * yn[m * g.ym], nullptr, 0, cn, g.ck, row + b * g.xb + m * g.xm, g.xk, false);
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
void product(const Factor<T>& f, index i0, index rows, index section_i, const Factor<T>& g, index j0, index cols,
             index section_j, index arena_size, T* out) {
  const T* a = f.data + i0 * f.row + (f.by_section ? section_i * arena_size : 0);
  const T* b = g.data + j0 * g.row + (g.by_section ? section_j * arena_size : 0);
  if (f.size <= 2) {   // coordinates of a first layer: cheaper than a call of the BLAS
    for (index i = 0; i < rows; ++i)
      for (index k = 0; k < f.size; ++k)
        simd<T>().muladd(cols, a[i * f.row + k * f.column], nullptr, 0, b + k * g.column, g.row, out + i * cols, 1, k == 0);
    return;
  }
  gemm<T>(rows, cols, f.size, T(1), a, f.row, f.column, b, g.column, g.row, T(0), out, cols, 1);
}

// Adds one pair of uses to the block of K at (row tile ti, row tile tj). Tiles with one section may span several.
template <class T>
void add_pair(const FactoredUse<T>& p, const FactoredUse<T>& q, const T* weights, const Tile& ti, const Tile& tj, bool diagonal,
              index arena_size, Scratch<T>& scratch, T* K, index M) {
  const index i0 = std::max(ti.r0, p.row0), i1 = std::min(ti.r0 + ti.rows, p.row0 + p.rows);
  const index j0 = std::max(tj.r0, q.row0), j1 = std::min(tj.r0 + tj.rows, q.row0 + q.rows);
  if (i0 >= i1 || j0 >= j1) return;
  const index rows = i1 - i0, cols = j1 - j0;
  const T weight = weights[p.parameter];
  // A bias added to the same result contributes Y Y'^T: as if the constant rows had one more column of ones.
  const T bias = p.companion >= 0 ? weights[p.companion] : T(0);
  const bool constant_is_high = !p.high.by_section;
  const auto changes = [](const Factor<T>& f, const Factor<T>& g, bool first, bool first_inner) {
    return first || (g.by_section) || (first_inner && f.by_section);
  };
  for (index o = 0; o < ti.sections; ++o)
    for (index o2 = diagonal ? o : 0; o2 < tj.sections; ++o2) {
      const bool inner = o2 == (diagonal ? o : 0), first = o == 0 && inner;
      if (changes(p.high, q.high, first, inner))
        product(p.high, i0 - p.row0, rows, o, q.high, j0 - q.row0, cols, o2, arena_size, scratch.high.data());
      if (changes(p.low, q.low, first, inner))
        product(p.low, i0 - p.row0, rows, o, q.low, j0 - q.row0, cols, o2, arena_size, scratch.low.data());
      T* block = K + (ti.base + o * ti.rows + (i0 - ti.r0)) * M + tj.base + o2 * tj.rows + (j0 - tj.r0);
      const T* constants = (constant_is_high ? scratch.high : scratch.low).data();
      const T* cotangents = (constant_is_high ? scratch.low : scratch.high).data();
      simd<T>().hadamard(rows, cols, weight, bias, constants, cotangents, cols, block, M);
    }
}

// Columns of the explicit part: each parameter whose uses are not factored, at its own offset.
struct ExplicitColumns {
  std::vector<index> start;   // per parameter buffer, -1 if it has no explicit rows
  index total = 0;
};

ExplicitColumns explicit_columns(const Structure& s, const RowLayout& layout) {
  ExplicitColumns columns;
  columns.start.assign(std::size_t(s.num_parameter_buffers), -1);
  for (const Use& use : layout.uses) {
    index& start = columns.start[std::size_t(use.parameter)];
    if (use.form != Form::rows || start >= 0) continue;
    start = columns.total;
    columns.total += s.buffers[std::size_t(use.parameter)].size;
  }
  return columns;
}

}  // namespace

template <class T>
void gram(const Bound<T>& program, const RowLayout& layout, const T* weights, Workspace<T>& work, T* K) {
  const Structure& s = *program.structure;
  const index M = s.num_residuals;
  unit_sweeps(program, layout, work);
  const T* arenas = work.arenas.data();

  const ExplicitColumns columns = explicit_columns(s, layout);
  if (columns.total > 0) {
    ensure(work.rows, std::size_t(M * columns.total));
    std::memset(work.rows.data(), 0, sizeof(T) * std::size_t(M * columns.total));
    for (const Use& use : layout.uses) {
      if (use.form != Form::rows) continue;
      T* origin = work.rows.data() + columns.start[std::size_t(use.parameter)];
      for (index o = 0; o < layout.max_sections; ++o)
        add_rows(program, layout, use, arenas + o * s.arena_size, layout.k_index, o, origin, columns.total);
    }
    for (int l = 0; l < s.num_parameter_buffers; ++l) {
      const index start = columns.start[std::size_t(l)];
      if (start < 0 || weights[l] == T(1)) continue;
      const T root = std::sqrt(weights[l]);
      for (index i = 0; i < M; ++i)
        for (index j = 0; j < s.buffers[std::size_t(l)].size; ++j) work.rows[std::size_t(i * columns.total + start + j)] *= root;
    }
  }

  std::vector<FactoredUse<T>> uses;
  double flops = double(M) * double(M) * double(columns.total);
  for (const Use& use : layout.uses) {
    if (use.form != Form::factored) continue;
    uses.push_back(factors(program, use, arenas));
    flops += double(M) * double(M) * double(uses.back().high.size + uses.back().low.size);
  }

  // Blocks of the upper triangle: a row tile with itself and every tile after it. Tiles of one section lie in K as in
  // their rows, so neighbours merge into one wide block, which large products like.
  struct Block {
    Tile rows, cols;
    bool diagonal;
  };
  std::vector<Block> blocks;
  for (std::size_t i = 0; i < layout.tiles.size(); ++i) {
    const Tile& a = layout.tiles[i];
    for (std::size_t j = i; j < layout.tiles.size(); ++j) {
      const Tile& b = layout.tiles[j];
      Block* last = j == i ? nullptr : &blocks.back();
      if (a.sections == 1 && b.sections == 1 && last && last->cols.sections == 1 &&
          last->cols.r0 + last->cols.rows == b.r0)
        last->cols.rows += b.rows;
      else
        blocks.push_back({a, b, i == j && a.sections > 1});
    }
  }

  const auto run = [&](const Block& block, Scratch<T>& scratch) {
    const Tile &a = block.rows, &b = block.cols;
    const index rows = a.rows * a.sections, cols = b.rows * b.sections;
    T* corner = K + a.base * M + b.base;
    if (columns.total > 0)
      gemm<T>(rows, cols, columns.total, T(1), work.rows.data() + a.base * columns.total, columns.total, 1,
              work.rows.data() + b.base * columns.total, 1, columns.total, T(0), corner, M, 1);
    else
      for (index i = 0; i < rows; ++i) std::memset(corner + i * M, 0, sizeof(T) * std::size_t(cols));
    for (std::size_t p = 0; p < uses.size(); ++p)
      for (std::size_t q = 0; q < uses.size(); ++q)
        if (uses[p].parameter == uses[q].parameter)
          add_pair(uses[p], uses[q], weights, a, b, block.diagonal, s.arena_size, scratch, K, M);
  };

  const int threads = blocks.size() > 1 ? threads_for(flops) : 1;
  const BlasThreads outside(threads > 1 ? 1 : threads_for(flops));
  // All threads' scratch at once: which thread meets the largest block differs from step to step.
  index largest = 0;
  for (const Block& block : blocks) largest = std::max(largest, block.rows.rows * block.cols.rows);
  if (work.scratch.size() < std::size_t(threads)) work.scratch.resize(std::size_t(threads));
  for (Scratch<T>& scratch : work.scratch) {
    ensure(scratch.high, std::size_t(largest));
    ensure(scratch.low, std::size_t(largest));
  }
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const BlasThreads inside(1);
      Scratch<T>& scratch = work.scratch[std::size_t(omp_get_thread_num())];
#pragma omp for schedule(dynamic, 1)
      for (std::ptrdiff_t i = 0; i < std::ptrdiff_t(blocks.size()); ++i) run(blocks[std::size_t(i)], scratch);
    }
    return;
  }
#endif
  for (const Block& block : blocks) run(block, work.scratch[0]);
}

template <class T>
bool vjp_from_units(const Bound<T>& program, const RowLayout& layout, const Workspace<T>& work, const T* y, T* v, T* arena) {
  const Structure& s = *program.structure;
  if (layout.max_sections != 1) return false;
  for (const Use& use : layout.uses)
    if (layout.row_width[std::size_t(s.instructions[std::size_t(use.instruction)].y)] == 0) return false;
  const Simd<T>& body = simd<T>();
  for (std::size_t b = 0; b < s.buffers.size(); ++b) {
    const index width = layout.row_width[b];
    if (width == 0 || s.buffers[b].role != Role::workspace) continue;
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

template <class T>
void dense(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* J) {
  const Structure& s = *program.structure;
  const index M = s.num_residuals, P = s.num_parameters;
  if (!layout.local) {
    ensure(work.arenas, std::size_t(s.arena_size));
    ensure(work.unit, std::size_t(M));
    std::fill(work.unit.begin(), work.unit.begin() + M, T(0));
    for (index i = 0; i < M; ++i) {
      work.unit[std::size_t(i)] = 1;
      vjp(program, work.unit.data(), J + i * P, work.arenas.data());
      work.unit[std::size_t(i)] = 0;
    }
    return;
  }
  unit_sweeps(program, layout, work);
  std::memset(J, 0, sizeof(T) * std::size_t(M * P));
  for (const Use& use : layout.uses)
    for (index o = 0; o < layout.max_sections; ++o)
      add_rows(program, layout, use, work.arenas.data() + o * s.arena_size, layout.element, o,
               J + s.buffers[std::size_t(use.parameter)].offset, P);
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
  std::vector<T> squares_c, squares_y, rows;
  for (int l = 0; l < s.num_parameter_buffers; ++l) {
    const Buffer& buffer = s.buffers[std::size_t(l)];
    rows.clear();
    for (const Use& use : layout.uses) {
      if (use.parameter != l) continue;
      const Instruction& op = s.instructions[std::size_t(use.instruction)];
      for (index o = 0; o < layout.max_sections; ++o) {
        const T* arena = work.arenas.data() + o * s.arena_size;
        if (use.form == Form::factored && uses[std::size_t(l)] == 1) {
          // Rows are outer products: the squares of their factors make the squares of J, summed by one product.
          const MatMul& g = op.matmul;
          const T* c = program.constants[std::size_t(op.constant)].data + op.c_offset;
          const T* y = cotangent(s, op, arena);
          squares_c.resize(std::size_t(g.k * g.n));
          squares_y.resize(std::size_t(g.m * g.n));
          for (index n = 0; n < g.n; ++n) {
            for (index k = 0; k < g.k; ++k) squares_c[std::size_t(n * g.k + k)] = c[k * g.ck + n * g.cn] * c[k * g.ck + n * g.cn];
            for (index m = 0; m < g.m; ++m) squares_y[std::size_t(n * g.m + m)] = y[m * g.ym + n * g.yn] * y[m * g.ym + n * g.yn];
          }
          gemm<T>(g.m, g.k, g.n, T(1), squares_y.data(), 1, g.m, squares_c.data(), g.k, 1, T(1),
                  d + buffer.offset + op.x_offset, g.xm, g.xk);
          continue;
        }
        if (rows.empty()) rows.assign(std::size_t(M * buffer.size), T(0));
        add_rows(program, layout, use, arena, layout.k_index, o, rows.data(), buffer.size);
      }
    }
    if (!rows.empty()) add_squares(M, buffer.size, rows.data(), d + buffer.offset);
  }
}

#define PGDFAST_INSTANTIATE(T)                                                                   \
  template void dense<T>(const Bound<T>&, const RowLayout&, Workspace<T>&, T*);                  \
  template void diagonal<T>(const Bound<T>&, const RowLayout&, Workspace<T>&, T*);              \
  template void gram<T>(const Bound<T>&, const RowLayout&, const T*, Workspace<T>&, T*);        \
  template bool vjp_from_units<T>(const Bound<T>&, const RowLayout&, const Workspace<T>&, const T*, T*, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
