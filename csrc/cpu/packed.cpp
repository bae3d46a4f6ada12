#include "packed.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "../plan/blas.h"
#include "gram.h"
#include "parallel.h"
#include "simd.h"

namespace pgdfast {
namespace {

constexpr index kFormat = 1;   // of headers

enum class Has { nothing, columns, factors, fused };

// The elements of a weight that its factors reach: offset, then extents and strides of its high and its low dimension.
struct Window {
  index offset, high, high_stride, low, low_stride;
  bool operator==(const Window&) const = default;
};

template <class T>
Window window_of(const Factors<T>& f) {
  const index m = f.cotangents.depth, k = f.constants.depth, ms = m > 1 ? f.m_stride : 0, ks = k > 1 ? f.k_stride : 0;
  if (f.m_is_high) return {f.offset, m, ms, k, ks};
  return {f.offset, k, ks, m, ms};
}

// How a part has one parameter.
struct Own {
  Has has = Has::nothing;
  int weight = -1;        // fused: the weight whose bias it is
  Window window{};        // factors
  bool high = false, low = false;   // in which roles cotangents run
};

template <class T>
std::vector<Own> owned(const Packed<T>& packed) {
  std::vector<Own> own(packed.sizes.size());
  for (const Slice& slice : packed.slices) own[std::size_t(slice.parameter)].has = Has::columns;
  for (const Side<T>& side : packed.sides)
    for (const Factors<T>& f : side.factors) {
      Own& mine = own[std::size_t(f.parameter)];
      mine.has = Has::factors;
      mine.window = window_of(f);   // that of all uses: see linear/rows.py
      (f.m_is_high ? mine.high : mine.low) = true;
      if (f.fused_bias >= 0) {
        own[std::size_t(f.fused_bias)].has = Has::fused;
        own[std::size_t(f.fused_bias)].weight = f.parameter;
      }
    }
  return own;
}

// What both sides of a product have in common.
struct Common {
  std::vector<char> factored, fused, repeated;   // per parameter
  std::vector<int> columns;                      // parameters with explicit rows, ascending
};

bool overlap(const std::vector<Slice>& a, const std::vector<Slice>& b) {   // are they the same columns in the same order?
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Slice& x, const Slice& y) {
    return x.parameter == y.parameter && x.first == y.first && x.size == y.size && x.folding.fold == y.folding.fold;
  });
}

template <class T>
Common common(const Packed<T>& a, const Packed<T>& b) {
  const std::vector<Own> left = owned(a), right = owned(b);
  const std::size_t buffers = a.sizes.size();
  Common found{std::vector<char>(buffers, 0), std::vector<char>(buffers, 0), std::vector<char>(buffers, 0), {}};
  for (std::size_t l = 0; l < buffers; ++l) {
    const Own &x = left[l], &y = right[l];
    found.factored[l] = x.has == Has::factors && y.has == Has::factors && x.window == y.window;
    found.repeated[l] = a.repeated[l] || b.repeated[l] || ((x.high || y.high) && (x.low || y.low));
  }
  for (std::size_t l = 0; l < buffers; ++l) {
    const Own &x = left[l], &y = right[l];
    if (x.has == Has::nothing || y.has == Has::nothing || found.factored[l]) continue;
    found.fused[l] = x.has == Has::fused && y.has == Has::fused && x.weight == y.weight && found.factored[std::size_t(x.weight)];
    if (!found.fused[l]) found.columns.push_back(int(l));
  }
  return found;
}

// Constants are repeated for every output where the products that outputs share would take too much, as in plan_passes.
template <class T>
void limit_shared(const Packed<T>& a, const Packed<T>& b, Common& both) {
  const index width = tiles<T>().width, most = pass_elements<T>(std::max(a.count, b.count)) / 2;
  std::vector<index> shared(a.sizes.size(), 0);
  for (const Side<T>& x : a.sides)
    for (const Side<T>& y : b.sides) {
      if (x.block->outputs == 1 && y.block->outputs == 1) continue;
      for (const Factors<T>& p : x.factors)
        for (const Factors<T>& q : y.factors)
          if (p.parameter == q.parameter)
            shared[std::size_t(p.parameter)] += x.block->rows * ((y.block->rows + width - 1) / width * width);
    }
  for (std::size_t l = 0; l < shared.size(); ++l)
    if (shared[l] > most) both.repeated[l] = 1;
}

// The sides of one of them as the other can meet them, in memory of their own where they are to be had in another form.
template <class T>
class View {
 public:
  // weights: explicit rows are multiplied with them; null: ones. as_they_are: so are the explicit rows.
  View(const Packed<T>& packed, const Common& both, const T* weights, bool as_they_are) : packed_(packed), both_(both) {
    const std::size_t width = std::size_t(tiles<T>().width);
    for (const Side<T>& side : packed.sides) {
      Side<T> mine{side.block, side.count, {}, {}};
      for (Factors<T> f : side.factors) {
        const std::size_t l = std::size_t(f.parameter);
        if (!both.factored[l]) continue;
        if (f.fused_bias >= 0 && !both.fused[std::size_t(f.fused_bias)]) f.fused_bias = -1;
        if (both.repeated[l] && !packed.repeated[l] && side.block->outputs > 1) f.constants = repeated(f.constants, side);
        mine.factors.push_back(f);
      }
      if (as_they_are) mine.explicit_rows = side.explicit_rows;
      else if (!both.columns.empty()) mine.explicit_rows = columns(side, weights, width);
      sides.push_back(std::move(mine));
    }
  }
  std::vector<Side<T>> sides;

 private:
  // Memory for panels of zeros.
  Panels<T> panels(index count, index depth, T*& to) {
    const index width = tiles<T>().width;
    memory_.emplace_back(std::size_t((count + width - 1) / width * width * depth), T(0));
    to = memory_.back().data();
    return {to, depth * width, depth};
  }

  Panels<T> repeated(const Panels<T>& given, const Side<T>& side) {
    const index width = tiles<T>().width;
    T* to;
    const Panels<T> made = panels(side.count, given.depth, to);
    for (index i = 0; i < side.count; ++i) {
      const index row = i % side.block->rows;
      const T* x = given.data + row / width * given.stride + row % width;
      T* y = to + i / width * made.stride + i % width;
      for (index l = 0; l < given.depth; ++l) y[l * width] = x[l * width];
    }
    return made;
  }

  Panels<T> columns(const Side<T>& side, const T* weights, std::size_t width_) {
    const index width = index(width_);
    index depth = 0;
    for (int l : both_.columns) depth += packed_.sizes[std::size_t(l)];
    T* to;
    const Panels<T> made = panels(side.count, depth, to);
    index start = 0;
    for (int l : both_.columns) {
      const T weight = weights ? weights[l] : T(1);
      for (const Slice& slice : packed_.slices) {   // one per parameter
        if (slice.parameter != l) continue;
        for (index p = 0; p * width < side.count; ++p)
          for (index x = 0; x < slice.size; ++x) {
            const T* from = side.explicit_rows.data + p * side.explicit_rows.stride + (slice.start + slice.folding.offset(x)) * width;
            T* out = to + p * made.stride + (start + x) * width;
            for (index i = 0; i < width; ++i) out[i] = weight * from[i];
          }
      }
      for (const Factors<T>& f : side.factors) {
        if (f.parameter == l) add_outer(f, side, weight, start, made, to);
        else if (f.fused_bias == l) add_bias(f, side, weight, start, made, to);
      }
      start += packed_.sizes[std::size_t(l)];
    }
    return made;
  }

  // The rows that factors stand for: constants (by row of the block, or by residual) times cotangents.
  void add_outer(const Factors<T>& f, const Side<T>& side, T weight, index start, const Panels<T>& made, T* to) {
    const index width = tiles<T>().width;
    const bool by_residual = packed_.repeated[std::size_t(f.parameter)];
    for (index i = 0; i < side.count; ++i) {
      const index row = by_residual ? i : i % side.block->rows;
      const T* c = f.constants.data + row / width * f.constants.stride + row % width;
      const T* y = f.cotangents.data + i / width * f.cotangents.stride + i % width;
      T* out = to + i / width * made.stride + (start + f.offset) * width + i % width;
      for (index m = 0; m < f.cotangents.depth; ++m)
        for (index k = 0; k < f.constants.depth; ++k)
          out[(m * f.m_stride + k * f.k_stride) * width] += weight * y[m * width] * c[k * width];
    }
  }

  void add_bias(const Factors<T>& f, const Side<T>& side, T weight, index start, const Panels<T>& made, T* to) {
    const index width = tiles<T>().width;
    for (index p = 0; p * width < side.count; ++p)
      for (index e = 0; e < f.cotangents.depth * width; ++e)
        to[p * made.stride + start * width + e] += weight * f.cotangents.data[p * f.cotangents.stride + e];
  }

  const Packed<T>& packed_;
  const Common& both_;
  std::vector<std::vector<T>> memory_;
};

class Reader {
 public:
  explicit Reader(const std::vector<index>& words) : words_(words) {}
  index next(index least, index most) {
    if (at_ == words_.size() || words_[at_] < least || words_[at_] > most)
      throw std::runtime_error("pgdfast: this is no header of packed factors");
    return words_[at_++];
  }
  index count() { return next(0, index(1) << 40); }
  bool done() const { return at_ == words_.size(); }

 private:
  const std::vector<index>& words_;
  std::size_t at_ = 0;
};

}  // namespace

template <class T>
std::vector<index> Packed<T>::header() const {
  std::vector<index> words{kFormat, index(sizeof(T)), tiles<T>().width, elements, count, index(sizes.size())};
  words.insert(words.end(), sizes.begin(), sizes.end());
  words.insert(words.end(), repeated.begin(), repeated.end());
  words.push_back(index(slices.size()));
  for (const Slice& s : slices) words.insert(words.end(), {index(s.parameter), s.size, s.start, s.folding.fold});
  words.push_back(index(sides.size()));
  const auto add = [&](const Panels<T>& p) {
    words.insert(words.end(), {p.data ? p.data - data : 0, p.depth});
  };
  for (const Side<T>& side : sides) {
    words.insert(words.end(), {side.block->rows, side.block->outputs, side.block->base});
    add(side.explicit_rows);
    words.push_back(index(side.factors.size()));
    for (const Factors<T>& f : side.factors) {
      words.insert(words.end(), {index(f.parameter), index(f.fused_bias), index(f.m_is_high), f.offset, f.m_stride, f.k_stride});
      add(f.constants);
      add(f.cotangents);
    }
  }
  return words;
}

template <class T>
std::shared_ptr<Packed<T>> read_packed(const std::vector<index>& header, const T* data, index elements) {
  Reader words(header);
  constexpr index kMost = index(1) << 40;
  words.next(kFormat, kFormat);
  if (words.next(4, 8) != index(sizeof(T))) throw std::runtime_error("pgdfast: packed factors of another dtype");
  const index width = tiles<T>().width, theirs = words.next(1, 1024);
  if (theirs != width)
    throw std::runtime_error("pgdfast: packed factors for tiles of " + std::to_string(theirs) + " rows; this process has tiles of " +
                             std::to_string(width) + ". Let all processes use one instruction set: set PGDFAST_ISA to the "
                             "least of theirs (python -m pgdfast tells)");
  auto made = std::make_shared<Packed<T>>();
  made->elements = words.next(elements, elements);
  made->data = data;
  made->count = words.count();
  const index buffers = words.count();
  for (index l = 0; l < buffers; ++l) made->sizes.push_back(words.count());
  for (index l = 0; l < buffers; ++l) made->repeated.push_back(char(words.next(0, 1)));
  index columns = 0;
  for (index i = words.count(); i > 0; --i) {
    Slice slice{int(words.next(0, buffers - 1)), 0, 0, 0, {}};
    slice.size = words.next(0, made->sizes[std::size_t(slice.parameter)]);
    slice.start = words.next(columns, columns);
    slice.folding = {words.next(1, kMost), slice.size};
    columns += slice.size;
    made->slices.push_back(slice);
  }
  const auto panels = [&](index rows, index least, index most) {
    Panels<T> p;
    const index start = words.next(0, elements);
    p.depth = words.next(least, most);
    p.stride = p.depth * width;
    if ((rows + width - 1) / width * p.stride > elements - start) throw std::runtime_error("pgdfast: a header beyond its numbers");
    p.data = data + start;
    return p;
  };
  index base = 0;
  const index sides = words.count();
  made->blocks.reserve(std::size_t(sides));
  for (index i = 0; i < sides; ++i) {
    const index rows = words.next(1, kMost), outputs = words.next(1, kMost);
    made->blocks.push_back({0, rows, outputs, words.next(base, base), 0, {}});
    base += rows * outputs;
    Side<T> side{&made->blocks.back(), rows * outputs, {}, panels(rows * outputs, columns, columns)};
    for (index f = words.count(); f > 0; --f) {
      Factors<T> factors{};
      factors.parameter = int(words.next(0, buffers - 1));
      factors.fused_bias = int(words.next(-1, buffers - 1));
      factors.m_is_high = words.next(0, 1) != 0;
      factors.offset = words.count();
      factors.m_stride = words.count();
      factors.k_stride = words.count();
      factors.constants =
          panels(made->repeated[std::size_t(factors.parameter)] && outputs > 1 ? rows * outputs : rows, 1, kMost);
      factors.cotangents = panels(rows * outputs, 1, kMost);
      const index reached = factors.offset + (factors.cotangents.depth - 1) * factors.m_stride +
                            (factors.constants.depth - 1) * factors.k_stride;
      if (reached >= made->sizes[std::size_t(factors.parameter)] ||
          (factors.fused_bias >= 0 && made->sizes[std::size_t(factors.fused_bias)] != factors.cotangents.depth))
        throw std::runtime_error("pgdfast: a header beyond its parameters");
      side.factors.push_back(factors);
    }
    made->sides.push_back(std::move(side));
  }
  if (base != made->count || !words.done()) throw std::runtime_error("pgdfast: this is no header of packed factors");
  return made;
}

template <class T>
std::shared_ptr<Packed<T>> pack(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work) {
  const Structure& s = *program.structure;
  unit_sweeps(program, layout, work);
  const Passes passes = plan_passes(s, layout, tiles<T>().width, std::numeric_limits<index>::max() / 8);   // one
  const std::vector<T> ones(std::size_t(s.num_parameter_buffers), T(1));
  auto made = std::make_shared<Packed<T>>();
  const int threads = threads_for(double(layout.max_outputs) * s.flops + double(passes.list[0].elements));
  made->sides = pack_pass<T>(program, layout, ones.data(), passes, passes.list[0], threads, work, [&](index elements) {
    made->own.reset(new T[std::size_t(elements)]);   // every element is written
    made->elements = elements;
    return made->own.get();
  });
  made->count = s.num_residuals;
  for (int l = 0; l < s.num_parameter_buffers; ++l) made->sizes.push_back(s.buffers[std::size_t(l)].size);
  made->blocks = layout.blocks;
  for (std::size_t i = 0; i < made->sides.size(); ++i) made->sides[i].block = &made->blocks[i];
  made->slices = passes.list[0].slices;
  made->repeated = passes.repeated;
  made->data = made->own.get();
  return made;
}

template <class T>
void gram_rows(const Packed<T>& a, const Packed<T>& b, index first, index last, const T* weights, T* K, index ld) {
  if (a.sizes != b.sizes) throw std::runtime_error("pgdfast: packed factors of other parameters");
  Common both = common(a, b);
  limit_shared(a, b, both);
  const bool alike = overlap(a.slices, b.slices) && both.columns.size() == a.slices.size();
  const bool weighed = std::any_of(both.columns.begin(), both.columns.end(), [&](int l) { return weights[l] != T(1); });
  const View<T> left(a, both, weighed ? weights : nullptr, alike && !weighed), right(b, both, nullptr, alike && !weighed);
  double depth = 0;
  for (const Side<T>& side : left.sides) {
    double own = double(side.explicit_rows.depth);
    for (const Factors<T>& f : side.factors) own += double(f.constants.depth + f.cotangents.depth);
    depth += own * double(side.count) / double(std::max<index>(a.count, 1));
  }
  const int threads = threads_for(depth * double(last - first) * double(b.count));
  GramScratch<T> scratch;
  gram_of_sides(left.sides, right.sides, &a == &b, first, last, weights, both.repeated, false, threads, scratch, K, ld);
}

#define PGDFAST_INSTANTIATE(T)                                                                                              \
  template struct Packed<T>;                                                                                                \
  template std::shared_ptr<Packed<T>> read_packed<T>(const std::vector<index>&, const T*, index);                            \
  template std::shared_ptr<Packed<T>> pack<T>(const Bound<T>&, const RowLayout&, Workspace<T>&);                            \
  template void gram_rows<T>(const Packed<T>&, const Packed<T>&, index, index, const T*, T*, index);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
