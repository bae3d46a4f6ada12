#include "normal.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../plan/blas.h"
#include "parallel.h"
#include "tiles.h"

namespace pgdfast {
namespace {

constexpr index kDepth = 192;   // rows whose products are summed at once: one group of panels stays in the first-level cache

// A use's Jacobian rows in one block as outer products: element (m, k) of the weight at offset + m * ms + k * ks.
template <class T>
struct Outer {
  const Block* block;
  int parameter;
  index offset, m, k, ms, ks;
  const T *y, *c;   // panels over m, one set per output, and over k; their depth is the block's rows
  bool m_is_high() const { return k == 1 || (m == 1 ? ks == 1 : ms > ks); }
};

template <class T>
class Outers {
 public:
  Outers(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work)
      : program_(program), layout_(layout), work_(work), s_(*program.structure) {}

  std::vector<Outer<T>> run() {
    index size = 0, columns = 0;
    for (const Block& block : layout_.blocks)
      for (const Use& use : layout_.uses)
        if (touches(use, block)) {
          const auto [m, k] = extents(use);
          size += (panels_of(m) * block.outputs + panels_of(k)) * block.rows;
          if (use.form != Form::factored) columns = std::max(columns, m);
        }
    ensure(work_.packed, size * tiles<T>().width);
    ensure(work_.rows, columns * s_.num_residuals);
    next_ = work_.packed.data();
    std::vector<Outer<T>> outers;
    for (const Use& use : layout_.uses) {
      if (use.form != Form::factored && seen(use)) continue;
      if (use.form != Form::factored) explicit_rows(use.parameter);
      for (const Block& block : layout_.blocks)
        if (touches(use, block)) outers.push_back(outer(use, block));
    }
    return outers;
  }

 private:
  static index panels_of(index count) { return (count + tiles<T>().width - 1) / tiles<T>().width; }
  const Instruction& instruction(const Use& use) const { return s_.instructions[std::size_t(use.instruction)]; }

  std::pair<index, index> extents(const Use& use) const {
    if (use.form == Form::factored) return {instruction(use).matmul.m, instruction(use).matmul.k};
    return {s_.buffers[std::size_t(use.parameter)].size, 1};
  }

  bool touches(const Use& use, const Block& block) const {
    if (use.form != Form::factored) return true;
    return block.before(use.row0) < block.before(use.row0 + instruction(use).matmul.n);
  }

  // Explicit rows hold all uses of a parameter, so they are taken with the first.
  bool seen(const Use& use) const {
    for (const Use& other : layout_.uses) {
      if (&other == &use) return false;
      if (other.parameter == use.parameter) return true;
    }
    return false;
  }

  void explicit_rows(int parameter) {
    const index size = s_.buffers[std::size_t(parameter)].size;
    std::memset(work_.rows.data(), 0, sizeof(T) * std::size_t(size * s_.num_residuals));
    for (const Use& use : layout_.uses)
      for (index o = 0; use.parameter == parameter && o < layout_.max_outputs; ++o)
        add_rows(program_, layout_, use, instruction(use), work_.arenas.data() + o * s_.arena_size, layout_.k_index, o,
                 work_.rows.data(), size);
  }

  const T* pack(index count, index depth, const T* x, index row, index column) {
    T* out = next_;
    tiles<T>().pack(count, depth, x, row, column, out, depth * tiles<T>().width);
    next_ += panels_of(count) * depth * tiles<T>().width;
    return out;
  }

  // Packs the rows of a block that a use reaches, with zeros for the others; x is that of the use's first row.
  const T* pack_rows(index count, const Use& use, const Block& block, const T* x, index row, index column) {
    const index width = tiles<T>().width, n = instruction(use).matmul.n;
    const index begin = block.before(use.row0), end = block.before(use.row0 + n);
    T* out = next_;
    next_ += panels_of(count) * block.rows * width;
    if (end - begin < block.rows) std::memset(out, 0, sizeof(T) * std::size_t(next_ - out));
    for (index i = begin; i < end;) {   // rows one after the other at once
      index stop = i + 1;
      while (stop < end && block.row(stop) == block.row(stop - 1) + 1) ++stop;
      tiles<T>().pack(count, stop - i, x + (block.row(i) - use.row0) * column, row, column, out + i * width, block.rows * width);
      i = stop;
    }
    return out;
  }

  Outer<T> outer(const Use& use, const Block& block) {
    const index parameter = s_.buffers[std::size_t(use.parameter)].offset;
    const auto [m, k] = extents(use);
    if (use.form != Form::factored) {
      Outer<T> result{&block, use.parameter, parameter, m, 1, 1, 1, next_, nullptr};
      for (index o = 0; o < block.outputs; ++o)
        pack(m, block.rows, work_.rows.data() + (block.base + o * block.rows) * m, 1, m);
      const T one = T(1);
      result.c = pack(1, block.rows, &one, 0, 0);
      return result;
    }
    const Instruction& op = instruction(use);
    const MatMul& g = op.matmul;
    Outer<T> result{&block, use.parameter, parameter + op.x_offset, m, k, g.xm, g.xk, next_, nullptr};
    for (index o = block.first_output; o < block.first_output + block.outputs; ++o)
      pack_rows(m, use, block, cotangent(s_, op, work_.arenas.data() + o * s_.arena_size), g.ym, g.yn);
    result.c = pack_rows(k, use, block, program_.constants[std::size_t(op.constant)].data + op.c_offset, g.ck, g.cn);
    return result;
  }

  const Bound<T>& program_;
  const RowLayout& layout_;
  Workspace<T>& work_;
  const Structure& s_;
  T* next_ = nullptr;
};

// Products of one element of u's factor with all of v's, a chunk of rows deep and summed over outputs: panels over v's.
template <class T>
void weighted(const T* u, index u_count, index element, const T* v, index v_count, index outputs, index rows, index begin,
              index depth, T* out) {
  const Tiles<T>& t = tiles<T>();
  const auto panels_of = [&](index count) { return (count + t.width - 1) / t.width; };
  const index stride = rows * t.width, u_panels = panels_of(u_count), v_panels = panels_of(v_count);
  for (index p = 0; p < v_panels; ++p)
    for (index o = 0; o < outputs; ++o)
      t.scale_panel(depth, u + (o * u_panels + element / t.width) * stride + begin * t.width + element % t.width,
                    v + (o * v_panels + p) * stride + begin * t.width, out + p * depth * t.width, o > 0);
}

// out[i * ld + j] += sum over a chunk of a_i b_j for `rows` elements of a and `columns` of b, where any j reaches `kept`.
template <class T>
void add_product(const T* a, index a_stride, index rows, const T* b, index b_stride, index columns, index depth, T* out,
                 index ld, index kept_ld, index kept) {
  const Tiles<T>& t = tiles<T>();
  const index panels = (columns + t.width - 1) / t.width;
  for (index p = 0; p < panels; p += kTilePanels) {
    const int count = int(std::min<index>(kTilePanels, panels - p));
    const T* right[kTilePanels];
    for (int v = 0; v < count; ++v) right[v] = b + (p + v) * b_stride;
    for (index i = 0; i < rows; i += t.rows) {
      const index valid = std::min(t.rows, rows - i);
      if ((i + valid - 1) * kept_ld + std::min(columns, (p + count) * t.width) <= kept) continue;   // left of the diagonal
      t.product(count, valid, depth, a + i / t.width * a_stride + i % t.width, right, out + i * ld + p * t.width, ld, true);
    }
  }
}

// What the pair (u, v) adds to the rows of H that belong to element m of u.
template <class T>
void add_pair(const Outer<T>& u, index m, const Outer<T>& v, T* scratch, T* H, index ld) {
  const Tiles<T>& t = tiles<T>();
  const index rows = u.block->rows, outputs = u.block->outputs;
  const auto padded = [&](index count) { return (count + t.width - 1) / t.width * t.width; };
  T *cotangents = scratch, *constants = scratch + padded(v.m) * kDepth;
  for (index begin = 0; begin < rows; begin += kDepth) {
    const index depth = std::min(kDepth, rows - begin), step = depth * t.width;
    weighted(u.y, u.m, m, v.y, v.m, outputs, rows, begin, depth, cotangents);
    if (v.k == 1 && v.ms == 1) {   // rows of H over k, columns over m'
      for (index p = 0; p < padded(v.m); p += t.width)
        for (index l = 0; l < step; l += t.width) {
          const T c = v.c[begin * t.width + l];
          for (index j = 0; j < t.width; ++j) cotangents[p * depth + l + j] *= c;
        }
      const index row = u.offset + m * u.ms;
      add_product(u.c + begin * t.width, rows * t.width, u.k, cotangents, step, v.m, depth, H + row * ld + v.offset, u.ks * ld,
                  index(0), row - v.offset);
      continue;
    }
    for (index k = 0; k < u.k; ++k) {
      const index row = u.offset + m * u.ms + k * u.ks;
      T* out = H + row * ld + v.offset;
      weighted(u.c, u.k, k, v.c, v.k, 1, rows, begin, depth, constants);
      if (v.m_is_high()) add_product(cotangents, step, v.m, constants, step, v.k, depth, out, v.ms, v.ms, row - v.offset);
      else add_product(constants, step, v.k, cotangents, step, v.m, depth, out, v.ks, v.ks, row - v.offset);
    }
  }
}

}  // namespace

template <class T>
void normal(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* H, index ld) {
  const Tiles<T>& t = tiles<T>();
  const Structure& s = *program.structure;
  unit_sweeps(program, layout, work);
  const std::vector<Outer<T>> outers = Outers<T>(program, layout, work).run();
  const int threads = threads_for(2.0 * double(layout.num_rows) * double(s.num_parameters) * double(s.num_parameters));
  index widest = 0;
  for (const Outer<T>& u : outers) widest = std::max(widest, u.m + u.k + 2 * t.width);
  work.scratch.resize(std::max(work.scratch.size(), std::size_t(threads)));
  for (std::vector<T>& scratch : work.scratch) ensure(scratch, widest * kDepth);
  for (const Outer<T>& u : outers)
    each_item(threads, u.m, [&](index m, int thread) {
      for (const Outer<T>& v : outers)
        if (u.block == v.block && u.parameter <= v.parameter)
          add_pair(u, m, v, work.scratch[std::size_t(thread)].data(), H, ld);
    });
}

template <class T>
void symmetric_product(const T* A, index n, index count, index row, index column, Workspace<T>& work, T* H, index ld,
                       bool add) {
  const Tiles<T>& t = tiles<T>();
  const index panels = (n + t.width - 1) / t.width, stride = kDepth * t.width, group = kTilePanels * t.width;
  const int threads = threads_for(double(count) * double(n) * double(n));
  ensure(work.packed, panels * stride);
  T* packed = work.packed.data();
  for (index begin = 0; begin < count; begin += kDepth) {
    const index depth = std::min(kDepth, count - begin);
    each_item(threads, (n + group - 1) / group, [&](index g, int) {
      const index first = g * group;
      t.pack(std::min(group, n - first), depth, A + begin * column + first * row, row, column, packed + first / t.width * stride,
             stride);
    });
    each_item(threads, (n + group - 1) / group, [&](index g, int) {
      const index first = g * group, rows = std::min(group, n - first);
      for (index p = first / t.width; p < panels; p += kTilePanels) {
        const int width = int(std::min<index>(kTilePanels, panels - p));
        const T* right[kTilePanels];
        for (int v = 0; v < width; ++v) right[v] = packed + (p + v) * stride;
        for (index i = 0; i < rows; i += t.rows)
          t.product(width, std::min(t.rows, rows - i), depth, packed + (first + i) / t.width * stride + i % t.width, right,
                    H + (first + i) * ld + p * t.width, ld, add || begin > 0);
      }
    });
  }
}

#define PGDFAST_INSTANTIATE(T)                                                                \
  template void normal<T>(const Bound<T>&, const RowLayout&, Workspace<T>&, T*, index);       \
  template void symmetric_product<T>(const T*, index, index, index, index, Workspace<T>&, T*, index, bool);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
