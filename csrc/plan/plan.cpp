#include "plan.h"

#include "cut.h"

#include <algorithm>

namespace pgdfast {
namespace {

// Does the strided operand touch every live element of a buffer, `size` of them, exactly once? Views never overlap except
// through zero strides, and touch no dead element where `size` leaves any out, so counting suffices.
bool covers(index size, int ndim, const index* shape, const index* strides) {
  index count = 1;
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] > 1 && strides[d] == 0) return false;
    count *= shape[d];
  }
  return count == size;
}

bool covers_y(const Instruction& op, index size) {
  if (op.kind == Kind::muladd) return covers(size, op.muladd.ndim, op.muladd.shape.data(), op.muladd.ys.data());
  if (op.kind == Kind::project) return covers(size, op.project.ndim, op.project.shape.data(), op.project.ys.data());
  if (op.kind == Kind::gather) return op.gather.rows * op.gather.width == size;
  const MatMul& g = op.matmul;
  const index shape[4] = {g.outer, g.b, g.m, g.n}, strides[4] = {g.yo, g.yb, g.ym, g.yn};
  return covers(size, 4, shape, strides);
}

bool covers_x(const Instruction& op, index size) {
  if (op.kind == Kind::muladd) return covers(size, op.muladd.ndim, op.muladd.shape.data(), op.muladd.xs.data());
  if (op.kind == Kind::project) return covers(size, op.project.ndim, op.project.shape.data(), op.project.xs.data());
  if (op.kind == Kind::gather) return false;   // a position may be missing
  const MatMul& g = op.matmul;
  const index shape[4] = {g.outer, g.b, g.m, g.k}, strides[4] = {g.xo, g.xb, g.xm, g.xk};
  return covers(size, 4, shape, strides);
}

}  // namespace

double flops_of(const Instruction& op) {
  if (op.kind == Kind::matmul) {
    const MatMul& g = op.matmul;
    return 2.0 * double(g.outer) * double(g.b) * double(g.m) * double(g.n) * double(g.k);
  }
  double count = 2.0;
  if (op.kind == Kind::gather) return count * double(op.gather.rows) * double(op.gather.width);
  if (op.kind == Kind::project) {
    for (int d = 0; d < op.project.ndim; ++d) count *= double(op.project.shape[std::size_t(d)]);
    return count * (1 + 2 * op.project.terms);
  }
  for (int d = 0; d < op.muladd.ndim; ++d) count *= double(op.muladd.shape[d]);
  return count;
}

void Structure::finalize() {
  num_parameters = num_residuals = arena_size = 0;
  num_parameter_buffers = 0;
  for (Buffer& buffer : buffers) {
    switch (buffer.role) {
      case Role::parameter:
        buffer.offset = num_parameters;
        num_parameters += buffer.size;
        ++num_parameter_buffers;
        break;
      case Role::residual:
        buffer.offset = num_residuals;
        num_residuals += buffer.size;
        break;
      case Role::workspace:
        buffer.offset = arena_size;
        arena_size += (buffer.size + 15) / 16 * 16;   // keep every buffer on a 64-byte line
        break;
    }
  }
  const std::size_t count = buffers.size();
  std::vector<char> written(count, 0), read(count, 0);
  zero_forward.assign(count, 0);
  zero_adjoint.assign(count, 0);
  flops = largest = 0;
  for (Instruction& op : instructions) {
    flops += flops_of(op);
    largest = std::max(largest, flops_of(op));
    if (!written[op.y]) {
      op.overwrite_y = covers_y(op, buffers[op.y].live);
      zero_forward[op.y] = !op.overwrite_y;
      written[op.y] = 1;
    }
  }
  for (std::size_t i = instructions.size(); i-- > 0;) {
    Instruction& op = instructions[i];
    if (!read[op.x]) {
      op.overwrite_x = covers_x(op, buffers[op.x].live);
      zero_adjoint[op.x] = !op.overwrite_x;
      read[op.x] = 1;
    }
  }
  parts = components(*this);
  for (std::size_t i = 0; i < count; ++i) {
    if (!written[i] && buffers[i].role != Role::parameter) zero_forward[i] = 1;
    if (!read[i] && buffers[i].role != Role::residual) zero_adjoint[i] = 1;
  }
}

void RowLayout::finalize() {
  k_index.assign(std::size_t(num_rows * max_outputs), -1);
  element.assign(k_index.size(), -1);
  std::vector<index> element_of(k_of.size());
  for (std::size_t e = 0; e < k_of.size(); ++e) element_of[std::size_t(k_of[e])] = index(e);
  for (const Block& block : blocks)
    for (index o = 0; o < block.outputs; ++o)
      for (index i = 0; i < block.rows; ++i) {
        const std::size_t at = std::size_t(block.row(i) * max_outputs + block.first_output + o);
        k_index[at] = block.base + o * block.rows + i;
        element[at] = element_of[std::size_t(k_index[at])];
      }
  row_width.assign(labels.size(), 0);
  first_row.assign(labels.size(), 0);
  for (std::size_t b = 0; b < labels.size(); ++b) {
    const std::vector<std::int32_t>& label = labels[b];
    if (label.empty() || label[0] < 0) continue;
    std::size_t width = 1;
    while (width < label.size() && label[width] == label[0]) ++width;
    bool regular = true;
    for (std::size_t e = 0; e < label.size() && regular; ++e) regular = label[e] == label[0] + std::int32_t(e / width);
    if (!regular) continue;
    row_width[b] = index(width);
    first_row[b] = label[0];
  }
}

}  // namespace pgdfast
