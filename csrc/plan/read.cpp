#include "read.h"

#include <utility>

namespace pgdfast {
namespace {

class Words {
 public:
  Words(const index* words, index count) : at_(words), end_(words + count) {}
  index next() {
    if (at_ == end_) throw std::runtime_error("a description that ends early");
    return *at_++;
  }
  template <class N = index>
  std::vector<N> list() {
    const index count = next();
    if (count < 0 || count > end_ - at_) throw std::runtime_error("a description that ends early");
    std::vector<N> values(at_, at_ + count);
    at_ += count;
    return values;
  }
  void finish() const {
    if (at_ != end_) throw std::runtime_error("a description with words left over");
  }

 private:
  const index *at_, *end_;
};

void read_project(Project& p, const std::vector<std::vector<index>>& list) {
  p.ndim = int(list.at(0).size());
  const std::size_t operands = list.size() - 5;   // all but shape, strides of y and x, numbers and offsets
  if (p.ndim > kMaxDims + 1 || operands > p.constants.size()) throw std::runtime_error("a projection beyond the limits");
  p.terms = int(operands - 1) / 2;
  for (std::size_t d = 0; d < list[0].size(); ++d) {
    p.shape[d] = list[0][d];
    p.ys[d] = list.at(1).at(d);
    p.xs[d] = list.at(2).at(d);
    for (std::size_t c = 0; c < operands; ++c) p.cs[c][d] = list.at(3 + c).at(d);
  }
  for (std::size_t c = 0; c < operands; ++c) {
    p.constants[c] = int(list[list.size() - 2].at(c));
    p.offsets[c] = list.back().at(c);
  }
}

}  // namespace

Structure read_program(const index* numbers, index count, const double* alphas, index num_alphas) {
  Words words(numbers, count);
  Structure s;
  for (index i = words.next(); i > 0; --i) {
    const auto role = static_cast<Role>(words.next());
    const index size = words.next();
    s.buffers.push_back({role, size, words.next()});
  }
  const index instructions = words.next();
  if (instructions != num_alphas) throw std::runtime_error("a program with one factor too few or too many");
  for (index i = 0; i < instructions; ++i) {
    Instruction op{};
    op.kind = static_cast<Kind>(words.next());
    op.y = int(words.next());
    op.y_offset = words.next();
    op.x = int(words.next());
    op.x_offset = words.next();
    op.constant = int(words.next());
    op.c_offset = words.next();
    if (op.y < 0 || op.y >= int(s.buffers.size()) || op.x < 0 || op.x >= int(s.buffers.size()))
      throw std::runtime_error("an instruction on a buffer that there is not");
    op.alpha = *alphas++;
    std::vector<std::vector<index>> list(static_cast<std::size_t>(words.next()));
    for (auto& item : list) item = words.list();
    if (op.kind == Kind::matmul) {
      const auto& g = list.at(0);
      op.matmul = {g.at(0), g.at(1), g.at(2),  g.at(3),  g.at(4),  g.at(5), g.at(6),
                   g.at(7), g.at(8), g.at(9), g.at(10), g.at(11), g.at(12), g.at(13), g.at(14), g.at(15), g.at(16)};
    } else if (op.kind == Kind::gather) {
      const auto& g = list.at(0);
      op.gather = {g.at(0), g.at(1), g.at(2), g.at(3), g.at(4)};
    } else if (op.kind == Kind::project) {
      read_project(op.project, list);
    } else {
      op.muladd.ndim = int(list.at(0).size());
      if (op.muladd.ndim > kMaxDims) throw std::runtime_error("more than 6 dimensions in one instruction");
      for (std::size_t d = 0; d < list[0].size(); ++d) {
        op.muladd.shape[d] = list[0][d];
        op.muladd.ys[d] = list.at(1).at(d);
        op.muladd.xs[d] = list.at(2).at(d);
        op.muladd.cs[d] = list.at(3).at(d);
      }
    }
    s.instructions.push_back(op);
  }
  words.finish();
  s.finalize();
  return s;
}

RowLayout read_rows(const index* numbers, index count, const Structure& s) {
  Words words(numbers, count);
  RowLayout layout;
  layout.num_rows = words.next();
  layout.max_outputs = words.next();
  layout.output_of = words.list();
  layout.k_of = words.list();
  for (index i = words.next(); i > 0; --i) {
    Block block{};
    for (index* number : {&block.r0, &block.rows, &block.outputs, &block.base, &block.first_output}) *number = words.next();
    block.list = words.list();
    layout.blocks.push_back(std::move(block));
  }
  for (index i = words.next(); i > 0; --i) {
    Use use{};
    use.instruction = int(words.next());
    use.parameter = int(words.next());
    use.form = static_cast<Form>(words.next());
    use.row0 = words.next();
    use.m_is_high = words.next() != 0;
    use.fused_bias = int(words.next());
    use.row_per_n = words.next() != 0;
    layout.uses.push_back(use);
  }
  layout.labels.resize(s.buffers.size());
  for (index i = words.next(); i > 0; --i) {
    auto& label = layout.labels.at(std::size_t(words.next()));
    label = words.list<std::int32_t>();
  }
  words.finish();
  layout.finalize();
  layout.local = true;
  return layout;
}

}  // namespace pgdfast
