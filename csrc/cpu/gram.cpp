#include "gram.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "../plan/blas.h"
#include "parallel.h"
#include "simd.h"
#include "tiles.h"

namespace pgdfast {
namespace {

constexpr index kDepth = 256;   // depth of panels that one tile sums at once: three of them stay in the first-level cache

// A factor's rows in one block of K, packed.
template <class T>
struct Panels {
  const T* data = nullptr;
  index stride = 0, depth = 0;   // elements from panel to panel
};

// One use of a weight in one block: constants by row of the block, cotangents by residual.
template <class T>
struct Factors {
  int parameter, companion;
  Panels<T> constants, cotangents;
};

// What one block of residuals brings to K.
template <class T>
struct Side {
  const Block* block;
  index count;                       // residuals
  std::vector<Factors<T>> factors;
  Panels<T> explicit_rows;
};

// C C'^T of two uses whose rows have several residuals, found once for all of those.
template <class T>
struct Shared {
  const T* data;
  index ld;
};

// Columns of the explicit part: each parameter whose uses are not factored, at its own offset.
struct ExplicitColumns {
  std::vector<index> start;   // per parameter buffer, -1 if it has no explicit rows
  std::vector<Folding> folding;
  index total = 0;
};

// A matrix with a narrow contiguous dimension is folded where all its uses are products.
Folding folding(const Structure& s, const RowLayout& layout, int parameter) {
  const index size = s.buffers[std::size_t(parameter)].size;
  Folding found{1, size};
  for (const Use& use : layout.uses) {
    const Instruction& op = s.instructions[std::size_t(use.instruction)];
    if (use.parameter != parameter) continue;
    if (op.kind != Kind::matmul) return {};
    for (const auto& [stride, extent] : {std::pair(op.matmul.xm, op.matmul.m), std::pair(op.matmul.xk, op.matmul.k)})
      if (extent >= 16 && stride > 1 && stride < 16) found.fold = stride;
  }
  for (const Use& use : layout.uses) {
    const MatMul& g = s.instructions[std::size_t(use.instruction)].matmul;
    if (use.parameter != parameter) continue;
    for (const auto& [stride, extent] : {std::pair(g.xb, g.b), std::pair(g.xm, g.m), std::pair(g.xk, g.k)})
      if (extent > 1 && (!found.takes(stride) || (stride == 1 && extent > found.fold))) return {};
  }
  return size % found.fold == 0 ? found : Folding{};
}

ExplicitColumns explicit_columns(const Structure& s, const RowLayout& layout) {
  ExplicitColumns columns;
  columns.start.assign(std::size_t(s.num_parameter_buffers), -1);
  columns.folding.resize(std::size_t(s.num_parameter_buffers));
  for (const Use& use : layout.uses) {
    index& start = columns.start[std::size_t(use.parameter)];
    if (use.form != Form::rows || start >= 0) continue;
    start = columns.total;
    columns.total += s.buffers[std::size_t(use.parameter)].size;
    columns.folding[std::size_t(use.parameter)] = folding(s, layout, use.parameter);
  }
  return columns;
}

template <class T>
void explicit_rows(const Bound<T>& program, const RowLayout& layout, const T* weights, const ExplicitColumns& columns,
                   Workspace<T>& work) {
  const Structure& s = *program.structure;
  const index size = s.num_residuals * columns.total;
  ensure(work.rows, size);
  std::memset(work.rows.data(), 0, sizeof(T) * std::size_t(size));
  for (const Use& use : layout.uses) {
    if (use.form != Form::rows) continue;
    T* origin = work.rows.data() + columns.start[std::size_t(use.parameter)];
    for (index o = 0; o < layout.max_sections; ++o)
      add_rows(program, layout, use, work.arenas.data() + o * s.arena_size, layout.k_index, o, origin, columns.total,
               columns.folding[std::size_t(use.parameter)]);
  }
  for (int l = 0; l < s.num_parameter_buffers; ++l) {
    const index start = columns.start[std::size_t(l)];
    if (start < 0 || weights[l] == T(1)) continue;
    const T root = std::sqrt(weights[l]);
    for (index i = 0; i < s.num_residuals; ++i)
      for (index j = 0; j < s.buffers[std::size_t(l)].size; ++j) work.rows[std::size_t(i * columns.total + start + j)] *= root;
  }
}

// Packs all factors and explicit rows, block by block.
template <class T>
class Packing {
 public:
  Packing(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work)
      : program_(program), layout_(layout), work_(work), s_(*program.structure) {}

  std::vector<Side<T>> run(index explicit_columns, int threads) {
    index size = 0, copied = 0;
    for (const Block& block : layout_.blocks) {
      size += panels_of(block.rows * block.sections) * explicit_columns;
      for (const Use& use : layout_.uses) {
        if (!touches(use, block)) continue;
        const MatMul& g = matmul(use);
        size += panels_of(block.rows) * g.k + panels_of(block.rows * block.sections) * g.m;
        copied += block.rows * (g.k + block.sections * g.m);
      }
    }
    ensure(work_.packed, size * tiles<T>().width);
    ensure(work_.copy, copied);
    next_ = work_.packed.data();
    copy_ = work_.copy.data();
    std::vector<Side<T>> sides;
    for (const Block& block : layout_.blocks) {
      Side<T> side{&block, block.rows * block.sections, {}, {}};
      for (const Use& use : layout_.uses)
        if (touches(use, block)) side.factors.push_back(factors(use, block));
      if (explicit_columns > 0)
        side.explicit_rows =
            pack(side.count, explicit_columns, work_.rows.data() + block.base * explicit_columns, explicit_columns, 1);
      sides.push_back(std::move(side));
    }
    each_item(threads, index(jobs_.size()), [&](index number, int) {
      const Job& job = jobs_[std::size_t(number)];
      tiles<T>().pack(job.count, job.depth, job.x, job.row, job.column, job.out, job.depth * tiles<T>().width);
    });
    return sides;
  }

 private:
  static index panels_of(index rows) { return (rows + tiles<T>().width - 1) / tiles<T>().width; }
  const MatMul& matmul(const Use& use) const { return s_.instructions[std::size_t(use.instruction)].matmul; }
  bool touches(const Use& use, const Block& block) const {
    return use.form == Form::factored && use.row0 < block.r0 + block.rows && block.r0 < use.row0 + matmul(use).n;
  }

  Panels<T> pack(index count, index depth, const T* x, index row, index column) {
    const Panels<T> panels{next_, depth * tiles<T>().width, depth};
    const index piece = kPiece * tiles<T>().width;
    for (index i = 0; i < count; i += piece)
      jobs_.push_back({std::min(piece, count - i), depth, row, column, x + i * row, next_ + i * depth});
    next_ += panels_of(count) * panels.stride;
    return panels;
  }

  // Is the weight transposed here, as against its first use? Nested derivatives use it both ways, with one residual a row
  // (linear/rows.py): the factors of its two dimensions then change places.
  bool transposed(const Use& use) const {
    for (const Use& first : layout_.uses)
      if (first.form == Form::factored && first.parameter == use.parameter) return first.m_is_high != use.m_is_high;
    return false;
  }

  // Constants by row; cotangents by section, then row. Rows of the block that the use does not reach are zero.
  Factors<T> factors(const Use& use, const Block& block) {
    const Instruction& op = s_.instructions[std::size_t(use.instruction)];
    const MatMul& g = op.matmul;
    const index begin = std::max(use.row0, block.r0), end = std::min(use.row0 + g.n, block.r0 + block.rows);
    const bool whole = end - begin == block.rows;
    const T* c = program_.constants[std::size_t(op.constant)].data + op.c_offset + (begin - use.row0) * g.cn;
    const T* y = cotangent(s_, op, work_.arenas.data()) + (begin - use.row0) * g.yn;
    Factors<T> result{use.parameter, use.companion, {}, {}};
    if (whole) {
      result.constants = pack(block.rows, g.k, c, g.cn, g.ck);
    } else {
      result.constants = pack(block.rows, g.k, copy(block, begin, end, 1, g.k, c, 0, g.cn, g.ck), g.k, 1);
    }
    if (whole && block.sections == 1) {
      result.cotangents = pack(block.rows, g.m, y, g.yn, g.ym);
    } else {
      const T* ordered = copy(block, begin, end, block.sections, g.m, y, s_.arena_size, g.yn, g.ym);
      result.cotangents = pack(block.rows * block.sections, g.m, ordered, g.m, 1);
    }
    if (transposed(use)) std::swap(result.constants, result.cotangents);
    return result;
  }

  // The rows of a block in K's order, section by section.
  const T* copy(const Block& block, index begin, index end, index sections, index depth, const T* x, index section, index row,
                index column) {
    T *const start = copy_, *out = copy_;
    copy_ += sections * block.rows * depth;
    for (index o = 0; o < sections; ++o)
      for (index i = block.r0; i < block.r0 + block.rows; ++i, out += depth) {
        if (i < begin || i >= end) std::memset(out, 0, sizeof(T) * std::size_t(depth));
        else simd<T>().muladd(depth, T(1), nullptr, 0, x + o * section + (i - begin) * row, column, out, 1, true);
      }
    return start;
  }

  static constexpr index kPiece = 4;   // panels that one thread packs at a time
  struct Job {
    index count, depth, row, column;
    const T* x;
    T* out;
  };

  const Bound<T>& program_;
  const RowLayout& layout_;
  Workspace<T>& work_;
  const Structure& s_;
  std::vector<Job> jobs_;
  T *next_ = nullptr, *copy_ = nullptr;
};

// Pointers to the panels of one group of columns.
template <class T>
struct Group {
  const T* at[kTilePanels];
  Group(const Panels<T>& panels, index first, int count, index depth = 0) {
    for (int v = 0; v < count; ++v) at[v] = panels.data + (first + v) * panels.stride + depth * tiles<T>().width;
  }
};

template <class T>
const T* row_of(const Panels<T>& panels, index i, index depth = 0) {
  const index width = tiles<T>().width;
  return panels.data + i / width * panels.stride + depth * width + i % width;
}

// Which shared products each pair of blocks needs, and all of them.
template <class T>
class SharedProducts {
 public:
  SharedProducts(const std::vector<Side<T>>& sides, Workspace<T>& work, int threads) {
    struct Job {
      Panels<T> left, right;
      index rows, columns, offset, ld;
    };
    std::vector<Job> jobs;
    index size = 0;
    for (std::size_t a = 0; a < sides.size(); ++a)
      for (std::size_t b = a; b < sides.size(); ++b) {
        start_.push_back(jobs.size());
        if (!needed(sides[a], sides[b])) continue;
        for (const Factors<T>& p : sides[a].factors)
          for (const Factors<T>& q : sides[b].factors) {
            if (p.parameter != q.parameter) continue;
            const index width = tiles<T>().width, ld = (sides[b].block->rows + width - 1) / width * width;
            jobs.push_back({p.constants, q.constants, sides[a].block->rows, sides[b].block->rows, size, ld});
            size += sides[a].block->rows * ld;
          }
      }
    ensure(work.shared, size);
    for (const Job& job : jobs) products_.push_back({work.shared.data() + job.offset, job.ld});
    for (const Job& job : jobs) {
      const Tiles<T>& t = tiles<T>();
      T* out = work.shared.data() + job.offset;
      each_item(threads, (job.rows + t.rows - 1) / t.rows, [&](index item, int) {
        const index i = item * t.rows, panels = job.ld / t.width;
        for (index p = 0; p < panels; p += kTilePanels) {
          const int count = int(std::min<index>(kTilePanels, panels - p));
          t.product(count, std::min(t.rows, job.rows - i), job.left.depth, row_of(job.left, i),
                    Group<T>(job.right, p, count).at, out + i * job.ld + p * t.width, job.ld, false);
        }
      });
    }
    sides_ = sides.size();
  }

  static bool needed(const Side<T>& a, const Side<T>& b) { return a.block->sections > 1 || b.block->sections > 1; }
  // Of the pair of blocks (a, b), a <= b, in the order of their pairs of uses.
  const Shared<T>* of(std::size_t a, std::size_t b) const {
    return products_.data() + start_[a * sides_ - a * (a + 1) / 2 + b];
  }

 private:
  std::size_t sides_ = 0;
  std::vector<std::size_t> start_;
  std::vector<Shared<T>> products_;
};

// Copies the elements of a shared product that belong to a tile of K: residual k of a block stands for its row k % rows.
template <class T>
void spread(const Shared<T>& shared, const Block& a, index i, index rows, const Block& b, index j, index columns, T* out) {
  const index kept = std::min(columns, b.rows * b.sections - j);
  for (index r = 0; r < rows; ++r, out += columns) {
    const T* from = shared.data + (i + r) % a.rows * shared.ld;
    for (index c = 0; c < kept;) {
      const index at = (j + c) % b.rows, run = std::min(kept - c, b.rows - at);
      std::memcpy(out + c, from + at, sizeof(T) * std::size_t(run));
      c += run;
    }
    std::fill(out + kept, out + columns, T(0));
  }
}

// The tiles of K in rows i0 .. i1 - 1 of a block and one group of columns of another.
template <class T>
void tiles_of(const Side<T>& a, index i0, index i1, const Side<T>& b, index panel, int count, bool same, const T* weights,
              const Shared<T>* shared, T* scratch, T* K, index ld) {
  const Tiles<T>& t = tiles<T>();
  const index j = panel * t.width, columns = count * t.width;
  T* corner = K + a.block->base * ld + b.block->base + j;
  if (same) i1 = std::min(i1, j + columns);   // tiles below the diagonal
  const bool shares = SharedProducts<T>::needed(a, b);
  bool first = true;
  for (const Factors<T>& p : a.factors)
    for (const Factors<T>& q : b.factors) {
      if (p.parameter != q.parameter) continue;
      const T weight = weights[p.parameter], shift = p.companion >= 0 ? weights[p.companion] : T(0);
      const Group<T> constants(q.constants, shares ? 0 : panel, count), cotangents(q.cotangents, panel, count);
      for (index i = i0; i < i1; i += t.rows) {
        const index valid = std::min(t.rows, a.count - i);
        const int from = same ? int(std::max<index>(i - j, 0) / t.width) : 0;   // panels left of the diagonal
        T *s = scratch + from * t.width, *out = corner + i * ld + from * t.width;
        if (shares)
          spread(*shared, *a.block, i, valid, *b.block, j, columns, scratch);
        else
          t.product(count - from, t.rows, p.constants.depth, row_of(p.constants, i), constants.at + from, s, columns, false);
        t.scaled_product(count - from, valid, p.cotangents.depth, row_of(p.cotangents, i), cotangents.at + from, s, columns,
                         weight, shift, out, ld, !first);
      }
      first = false;
      if (shares) ++shared;
    }
  for (index l = 0; l < a.explicit_rows.depth; l += kDepth) {
    const index depth = std::min(kDepth, a.explicit_rows.depth - l);
    const Group<T> right(b.explicit_rows, panel, count, l);
    for (index i = i0; i < i1; i += t.rows) {
      const int from = same ? int(std::max<index>(i - j, 0) / t.width) : 0;
      t.product(count - from, std::min(t.rows, a.count - i), depth, row_of(a.explicit_rows, i, l), right.at + from,
                corner + i * ld + from * t.width, ld, !first);
    }
    first = false;
  }
  if (first)
    for (index i = i0; i < std::min(i1, a.count); ++i) std::memset(corner + i * ld, 0, sizeof(T) * std::size_t(columns));
}

}  // namespace

template <class T>
index gram_stride(index num_residuals) {
  return (num_residuals / tiles<T>().width + 2) * tiles<T>().width;   // the last tile of a block may reach a panel beyond it
}

template <class T>
void gram(const Bound<T>& program, const RowLayout& layout, const T* weights, Workspace<T>& work, T* K) {
  const Tiles<T>& t = tiles<T>();
  const Structure& s = *program.structure;
  const index ld = gram_stride<T>(s.num_residuals);
  unit_sweeps(program, layout, work);
  const ExplicitColumns columns = explicit_columns(s, layout);
  if (columns.total > 0) explicit_rows(program, layout, weights, columns, work);
  double depth = double(columns.total);
  for (const Use& use : layout.uses) {
    const MatMul& g = s.instructions[std::size_t(use.instruction)].matmul;
    if (use.form == Form::factored) depth += double(g.m + g.k) * double(g.n) / double(layout.num_rows);
  }
  const int threads = threads_for(depth * double(s.num_residuals) * double(s.num_residuals));
  const std::vector<Side<T>> sides = Packing<T>(program, layout, work).run(columns.total, threads);
  const SharedProducts<T> shared(sides, work, threads);
  // One item: a few rows of K with all columns from the diagonal on.
  const index group = kTilePanels * t.width;
  struct Item {
    std::size_t side;
    index row;
  };
  std::vector<Item> items;
  for (std::size_t a = 0; a < sides.size(); ++a)
    for (index i = 0; i < sides[a].count; i += group) items.push_back({a, i});
  work.scratch.resize(std::max(work.scratch.size(), std::size_t(threads)));
  for (std::vector<T>& scratch : work.scratch) ensure(scratch, t.rows * group);
  each_item(threads, index(items.size()), [&](index number, int thread) {
    const Item item = items[std::size_t(number)];
    const Side<T>& a = sides[item.side];
    for (std::size_t other = item.side; other < sides.size(); ++other) {
      const Side<T>& b = sides[other];
      const index panels = (b.count + t.width - 1) / t.width;
      for (index p = other == item.side ? item.row / t.width : 0; p < panels; p += kTilePanels)
        tiles_of(a, item.row, std::min(item.row + group, a.count), b, p, int(std::min<index>(kTilePanels, panels - p)),
                 other == item.side, weights, shared.of(item.side, other), work.scratch[std::size_t(thread)].data(), K, ld);
    }
  });
}

#define PGDFAST_INSTANTIATE(T)             \
  template index gram_stride<T>(index);    \
  template void gram<T>(const Bound<T>&, const RowLayout&, const T*, Workspace<T>&, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
