#include "ensemble_plan.h"

#include <algorithm>

namespace pgdfast::cuda {
namespace {

bool apart(int ndim, const index* shape, const index* strides) {
  for (int d = 0; d < ndim; ++d)
    if (shape[d] > 1 && strides[d] == 0) return false;
  return true;
}

template <class A>
void copy(const A& from, int count, index* to) {
  std::copy_n(from.begin(), count, to);
}

MemberOp member_op(const Structure& s, const Instruction& op) {
  const Buffer &y = s.buffers[std::size_t(op.y)], &x = s.buffers[std::size_t(op.x)];
  MemberOp m{};
  m.kind = index(op.kind);
  m.y_role = index(y.role), m.y = y.offset + op.y_offset;
  m.x_role = index(x.role), m.x = x.offset + op.x_offset;
  m.constant = op.constant, m.c_offset = op.c_offset, m.alpha = op.alpha;
  m.overwrite_y = op.overwrite_y, m.overwrite_x = op.overwrite_x;
  m.uses_parameter = x.role == Role::parameter;
  m.apart_y = m.apart_x = 1;
  if (op.kind == Kind::muladd) {
    m.ndim = op.muladd.ndim;
    copy(op.muladd.shape, op.muladd.ndim, m.shape);
    copy(op.muladd.ys, op.muladd.ndim, m.ys);
    copy(op.muladd.xs, op.muladd.ndim, m.xs);
    copy(op.muladd.cs, op.muladd.ndim, m.cs[0]);
  } else if (op.kind == Kind::matmul) {
    const MatMul& g = op.matmul;
    const index shape[] = {g.outer, g.b, g.m, g.n, g.k}, ys[] = {g.yo, g.yb, g.ym, g.yn}, xs[] = {g.xo, g.xb, g.xm, g.xk},
                cs[] = {g.co, g.cb, g.ck, g.cn};
    std::copy_n(shape, 5, m.shape);
    std::copy_n(ys, 4, m.ys);
    std::copy_n(xs, 4, m.xs);
    std::copy_n(cs, 4, m.cs[0]);
  } else if (op.kind == Kind::gather) {
    const Gather& g = op.gather;
    const index shape[] = {g.rows, g.width, g.count};
    std::copy_n(shape, 3, m.shape);
    m.ys[0] = g.y_row, m.xs[0] = g.x_row;
  } else {
    const Project& p = op.project;
    m.ndim = p.ndim, m.terms = p.terms;
    copy(p.shape, p.ndim, m.shape);
    copy(p.ys, p.ndim, m.ys);
    copy(p.xs, p.ndim, m.xs);
    for (std::size_t c = 0; c < p.constants.size(); ++c) {
      m.constants[c] = int(c) < 1 + 2 * p.terms ? p.constants[c] : -1;
      m.offsets[c] = p.offsets[c];
      copy(p.cs[c], p.ndim, m.cs[c]);
    }
  }
  if (op.kind == Kind::muladd || op.kind == Kind::project) {
    m.apart_y = apart(int(m.ndim), m.shape, m.ys);
    m.apart_x = apart(int(m.ndim), m.shape, m.xs);
  }
  return m;
}

std::vector<MemberBuffer> cleared(const Structure& s, const std::vector<char>& marked, bool parameters) {
  std::vector<MemberBuffer> list;
  for (std::size_t i = 0; i < s.buffers.size(); ++i)
    if (marked[i] && (parameters || s.buffers[i].role != Role::parameter))
      list.push_back({index(s.buffers[i].role), s.buffers[i].offset, s.buffers[i].size});
  return list;
}

}  // namespace

EnsemblePlan plan_ensemble(const Structure& s, const RowLayout& layout) {
  EnsemblePlan plan;
  std::vector<index>& table = plan.table;
  std::vector<MemberOp> ops;
  for (const Instruction& op : s.instructions) ops.push_back(member_op(s, op));
  plan.ops = append(table, ops);
  plan.num_ops = index(ops.size());
  const auto forward = cleared(s, s.zero_forward, false), adjoint = cleared(s, s.zero_adjoint, true);
  plan.clear_forward = append(table, forward), plan.num_clear_forward = index(forward.size());
  plan.clear_adjoint = append(table, adjoint), plan.num_clear_adjoint = index(adjoint.size());
  std::vector<index> sizes;
  for (const Buffer& buffer : s.buffers)
    if (buffer.role == Role::parameter) sizes.push_back(buffer.size);
  plan.sizes = append(table, sizes);
  plan.num_parameter_buffers = index(sizes.size());
  if (!layout.local) return plan;

  plan.num_rows = layout.num_rows;
  plan.outputs = layout.max_outputs;
  std::vector<index> row_of(std::size_t(s.num_residuals), 0);
  for (std::size_t i = 0; i < layout.element.size(); ++i)
    if (layout.element[i] >= 0) row_of[std::size_t(layout.element[i])] = index(i) / layout.max_outputs;
  plan.row_of = append(table, row_of);
  plan.output_of = append(table, layout.output_of);
  plan.element = append(table, layout.element);

  std::vector<MemberFactor> factors;
  std::vector<const Use*> uses;
  std::vector<index> start(s.buffers.size(), -1);
  std::vector<MemberRows> rows;
  for (std::size_t u = 0; u < layout.uses.size(); ++u) {
    const Use& use = layout.uses[u];
    const Instruction& op = s.instructions[std::size_t(use.instruction)];
    const index y = s.buffers[std::size_t(op.y)].offset + op.y_offset;
    if (use.form == Form::factored) {
      const MatMul& g = op.matmul;
      factors.push_back({op.constant, op.c_offset, g.cn, g.ck, g.k, y, g.yn, g.ym, g.m, use.row0, g.n});
      uses.push_back(&use);
    } else if (use.form == Form::rows) {
      index& first = start[std::size_t(use.parameter)];
      if (first < 0) {
        first = plan.columns;
        plan.columns += s.buffers[std::size_t(use.parameter)].size;
      }
      const RowUse r = row_use(s, layout, int(u), first, table);
      rows.push_back({r.starts, r.entries, r.lanes, r.xk, r.ck, r.gathers, r.x_row, r.offset, y, op.constant, op.c_offset,
                      op.alpha});
    }
  }
  std::vector<MemberPair> pairs;
  for (std::size_t p = 0; p < uses.size(); ++p)
    for (std::size_t q = 0; q < uses.size(); ++q)
      if (uses[p]->parameter == uses[q]->parameter)
        pairs.push_back({index(p), index(q), uses[p]->m_is_high == uses[q]->m_is_high, uses[p]->fused_bias >= 0});
  plan.factors = append(table, factors), plan.num_factors = index(factors.size());
  plan.pairs = append(table, pairs), plan.num_pairs = index(pairs.size());
  plan.rows = append(table, rows), plan.num_row_uses = index(rows.size());
  return plan;
}

}  // namespace pgdfast::cuda
