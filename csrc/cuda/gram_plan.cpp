#include "gram_plan.h"

#include <algorithm>

namespace pgdfast::cuda {
namespace {

index rounded(index n, index to) { return (n + to - 1) / to * to; }

// A dimension of an instruction and its strides.
struct Loop {
  index extent, y, x, c;
};

}  // namespace

RowUse row_use(const Structure& s, const RowLayout& layout, int number, index offset, std::vector<index>& table) {
  const Use& use = layout.uses[std::size_t(number)];
  const Instruction& op = s.instructions[std::size_t(use.instruction)];
  RowUse result{number, 0, 0};
  result.offset = offset + op.x_offset;
  std::vector<Loop> loops;
  if (op.kind == Kind::matmul) {
    const MatMul& g = op.matmul;
    loops = {{g.outer, g.yo, g.xo, g.co}, {g.b, g.yb, g.xb, g.cb}, {g.m, g.ym, g.xm, 0}, {g.n, g.yn, 0, g.cn}};
    if (g.k > 1 && g.xk == 0) loops.push_back({g.k, 0, 0, g.ck});   // lanes would meet
    else result.lanes = g.k, result.xk = g.xk, result.ck = g.ck;
  } else if (op.kind == Kind::gather) {
    loops = {{op.gather.rows, op.gather.y_row, 0, 1}, {op.gather.width, 1, 1, 0}};
    result.gathers = true;
    result.x_row = op.gather.x_row;
  } else if (op.kind == Kind::muladd) {
    for (std::size_t d = 0; d < std::size_t(op.muladd.ndim); ++d)
      loops.push_back({op.muladd.shape[d], op.muladd.ys[d], op.muladd.xs[d], op.muladd.cs[d]});
  } else {
    throw std::runtime_error("a projection of a parameter has no explicit rows");
  }
  const std::int32_t* label = layout.labels[std::size_t(op.y)].data() + op.y_offset;
  index count = 1;
  for (const Loop& loop : loops) count *= loop.extent;
  const auto entry = [&](index i) {
    Entry e{};
    for (std::size_t d = loops.size(); d-- > 0;) {
      const index at = i % loops[d].extent;
      i /= loops[d].extent;
      e.y += at * loops[d].y;
      e.x += at * loops[d].x;
      e.c += at * loops[d].c;
    }
    return e;
  };
  std::vector<index> starts(std::size_t(layout.num_rows) + 1, 0);
  for (index i = 0; i < count; ++i)
    if (const std::int32_t row = label[entry(i).y]; row >= 0) ++starts[std::size_t(row) + 1];
  for (std::size_t r = 1; r < starts.size(); ++r) starts[r] += starts[r - 1];
  std::vector<Entry> entries(std::size_t(starts.back()));
  std::vector<index> next(starts.begin(), starts.end() - 1);
  for (index i = 0; i < count; ++i) {
    const Entry e = entry(i);
    if (const std::int32_t row = label[e.y]; row >= 0) entries[std::size_t(next[std::size_t(row)]++)] = e;
  }
  result.starts = append(table, starts);
  result.entries = append(table, entries);
  return result;
}

namespace {

// Blocks whose rows follow each other: those with a list of rows are cut, each having one output and thus its rows of K in order.
std::vector<Block> runs_of(const std::vector<Block>& blocks) {
  std::vector<Block> runs;
  for (const Block& block : blocks) {
    if (block.list.empty()) {
      runs.push_back(block);
      continue;
    }
    if (block.outputs != 1) throw std::runtime_error("a block of listed rows with several outputs");
    for (index i = 0; i < block.rows;) {
      index stop = i + 1;
      while (stop < block.rows && block.list[std::size_t(stop)] == block.list[std::size_t(stop - 1)] + 1) ++stop;
      runs.push_back({block.row(i), stop - i, 1, block.base + i, block.first_output, {}});
      i = stop;
    }
  }
  return runs;
}

bool touches(const Structure& s, const Use& use, const Block& block) {
  const MatMul& g = s.instructions[std::size_t(use.instruction)].matmul;
  return use.form == Form::factored && use.row0 < block.r0 + block.rows && block.r0 < use.row0 + g.n;
}

struct Factors {
  const Use* use;
  index constants, cotangents, constant_depth, cotangent_depth;   // elements of the packed memory; padded depths
};

}  // namespace

GramPlan plan_gram(const Structure& s, const RowLayout& layout, int rows_per_thread) {
  GramPlan plan;
  plan.tile = 16 * rows_per_thread;
  const std::vector<Block> blocks = runs_of(layout.blocks);
  const auto packed = [&](const Block& block, int use, bool constants, index depth) {
    const MatMul& g = s.instructions[std::size_t(layout.uses[std::size_t(use)].instruction)].matmul;
    const index row0 = layout.uses[std::size_t(use)].row0;
    Pack pack{use, constants, std::max<index>(block.r0 - row0, 0), std::max<index>(row0 - block.r0, 0), std::min(row0 + g.n - block.r0, block.rows), block.rows,
              block.outputs, block.first_output, depth, rounded(depth, kGramDepth), plan.packed,
              rounded(block.rows * block.outputs, plan.tile)};
    plan.packed += pack.padded * pack.ld;
    plan.packs.push_back(pack);
    return pack;
  };
  std::vector<std::vector<Factors>> sides;
  for (const Block& block : blocks) {
    sides.emplace_back();
    for (std::size_t u = 0; u < layout.uses.size(); ++u) {
      const Use& use = layout.uses[u];
      if (!touches(s, use, block)) continue;
      const MatMul& g = s.instructions[std::size_t(use.instruction)].matmul;
      const Pack c = packed(block, int(u), true, g.k), y = packed(block, int(u), false, g.m);
      sides.back().push_back({&use, c.out, y.out, c.padded, y.padded});
    }
  }
  // Explicit rows: per block [columns][ld].
  index columns = 0;
  std::vector<index> start(s.buffers.size(), -1);
  for (const Use& use : layout.uses)
    if (use.form == Form::rows && start[std::size_t(use.parameter)] < 0) {
      start[std::size_t(use.parameter)] = columns;
      columns += s.buffers[std::size_t(use.parameter)].size;
    }
  plan.explicit_begin = plan.packed;
  std::vector<index> explicit_at, lds;
  for (const Block& block : blocks) {
    lds.push_back(rounded(block.rows * block.outputs, plan.tile));
    explicit_at.push_back(plan.packed);
    plan.packed += rounded(columns, kGramDepth) * lds.back();
  }
  std::vector<index> row_at(std::size_t(layout.num_rows * layout.max_outputs), -1), row_step(row_at.size(), 0);
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const Block& block = blocks[b];
    for (index o = 0; o < block.outputs; ++o)
      for (index i = 0; i < block.rows; ++i) {
        const std::size_t at = std::size_t((block.r0 + i) * layout.max_outputs + block.first_output + o);
        row_at[at] = explicit_at[b] + o * block.rows + i;
        row_step[at] = lds[b];
      }
  }
  // Tiles of the upper triangle, and the products of each pair of blocks.
  std::vector<GramPair> pairs;
  std::vector<GramTile> tiles;
  for (std::size_t a = 0; a < blocks.size(); ++a)
    for (std::size_t b = a; b < blocks.size(); ++b) {
      const index first = index(pairs.size());
      for (const Factors& p : sides[a])
        for (const Factors& q : sides[b]) {
          if (p.use->parameter != q.use->parameter) continue;
          // Rows of J are outer products of a high and a low vector, and the product of two rows that of the high ones times
          // that of the low ones; where one use has the roles exchanged, so do they.
          const bool alike = p.use->m_is_high == q.use->m_is_high;
          pairs.push_back({alike ? p.constants : p.cotangents, q.constants, q.constant_depth, alike ? p.cotangents : p.constants,
                           q.cotangents, q.cotangent_depth, p.use->parameter, p.use->fused_bias});
        }
      if (columns > 0)
        pairs.push_back({explicit_at[a], explicit_at[b], rounded(columns, kGramDepth), 0, 0, 0, -1, -1});
      const Block &left = blocks[a], &right = blocks[b];
      const index m = left.rows * left.outputs, n = right.rows * right.outputs;
      for (index i = 0; i < m; i += plan.tile)
        for (index j = a == b ? i : 0; j < n; j += plan.tile)
          tiles.push_back({i, j, m, n, left.base, right.base, lds[a], lds[b], first, index(pairs.size()) - first});
    }
  std::vector<index> order(layout.k_of.size());
  for (std::size_t e = 0; e < order.size(); ++e) order[std::size_t(layout.k_of[e])] = index(e);
  plan.num_tiles = index(tiles.size());
  plan.pairs = append(plan.table, pairs);
  plan.tiles = append(plan.table, tiles);
  plan.order = append(plan.table, order);
  plan.rows.row_at = append(plan.table, row_at);
  plan.rows.row_step = append(plan.table, row_step);
  for (std::size_t u = 0; u < layout.uses.size(); ++u)
    if (layout.uses[u].form == Form::rows)
      plan.rows.uses.push_back(row_use(s, layout, int(u), start[std::size_t(layout.uses[u].parameter)], plan.table));
  return plan;
}

DensePlan plan_dense(const Structure& s, const RowLayout& layout) {
  DensePlan plan;
  std::vector<index> row_at(layout.element.size(), -1), row_step(layout.element.size(), 1);
  for (std::size_t i = 0; i < row_at.size(); ++i)
    if (layout.element[i] >= 0) row_at[i] = layout.element[i] * s.num_parameters;
  plan.rows.row_at = append(plan.table, row_at);
  plan.rows.row_step = append(plan.table, row_step);
  for (std::size_t u = 0; u < layout.uses.size(); ++u) {
    const index offset = s.buffers[std::size_t(layout.uses[u].parameter)].offset;
    plan.rows.uses.push_back(row_use(s, layout, int(u), offset, plan.table));
  }
  return plan;
}

}  // namespace pgdfast::cuda
