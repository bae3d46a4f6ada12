#include "factors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace pgdfast {
namespace {

const MatMul& product(const Structure& s, const Use& use) { return s.instructions[std::size_t(use.instruction)].matmul; }

bool touches(const Structure& s, const Use& use, const Block& block) {
  return use.form == Form::factored && block.before(use.row0) < block.before(use.row0 + product(s, use).n);
}

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
    const MatMul& g = product(s, use);
    if (use.parameter != parameter) continue;
    for (const auto& [stride, extent] : {std::pair(g.xb, g.b), std::pair(g.xm, g.m), std::pair(g.xk, g.k)})
      if (extent > 1 && (!found.takes(stride) || (stride == 1 && extent > found.fold))) return {};
  }
  return size % found.fold == 0 ? found : Folding{};
}

// The stride of a matrix's high dimension, along which all its uses can be cut; 0 where they cannot.
index high_stride(const Structure& s, const RowLayout& layout, int parameter) {
  index high = 0;
  for (int round = 0; round < 2; ++round)   // the largest stride, then whether all else lies below it
    for (const Use& use : layout.uses) {
      if (use.parameter != parameter) continue;
      const Instruction& op = s.instructions[std::size_t(use.instruction)];
      const MatMul& g = op.matmul;
      if (op.kind != Kind::matmul || g.b != 1 || g.outer != 1) return 0;
      const index xm = g.m > 1 ? g.xm : 0, xk = g.k > 1 ? g.xk : 0;
      if (round == 0) high = std::max({high, xm, xk});
      else if (high == 0 || op.x_offset % high || (xm == high) == (xk == high)) return 0;
      else if ((xm == high ? (g.k - 1) * xk : (g.m - 1) * xm) >= high) return 0;
    }
  return high;
}

// The part of a use that reaches indices h0 .. h1 - 1 of the high dimension; false where none does.
bool cut(Instruction& op, index high, index h0, index h1) {
  MatMul& g = op.matmul;
  const bool m_is_high = g.m > 1 && g.xm == high;
  index& extent = m_is_high ? g.m : g.k;
  const index base = op.x_offset / high, from = std::max<index>(h0 - base, 0), to = std::min(h1 - base, extent);
  if (from >= to) return false;
  if (m_is_high) op.y_offset += from * g.ym;
  else op.c_offset += from * g.ck;
  op.x_offset += (from - h0) * high;
  extent = to - from;
  return true;
}

bool repeats(const Passes& passes, int parameter, const Block& block) {
  return passes.repeated[std::size_t(parameter)] && block.outputs > 1;
}

index panels_of(index rows, index width) { return (rows + width - 1) / width; }

// Elements that a weight's factors take, packed.
index packed_elements(const Structure& s, const RowLayout& layout, const Passes& passes, int parameter, index width) {
  index elements = 0;
  for (const Block& block : layout.blocks)
    for (const Use& use : layout.uses) {
      if (use.parameter != parameter || !touches(s, use, block)) continue;
      const index count = block.rows * block.outputs;
      elements += panels_of(repeats(passes, parameter, block) ? count : block.rows, width) * width * product(s, use).k;
      elements += panels_of(count, width) * width * product(s, use).m;
    }
  return elements;
}

// Elements of the products of its constants that outputs share.
index shared_elements(const Structure& s, const RowLayout& layout, int parameter, index width) {
  index elements = 0;
  const auto uses = [&](const Block& block) {
    index count = 0;
    for (const Use& use : layout.uses) count += use.parameter == parameter && touches(s, use, block);
    return count;
  };
  for (std::size_t a = 0; a < layout.blocks.size(); ++a)
    for (std::size_t b = a; b < layout.blocks.size(); ++b) {
      const Block &left = layout.blocks[a], &right = layout.blocks[b];
      if (left.outputs > 1 || right.outputs > 1)
        elements += uses(left) * uses(right) * left.rows * panels_of(right.rows, width) * width;
    }
  return elements;
}

void add_slices(const Structure& s, const RowLayout& layout, int parameter, index budget, std::vector<Pass>& list) {
  const index size = s.buffers[std::size_t(parameter)].size, per_column = 2 * s.num_residuals;
  const auto room = [&] { return (budget - list.back().elements) / per_column; };
  const auto add = [&](index first, index count, index fold) {
    Pass& pass = list.back();
    pass.slices.push_back({parameter, first, count, pass.columns, Folding{fold, count}});
    pass.columns += count;
    pass.elements += count * per_column;
  };
  const index fold = folding(s, layout, parameter).fold;
  const index high = size > budget / per_column ? high_stride(s, layout, parameter) : 0;
  if (high == 0 || (fold > 1 && fold != high)) {
    if (size > room() && list.back().elements > 0) list.emplace_back();
    add(0, size, fold);
    return;
  }
  for (index h = 0; h < size / high;) {
    if (room() < high && list.back().elements > 0) list.emplace_back();
    const index count = std::min(std::max<index>(room() / high, 1), size / high - h);
    add(h * high, count * high, fold);
    h += count;
  }
}

// Columns of J: M x pass.columns in work.rows.
template <class T>
void explicit_rows(const Bound<T>& program, const RowLayout& layout, const T* weights, const Pass& pass, Workspace<T>& work) {
  const Structure& s = *program.structure;
  const index size = s.num_residuals * pass.columns;
  ensure(work.rows, size);
  std::memset(work.rows.data(), 0, sizeof(T) * std::size_t(size));
  for (const Slice& slice : pass.slices) {
    const index whole = s.buffers[std::size_t(slice.parameter)].size;
    const index high = slice.size == whole ? 0 : high_stride(s, layout, slice.parameter);
    for (const Use& use : layout.uses) {
      if (use.parameter != slice.parameter) continue;
      Instruction op = s.instructions[std::size_t(use.instruction)];
      if (high > 0 && !cut(op, high, slice.first / high, (slice.first + slice.size) / high)) continue;
      for (index o = 0; o < layout.max_outputs; ++o)
        add_rows(program, layout, use, op, work.arenas.data() + o * s.arena_size, layout.k_index, o,
                 work.rows.data() + slice.start, pass.columns, slice.folding);
    }
    if (weights[slice.parameter] == T(1)) continue;
    const T root = std::sqrt(weights[slice.parameter]);
    for (index i = 0; i < s.num_residuals; ++i)
      for (index j = 0; j < slice.size; ++j) work.rows[std::size_t(i * pass.columns + slice.start + j)] *= root;
  }
}

template <class T>
class Packing {
 public:
  Packing(const Bound<T>& program, const RowLayout& layout, const Passes& passes, const Pass& pass, Workspace<T>& work)
      : program_(program), layout_(layout), passes_(passes), pass_(pass), work_(work), s_(*program.structure) {}

  std::vector<Side<T>> run(int threads, const std::function<T*(index)>& memory) {
    const index width = tiles<T>().width;
    index size = 0, copied = 0;
    for (int l = 0; l < s_.num_parameter_buffers; ++l)
      if (pass_.factored[std::size_t(l)]) size += packed_elements(s_, layout_, passes_, l, width);
    for (const Block& block : layout_.blocks) {
      size += panels_of(block.rows * block.outputs, width) * width * pass_.columns;
      for (const Use& use : layout_.uses)
        if (taken(use, block)) {
          const index times = repeats(passes_, use.parameter, block) ? block.outputs : 1;
          if (!whole(use, block) || times > 1) copied += block.rows * times * product(s_, use).k;
          if (!whole(use, block) || block.outputs > 1) copied += block.rows * block.outputs * product(s_, use).m;
        }
    }
    ensure(work_.copy, copied);
    next_ = memory(size);
    copy_ = work_.copy.data();
    std::vector<Side<T>> sides;
    for (const Block& block : layout_.blocks) {
      Side<T> side{&block, block.rows * block.outputs, {}, {}};
      for (const Use& use : layout_.uses)
        if (taken(use, block)) side.factors.push_back(factors(use, block));
      if (pass_.columns > 0)
        side.explicit_rows =
            pack(side.count, pass_.columns, work_.rows.data() + block.base * pass_.columns, pass_.columns, 1);
      sides.push_back(std::move(side));
    }
    each_item(threads, index(jobs_.size()), [&](index number, int) {
      const Job& job = jobs_[std::size_t(number)];
      tiles<T>().pack(job.count, job.depth, job.x, job.row, job.column, job.out, job.depth * width);
    });
    return sides;
  }

 private:
  bool taken(const Use& use, const Block& block) const {
    return pass_.factored[std::size_t(use.parameter)] && touches(s_, use, block);
  }

  // Does the use reach all rows of the block, one after the other?
  bool whole(const Use& use, const Block& block) const {
    return block.list.empty() && use.row0 <= block.r0 && block.r0 + block.rows <= use.row0 + product(s_, use).n;
  }

  Panels<T> pack(index count, index depth, const T* x, index row, index column) {
    const index width = tiles<T>().width, piece = kPiece * width;
    const Panels<T> panels{next_, depth * width, depth};
    for (index i = 0; i < count; i += piece)
      jobs_.push_back({std::min(piece, count - i), depth, row, column, x + i * row, next_ + i * depth});
    next_ += panels_of(count, width) * panels.stride;
    return panels;
  }

  // Constants by row; cotangents by output, then row. Rows of the block that the use does not reach are zero.
  Factors<T> factors(const Use& use, const Block& block) {
    const Instruction& op = s_.instructions[std::size_t(use.instruction)];
    const MatMul& g = op.matmul;
    const T* c = program_.constants[std::size_t(op.constant)].data + op.c_offset;   // of the use's first row
    const T* y = cotangent(s_, op, work_.arenas.data() + block.first_output * s_.arena_size);
    const index skipped = block.r0 - use.row0;   // where the block is whole
    Factors<T> result{use.parameter, use.fused_bias, use.m_is_high, {}, {}, op.x_offset, g.xm, g.xk};
    const index times = repeats(passes_, use.parameter, block) ? block.outputs : 1;
    if (whole(use, block) && times == 1) {
      result.constants = pack(block.rows, g.k, c + skipped * g.cn, g.cn, g.ck);
    } else {
      result.constants = pack(block.rows * times, g.k, copy(use, block, times, g.k, c, 0, g.cn, g.ck), g.k, 1);
    }
    if (whole(use, block) && block.outputs == 1) {
      result.cotangents = pack(block.rows, g.m, y + skipped * g.yn, g.yn, g.ym);
    } else {
      const T* ordered = copy(use, block, block.outputs, g.m, y, s_.arena_size, g.yn, g.ym);
      result.cotangents = pack(block.rows * block.outputs, g.m, ordered, g.m, 1);
    }
    return result;
  }

  // The rows of a block in K's order, output by output.
  const T* copy(const Use& use, const Block& block, index outputs, index depth, const T* x, index output, index row,
                index column) {
    T *const start = copy_, *out = copy_;
    copy_ += outputs * block.rows * depth;
    for (index o = 0; o < outputs; ++o)
      for (index i = 0; i < block.rows; ++i, out += depth) {
        const index at = block.row(i) - use.row0;
        if (at < 0 || at >= product(s_, use).n) std::memset(out, 0, sizeof(T) * std::size_t(depth));
        else simd<T>().muladd(depth, T(1), nullptr, 0, x + o * output + at * row, column, out, 1, true);
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
  const Passes& passes_;
  const Pass& pass_;
  Workspace<T>& work_;
  const Structure& s_;
  std::vector<Job> jobs_;
  T *next_ = nullptr, *copy_ = nullptr;
};

}  // namespace

Passes plan_passes(const Structure& s, const RowLayout& layout, index width, index budget) {
  const std::size_t buffers = std::size_t(s.num_parameter_buffers);
  Passes passes;
  passes.repeated.assign(buffers, 0);
  passes.list.emplace_back();
  std::vector<int> high(buffers, -1);
  for (const Use& use : layout.uses) {
    if (use.form != Form::factored) continue;
    int& known = high[std::size_t(use.parameter)];
    if (known >= 0 && known != int(use.m_is_high)) passes.repeated[std::size_t(use.parameter)] = 1;
    known = use.m_is_high;
  }
  std::vector<char> seen(buffers, 0);
  std::vector<std::pair<std::size_t, int>> members;   // pass, factored parameter
  for (const Use& use : layout.uses) {
    char& met = seen[std::size_t(use.parameter)];
    if (met || use.form == Form::fused_bias) continue;
    met = 1;
    if (use.form == Form::rows) {
      add_slices(s, layout, use.parameter, budget, passes.list);
      continue;
    }
    char& repeated = passes.repeated[std::size_t(use.parameter)];
    index shared = repeated ? 0 : shared_elements(s, layout, use.parameter, width);
    if (shared > budget / 2) repeated = 1, shared = 0;
    const index elements = packed_elements(s, layout, passes, use.parameter, width) + shared;
    if (passes.list.back().elements > 0 && passes.list.back().elements + elements > budget) passes.list.emplace_back();
    passes.list.back().elements += elements;
    members.emplace_back(passes.list.size() - 1, use.parameter);
  }
  for (Pass& pass : passes.list) pass.factored.assign(buffers, 0);
  for (const auto& [number, parameter] : members) passes.list[number].factored[std::size_t(parameter)] = 1;
  return passes;
}

template <class T>
std::vector<Side<T>> pack_pass(const Bound<T>& program, const RowLayout& layout, const T* weights, const Passes& passes,
                               const Pass& pass, int threads, Workspace<T>& work,
                               const std::function<T*(index)>& memory) {
  if (pass.columns > 0) explicit_rows(program, layout, weights, pass, work);
  return Packing<T>(program, layout, passes, pass, work).run(threads, memory);
}

#define PGDFAST_INSTANTIATE(T)                                                                            \
  template std::vector<Side<T>> pack_pass<T>(const Bound<T>&, const RowLayout&, const T*, const Passes&, \
                                             const Pass&, int, Workspace<T>&,                              \
                                             const std::function<T*(index)>&);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
