#include "gram.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../plan/blas.h"
#include "../plan/environment.h"
#include "../plan/limits.h"
#include "parallel.h"

namespace pgdfast {
namespace {

constexpr index kDepth = 256;   // depth of panels that one tile sums at once: three of them stay in the first-level cache
constexpr index kSliceBytes = 8 << 20, kLeastSlice = 4 * kDepth;   // of explicit rows that all tiles take before any goes on

// C C'^T of two uses whose rows have several residuals, found once for all of those.
template <class T>
struct Shared {
  const T* data;
  index ld;
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
  // ranges: of every side of A the residuals that are asked for.
  SharedProducts(const std::vector<Side<T>>& A, const std::vector<Side<T>>& B, bool same,
                 const std::vector<std::pair<index, index>>& ranges, const std::vector<char>& repeated, std::vector<T>& memory,
                 int threads)
      : columns_(B.size()) {
    struct Job {
      Panels<T> left, right;
      index rows, columns, offset, ld;
      std::pair<index, index> range;
    };
    std::vector<Job> jobs;
    index size = 0;
    for (std::size_t a = 0; a < A.size(); ++a)
      for (std::size_t b = 0; b < B.size(); ++b) {
        start_.push_back(jobs.size());
        if ((same && b < a) || !needed(A[a], B[b]) || ranges[a].first >= ranges[a].second) continue;
        for (const Factors<T>& p : A[a].factors)
          for (const Factors<T>& q : B[b].factors) {
            if (p.parameter != q.parameter || repeated[std::size_t(p.parameter)]) continue;
            const index width = tiles<T>().width, ld = (B[b].block->rows + width - 1) / width * width;
            jobs.push_back({p.constants, q.constants, A[a].block->rows, B[b].block->rows, size, ld, ranges[a]});
            size += A[a].block->rows * ld;
          }
      }
    ensure(memory, size);
    for (const Job& job : jobs) products_.push_back({memory.data() + job.offset, job.ld});
    for (const Job& job : jobs) {
      const Tiles<T>& t = tiles<T>();
      T* out = memory.data() + job.offset;
      each_item(threads, (job.rows + t.rows - 1) / t.rows, [&](index item, int) {
        const index i = item * t.rows, panels = job.ld / t.width;
        if (!asked(job.range, job.rows, i, i + t.rows)) return;
        for (index p = 0; p < panels; p += kTilePanels) {
          const int count = int(std::min<index>(kTilePanels, panels - p));
          t.product(count, std::min(t.rows, job.rows - i), job.left.depth, row_of(job.left, i),
                    Group<T>(job.right, p, count).at, out + i * job.ld + p * t.width, job.ld, false);
        }
      });
    }
  }

  static bool needed(const Side<T>& a, const Side<T>& b) { return a.block->outputs > 1 || b.block->outputs > 1; }
  // Of a block of A and one of B, in the order of their pairs of uses.
  const Shared<T>* of(std::size_t a, std::size_t b) const { return products_.data() + start_[a * columns_ + b]; }

 private:
  // Does a range of residuals, output by output, reach any of the rows i .. stop - 1 of its block?
  static bool asked(std::pair<index, index> range, index rows, index i, index stop) {
    if (range.second - range.first >= rows) return true;
    const index begin = range.first % rows, end = (range.second - 1) % rows;
    return begin <= end ? i <= end && stop > begin : i <= end || stop > begin;
  }

  std::size_t columns_;
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
// of another; `corner` is the first of them. Of explicit rows the columns l0 .. l1 - 1, and with the first of them the factors.
template <class T>
void tiles_of(const Side<T>& a, index i0, index i1, const Side<T>& b, index panel, int count, bool same, const T* weights,
              const std::vector<char>& repeated, const Shared<T>* shared, index l0, index l1, bool add, T* scratch, T* corner,
              index ld) {
  const Tiles<T>& t = tiles<T>();
  const index j = panel * t.width, columns = count * t.width;
  bool first = !add;
  for (const Factors<T>& p : a.factors)
    for (const Factors<T>& q : b.factors) {
      if (p.parameter != q.parameter || l0 > 0) continue;
      const bool shares = SharedProducts<T>::needed(a, b) && !repeated[std::size_t(p.parameter)];
      const T weight = weights[p.parameter], shift = p.fused_bias >= 0 ? weights[p.fused_bias] : T(0);
      // Rows p of J are outer products y (x) c of a high and a low vector, and the product of two of them that of the high
      // ones times that of the low ones: (C C'^T) * (Y Y'^T), or (Y C'^T) * (C Y'^T) where roles are exchanged.
      const bool alike = p.m_is_high == q.m_is_high;
      const Panels<T>&left = alike ? p.constants : p.cotangents, &other = alike ? p.cotangents : p.constants;
      const Group<T> right(q.constants, shares ? 0 : panel, count), cotangents(q.cotangents, panel, count);
      for (index i = i0; i < i1; i += t.rows) {
        const index valid = std::min(t.rows, i1 - i);
        const int from = same ? int(std::max<index>(i - j, 0) / t.width) : 0;   // panels left of the diagonal
        T *s = scratch + from * t.width, *out = corner + (i - i0) * ld + from * t.width;
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
  for (index l = l0; l < l1; l += kDepth) {
    const index depth = std::min(kDepth, l1 - l);
    const Group<T> right(b.explicit_rows, panel, count, l);
    for (index i = i0; i < i1; i += t.rows) {
      const int from = same ? int(std::max<index>(i - j, 0) / t.width) : 0;
      t.product(count - from, std::min(t.rows, i1 - i), depth, row_of(a.explicit_rows, i, l), right.at + from,
                corner + (i - i0) * ld + from * t.width, ld, !first);
    }
    first = false;
  }
  if (first)
    for (index i = i0; i < i1; ++i) std::memset(corner + (i - i0) * ld, 0, sizeof(T) * std::size_t(columns));
}

}  // namespace

template <class T>
index pass_elements(index num_residuals) {
  const index forced = number_from_environment("PGDFAST_PASS_BYTES", -1);
  if (forced >= 0) return forced / index(sizeof(T));
  return std::max(limits::kPassBytes / index(sizeof(T)), num_residuals * num_residuals / limits::kPassPart);
}

template <class T>
void gram_of_sides(const std::vector<Side<T>>& A, const std::vector<Side<T>>& B, bool same, index first, index last,
                   const T* weights, const std::vector<char>& repeated, bool add, int threads, GramScratch<T>& scratch, T* K,
                   index ld) {
  const Tiles<T>& t = tiles<T>();
  const index group = kTilePanels * t.width;
  // One item: a few rows of K with all columns, or those from the diagonal on.
  struct Item {
    std::size_t side;
    index row;
  };
  std::vector<Item> items;
  std::vector<std::pair<index, index>> ranges;   // of every side
  for (std::size_t a = 0; a < A.size(); ++a) {
    const index base = A[a].block->base;
    ranges.emplace_back(std::clamp<index>(first - base, 0, A[a].count), std::clamp<index>(last - base, 0, A[a].count));
    for (index i = ranges[a].first / t.rows * t.rows; i < ranges[a].second; i += group) items.push_back({a, i});
  }
  const SharedProducts<T> shared(A, B, same, ranges, repeated, scratch.shared, threads);
  scratch.threads.resize(std::max(scratch.threads.size(), std::size_t(threads)));
  for (std::vector<T>& own : scratch.threads) ensure(own, (t.rows + group) * group);
  index depth = 0, rows = 0;
  for (const Side<T>& b : B) {
    depth = b.explicit_rows.depth;   // all have as many
    rows += b.count;
  }
  const auto take = [&](const Item& item, index l0, index l1, bool onto, T* own) {
    const Side<T>& a = A[item.side];
    const index begin = std::max(item.row, ranges[item.side].first), end = std::min(item.row + group, ranges[item.side].second);
    T* apart = own + t.rows * group;
    for (std::size_t other = same ? item.side : 0; other < B.size(); ++other) {
      const Side<T>& b = B[other];
      const bool diagonal = same && other == item.side;
      const index panels = (b.count + t.width - 1) / t.width;
      for (index p = diagonal ? item.row / t.width : 0; p < panels; p += kTilePanels) {
        const int count = int(std::min<index>(kTilePanels, panels - p));
        const index j = p * t.width, columns = count * t.width, kept = std::min(columns, b.count - j);
        const index stop = diagonal ? std::min(end, j + columns) : end;   // tiles below the diagonal
        T* corner = K + (a.block->base + begin) * ld + b.block->base + j;
        const bool whole = begin == item.row && kept == columns;   // else tiles reach elements that are not theirs
        tiles_of(a, item.row, stop, b, p, count, diagonal, weights, repeated, shared.of(item.side, other), l0, l1, whole && onto,
                 own, whole ? corner : apart, whole ? ld : columns);
        for (index i = begin; !whole && i < stop; ++i, corner += ld) {
          const T* from = apart + (i - item.row) * columns;
          for (index l = 0; l < kept; ++l) corner[l] = from[l] + (onto ? corner[l] : T(0));
        }
      }
    }
  };
  const index slice = std::max(kSliceBytes / index(sizeof(T)) / std::max<index>(rows, 1) / kDepth * kDepth, kLeastSlice);
  for (index l = 0; l == 0 || l < depth; l += slice)
    each_item(threads, index(items.size()), [&](index number, int thread) {
      take(items[std::size_t(number)], l, std::min(l + slice, depth), add || l > 0, scratch.threads[std::size_t(thread)].data());
    });
}

template <class T>
index gram_stride(index num_residuals) {
  return (num_residuals / tiles<T>().width + 2) * tiles<T>().width;
}

template <class T>
void gram(const Bound<T>& program, const RowLayout& layout, const T* weights, Workspace<T>& work, T* K) {
  const Tiles<T>& t = tiles<T>();
  const Structure& s = *program.structure;
  const index ld = gram_stride<T>(s.num_residuals);
  unit_sweeps(program, layout, work);
  const Passes passes = plan_passes(s, layout, t.width, pass_elements<T>(s.num_residuals));
  for (const Pass& pass : passes.list) {
    const bool add = &pass != passes.list.data();
    double depth = double(pass.columns);
    for (const Use& use : layout.uses) {
      const MatMul& g = s.instructions[std::size_t(use.instruction)].matmul;
      if (pass.factored[std::size_t(use.parameter)] && use.form == Form::factored)
        depth += double(g.m + g.k) * double(g.n) / double(layout.num_rows);
    }
    const int threads = threads_for(depth * double(s.num_residuals) * double(s.num_residuals));
    const std::vector<Side<T>> sides = pack_pass<T>(program, layout, weights, passes, pass, threads, work, [&](index elements) {
      ensure(work.packed, elements);
      return work.packed.data();
    });
    gram_of_sides(sides, sides, true, index(0), s.num_residuals, weights, passes.repeated, add, threads, work.gram, K, ld);
  }
}

#define PGDFAST_INSTANTIATE(T)             \
  template index gram_stride<T>(index);    \
  template index pass_elements<T>(index);  \
  template void gram_of_sides<T>(const std::vector<Side<T>>&, const std::vector<Side<T>>&, bool, index, index, const T*, \
                                 const std::vector<char>&, bool, int, GramScratch<T>&, T*, index);                     \
  template void gram<T>(const Bound<T>&, const RowLayout&, const T*, Workspace<T>&, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
