#include "gram.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../plan/blas.h"
#include "../plan/environment.h"
#include "../plan/limits.h"
#include "factors.h"
#include "parallel.h"

namespace pgdfast {
namespace {

constexpr index kDepth = 256;   // depth of panels that one tile sums at once: three of them stay in the first-level cache

// C C'^T of two uses whose rows have several residuals, found once for all of those.
template <class T>
struct Shared {
  const T* data;
  index ld;
};

// What one pass may pack; PGDFAST_PASS_BYTES forces it, for tests.
template <class T>
index pass_elements(index num_residuals) {
  const index forced = number_from_environment("PGDFAST_PASS_BYTES", -1);
  if (forced >= 0) return forced / index(sizeof(T));
  return std::max(limits::kPassBytes / index(sizeof(T)), num_residuals * num_residuals / limits::kPassPart);
}

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
  SharedProducts(const std::vector<Side<T>>& sides, const Passes& passes, Workspace<T>& work, int threads) {
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
            if (p.parameter != q.parameter || passes.repeated[std::size_t(p.parameter)]) continue;
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

  static bool needed(const Side<T>& a, const Side<T>& b) { return a.block->outputs > 1 || b.block->outputs > 1; }
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
  const index kept = std::min(columns, b.rows * b.outputs - j);
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

// Adds to (or, where nothing stands there yet, writes) the tiles of K in rows i0 .. i1 - 1 of a block and one group of columns
// of another.
template <class T>
void tiles_of(const Side<T>& a, index i0, index i1, const Side<T>& b, index panel, int count, bool same, const T* weights,
              const Passes& passes, const Shared<T>* shared, bool add, T* scratch, T* K, index ld) {
  const Tiles<T>& t = tiles<T>();
  const index j = panel * t.width, columns = count * t.width;
  T* corner = K + a.block->base * ld + b.block->base + j;
  if (same) i1 = std::min(i1, j + columns);   // tiles below the diagonal
  bool first = !add;
  for (const Factors<T>& p : a.factors)
    for (const Factors<T>& q : b.factors) {
      if (p.parameter != q.parameter) continue;
      const bool shares = SharedProducts<T>::needed(a, b) && !passes.repeated[std::size_t(p.parameter)];
      const T weight = weights[p.parameter], shift = p.fused_bias >= 0 ? weights[p.fused_bias] : T(0);
      // Rows p of J are outer products y (x) c of a high and a low vector, and the product of two of them that of the high
      // ones times that of the low ones: (C C'^T) * (Y Y'^T), or (Y C'^T) * (C Y'^T) where roles are exchanged.
      const bool alike = p.m_is_high == q.m_is_high;
      const Panels<T>&left = alike ? p.constants : p.cotangents, &other = alike ? p.cotangents : p.constants;
      const Group<T> right(q.constants, shares ? 0 : panel, count), cotangents(q.cotangents, panel, count);
      for (index i = i0; i < i1; i += t.rows) {
        const index valid = std::min(t.rows, a.count - i);
        const int from = same ? int(std::max<index>(i - j, 0) / t.width) : 0;   // panels left of the diagonal
        T *s = scratch + from * t.width, *out = corner + i * ld + from * t.width;
        if (shares)
          spread(*shared, *a.block, i, valid, *b.block, j, columns, scratch);
        else
          t.product(count - from, t.rows, left.depth, row_of(left, i), right.at + from, s, columns, false);
        t.scaled_product(count - from, valid, other.depth, row_of(other, i), cotangents.at + from, s, columns, weight, shift,
                         out, ld, !first);
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
  const Passes passes = plan_passes(s, layout, t.width, pass_elements<T>(s.num_residuals));
  // One item: a few rows of K with all columns from the diagonal on.
  const index group = kTilePanels * t.width;
  struct Item {
    std::size_t side;
    index row;
  };
  std::vector<Item> items;
  for (std::size_t a = 0; a < layout.blocks.size(); ++a)
    for (index i = 0; i < layout.blocks[a].rows * layout.blocks[a].outputs; i += group) items.push_back({a, i});
  for (const Pass& pass : passes.list) {
    const bool add = &pass != passes.list.data();
    double depth = double(pass.columns);
    for (const Use& use : layout.uses) {
      const MatMul& g = s.instructions[std::size_t(use.instruction)].matmul;
      if (pass.factored[std::size_t(use.parameter)] && use.form == Form::factored)
        depth += double(g.m + g.k) * double(g.n) / double(layout.num_rows);
    }
    const int threads = threads_for(depth * double(s.num_residuals) * double(s.num_residuals));
    const std::vector<Side<T>> sides = pack_pass(program, layout, weights, passes, pass, threads, work);
    const SharedProducts<T> shared(sides, passes, work, threads);
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
                   other == item.side, weights, passes, shared.of(item.side, other), add,
                   work.scratch[std::size_t(thread)].data(), K, ld);
      }
    });
  }
}

#define PGDFAST_INSTANTIATE(T)             \
  template index gram_stride<T>(index);    \
  template void gram<T>(const Bound<T>&, const RowLayout&, const T*, Workspace<T>&, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
