#include "cut.h"

#include <algorithm>
#include <numeric>
#include <set>

namespace pgdfast {
namespace {

// One dimension of an instruction as its buffers see it.
struct Dim {
  index size, y, x;
};

// All dimensions that y has, then those that are summed over (y stride 0, not to be cut).
std::vector<Dim> dims_of(const Instruction& op) {
  std::vector<Dim> dims;
  switch (op.kind) {
    case Kind::muladd:
      for (std::size_t d = 0; d < std::size_t(op.muladd.ndim); ++d)
        dims.push_back({op.muladd.shape[d], op.muladd.ys[d], op.muladd.xs[d]});
      break;
    case Kind::project:
      for (std::size_t d = 0; d < std::size_t(op.project.ndim); ++d)
        dims.push_back({op.project.shape[d], op.project.ys[d], op.project.xs[d]});
      break;
    case Kind::matmul: {
      const MatMul& g = op.matmul;
      dims = {{g.outer, g.yo, g.xo}, {g.b, g.yb, g.xb}, {g.m, g.ym, g.xm}, {g.n, g.yn, 0}, {g.k, 0, g.xk}};
      break;
    }
    case Kind::gather:
      dims = {{op.gather.rows, op.gather.y_row, 0}, {op.gather.width, 1, 1}};
      break;
  }
  return dims;
}

// Does dimension `cut` of the instruction run over `rows` rows of its buffers, and every other within a row?
bool runs_over_rows(const Structure& s, const Instruction& op, const std::vector<Dim>& dims, std::size_t cut, index rows) {
  const Buffer &y = s.buffers[std::size_t(op.y)], &x = s.buffers[std::size_t(op.x)];
  const bool uses_parameter = x.role == Role::parameter;
  if (op.kind == Kind::gather && !uses_parameter) return false;   // positions may lead to any row
  if (op.kind == Kind::project && cut + 1 == dims.size()) return false;
  if (dims[cut].size % rows != 0) return false;
  const index per_row = dims[cut].size / rows, y_width = y.size / rows, x_width = x.size / rows;
  if (dims[cut].y * per_row != y_width || (!uses_parameter && dims[cut].x * per_row != x_width)) return false;
  index y_reach = op.y_offset, x_reach = op.x_offset;
  for (std::size_t d = 0; d < dims.size(); ++d) {
    const index steps = (d == cut ? per_row : dims[d].size) - 1;
    y_reach += steps * dims[d].y;
    x_reach += steps * dims[d].x;
  }
  return y_reach < y_width && (uses_parameter || x_reach < x_width);
}

bool cut_into(const Structure& s, index rows, Component& component) {
  for (RowCut& cut : component.cuts) {
    const Instruction& op = s.instructions[std::size_t(cut.instruction)];
    const std::vector<Dim> dims = dims_of(op);
    const std::size_t count = op.kind == Kind::matmul ? 4 : op.kind == Kind::gather ? 1 : dims.size();
    cut.dim = -1;
    for (std::size_t d = 0; d < count && cut.dim < 0; ++d)
      if (runs_over_rows(s, op, dims, d, rows)) {
        cut.dim = int(d);
        cut.per_row = dims[d].size / rows;
      }
    if (cut.dim < 0) return false;
  }
  component.rows = rows;
  return true;
}

}  // namespace

std::vector<Component> components(const Structure& s) {
  std::vector<std::size_t> parent(s.buffers.size());
  std::iota(parent.begin(), parent.end(), std::size_t(0));
  const auto find = [&](std::size_t b) {
    while (parent[b] != b) b = parent[b] = parent[parent[b]];
    return b;
  };
  for (const Instruction& op : s.instructions)
    if (s.buffers[std::size_t(op.x)].role != Role::parameter) parent[find(std::size_t(op.x))] = find(std::size_t(op.y));
  std::vector<Component> found;
  std::vector<std::size_t> roots;
  for (std::size_t i = 0; i < s.instructions.size(); ++i) {
    const std::size_t root = find(std::size_t(s.instructions[i].y));
    const std::size_t k = std::size_t(std::find(roots.begin(), roots.end(), root) - roots.begin());
    if (k == roots.size()) {
      roots.push_back(root);
      found.emplace_back();
    }
    found[k].cuts.push_back({int(i), -1, 1});
    found[k].flops += flops_of(s.instructions[i]);
  }
  for (std::size_t k = 0; k < found.size(); ++k) {
    Component& component = found[k];
    index common = 0, elements = 0;
    for (std::size_t b = 0; b < s.buffers.size(); ++b)
      if (s.buffers[b].role != Role::parameter && find(b) == roots[k]) {
        common = std::gcd(common, s.buffers[b].size);
        elements += s.buffers[b].size;
      }
    std::set<index> sizes;
    for (const RowCut& cut : component.cuts) {
      const Instruction& op = s.instructions[std::size_t(cut.instruction)];
      for (const Dim& dim : dims_of(op)) sizes.insert(dim.size);
      if (op.kind == Kind::matmul)
        component.largest_weight = std::max(component.largest_weight, op.matmul.k * std::min(op.matmul.m, op.matmul.n));
    }
    sizes.insert(common);
    for (auto rows = sizes.rbegin(); rows != sizes.rend() && *rows > 1; ++rows)
      if (common % *rows == 0 && cut_into(s, *rows, component)) break;
    component.row_elements = elements / component.rows;
  }
  return found;
}

Instruction restricted(const Instruction& op, const RowCut& cut, index begin, index end) {
  Instruction part = op;
  const index first = begin * cut.per_row, count = (end - begin) * cut.per_row;
  const std::size_t d = std::size_t(cut.dim);
  switch (op.kind) {
    case Kind::muladd:
      part.muladd.shape[d] = count;
      part.y_offset += first * op.muladd.ys[d];
      part.x_offset += first * op.muladd.xs[d];
      part.c_offset += first * op.muladd.cs[d];
      break;
    case Kind::project:
      part.project.shape[d] = count;
      part.y_offset += first * op.project.ys[d];
      part.x_offset += first * op.project.xs[d];
      for (std::size_t c = 0; c < op.project.offsets.size(); ++c) part.project.offsets[c] += first * op.project.cs[c][d];
      break;
    case Kind::matmul: {
      MatMul& g = part.matmul;
      index* const sizes[4] = {&g.outer, &g.b, &g.m, &g.n};
      const index y[4] = {g.yo, g.yb, g.ym, g.yn}, x[4] = {g.xo, g.xb, g.xm, 0}, c[4] = {g.co, g.cb, 0, g.cn};
      *sizes[d] = count;
      part.y_offset += first * y[d];
      part.x_offset += first * x[d];
      part.c_offset += first * c[d];
      break;
    }
    case Kind::gather:
      part.gather.rows = count;
      part.y_offset += first * op.gather.y_row;
      part.c_offset += first;
      break;
  }
  return part;
}

}  // namespace pgdfast
