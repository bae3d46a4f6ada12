#include "schedule.h"

#include <algorithm>

#include "../plan/environment.h"

namespace pgdfast::cuda {
namespace {

constexpr index kSmallProduct = index(1) << 20;   // multiply-adds of a product that our own kernel takes; PGDFAST_SMALL_PRODUCT
                                                  // sets another number, for tests
constexpr index kShortSum = 512;                  // and the length of its sums
constexpr index kLongReduction = 1024;            // elements per target from which a sum is split among blocks
constexpr index kMaxSplits = 64;

// A strided operand of a muladd: which memory, and where.
struct Operand {
  int buffer;
  index offset;
  const index* strides;
};

Operand source_of(const Instruction& op, Direction d) {
  if (d == Direction::forward) return {op.x, op.x_offset, op.muladd.xs.data()};
  return {op.y, op.y_offset, op.muladd.ys.data()};
}
Operand target_of(const Instruction& op, Direction d) {
  return source_of(op, d == Direction::forward ? Direction::adjoint : Direction::forward);
}
bool overwrites(const Instruction& op, Direction d) { return d == Direction::forward ? op.overwrite_y : op.overwrite_x; }

bool reduces(const Instruction& op, Direction d) {
  const index* strides = target_of(op, d).strides;
  for (int k = 0; k < op.muladd.ndim; ++k)
    if (op.muladd.shape[std::size_t(k)] > 1 && strides[k] == 0) return true;
  return false;
}

// Finds a common index space: splits dimensions of either list, from the last on, until both have the same extents. The
// strides of a list, one row per operand, are split alike. False where the extents do not divide.
struct Space {
  std::vector<index> shape;
  std::vector<std::vector<index>> strides;   // [operand][dimension]

  // Splits dimension d into (n / inner, inner).
  void split(std::size_t d, index inner) {
    shape.insert(shape.begin() + long(d) + 1, inner);
    shape[d] /= inner;
    for (auto& list : strides) {
      list.insert(list.begin() + long(d) + 1, list[d]);
      list[d] *= inner;
    }
  }
};

bool align(Space& a, Space& b) {
  std::size_t i = a.shape.size(), j = b.shape.size();   // dimensions from here on agree
  while (i > 0 && j > 0) {
    const index m = a.shape[i - 1], n = b.shape[j - 1];
    if (m == n) {
      --i, --j;
    } else if (n != 0 && m % n == 0) {
      a.split(i - 1, n);
      --j;
    } else if (m != 0 && n % m == 0) {
      b.split(j - 1, m);
      --i;
    } else {
      return false;
    }
  }
  return i == 0 && j == 0 && a.shape == b.shape && a.shape.size() <= std::size_t(kMaxDims);
}

// Where a link reads and writes, for the question whether lanes meet.
struct Access {
  int buffer;
  index offset;
  std::vector<index> strides;

  bool meets(const Access& other, const std::vector<index>& shape) const {
    if (buffer != other.buffer) return false;
    bool alike = offset == other.offset;
    index end = offset, other_end = other.offset;
    for (std::size_t d = 0; d < shape.size(); ++d) {
      alike = alike && (shape[d] == 1 || strides[d] == other.strides[d]);
      end += (shape[d] - 1) * strides[d];
      other_end += (shape[d] - 1) * other.strides[d];
    }
    return !alike && offset <= other_end && other.offset <= end;
  }
  bool same(const Access& other, const std::vector<index>& shape) const {
    if (buffer != other.buffer || offset != other.offset) return false;
    for (std::size_t d = 0; d < shape.size(); ++d)
      if (shape[d] != 1 && strides[d] != other.strides[d]) return false;
    return true;
  }
};

// A chain in the making.
class Chain {
 public:
  Chain(const Structure& s, Direction d) : s_(s), d_(d) {}
  bool empty() const { return numbers_.empty(); }

  // Adds an instruction; false where it cannot join.
  bool add(int number) {
    const Instruction& op = s_.instructions[std::size_t(number)];
    Space own = space_of(op), joined = space_;
    if (empty()) {
      joined = {own.shape, {}};
    } else if (int(numbers_.size()) == kMaxChain || !align(joined, own)) {
      return false;
    }
    for (auto& list : own.strides) joined.strides.push_back(std::move(list));
    const std::size_t count = numbers_.size() + 1;
    numbers_.push_back(number);
    std::swap(space_, joined);
    const Access source = access(count - 1, 0), target = access(count - 1, 1);
    for (std::size_t k = 0; k + 1 < count; ++k) {
      const Access before_source = access(k, 0), before_target = access(k, 1);
      if (source.meets(before_target, space_.shape) || target.meets(before_target, space_.shape) ||
          target.meets(before_source, space_.shape)) {
        numbers_.pop_back();
        std::swap(space_, joined);
        return false;
      }
    }
    return true;
  }

  Launch launch() {
    Launch result{Task::chain};
    result.ndim = int(space_.shape.size());
    std::copy(space_.shape.begin(), space_.shape.end(), result.shape.begin());
    for (std::size_t k = 0; k < numbers_.size(); ++k) {
      Link link{numbers_[k]};
      for (std::size_t d = 0; d < space_.shape.size(); ++d) {
        link.source[d] = space_.strides[3 * k][d];
        link.target[d] = space_.strides[3 * k + 1][d];
        link.constant[d] = space_.strides[3 * k + 2][d];
      }
      link.overwrite = overwrites(s_.instructions[std::size_t(numbers_[k])], d_);
      if (k > 0) {
        const Access made = access(k - 1, 1);
        link.same_target = !link.overwrite && access(k, 1).same(made, space_.shape);
        link.from_register = !link.same_target && access(k, 0).same(made, space_.shape);
      }
      result.links.push_back(link);
    }
    numbers_.clear();
    space_ = {};
    return result;
  }

 private:
  Space space_of(const Instruction& op) const {
    const std::size_t n = std::size_t(op.muladd.ndim);
    const index *ss = source_of(op, d_).strides, *ts = target_of(op, d_).strides, *cs = op.muladd.cs.data();
    return {{op.muladd.shape.begin(), op.muladd.shape.begin() + long(n)},
            {{ss, ss + n}, {ts, ts + n}, {cs, cs + n}}};
  }
  Access access(std::size_t k, int operand) const {
    const Instruction& op = s_.instructions[std::size_t(numbers_[k])];
    const Operand found = operand == 0 ? source_of(op, d_) : target_of(op, d_);
    return {found.buffer, found.offset, space_.strides[3 * k + std::size_t(operand)]};
  }

  const Structure& s_;
  Direction d_;
  Space space_;   // strides: source, target, constant of every instruction
  std::vector<int> numbers_;
};

Launch reduction(const Structure& s, int number, Direction d, index& scratch) {
  const Instruction& op = s.instructions[std::size_t(number)];
  const index *ss = source_of(op, d).strides, *ts = target_of(op, d).strides;
  Launch result{Task::reduce, number};
  result.overwrite = overwrites(op, d);
  Link link{number};
  index targets = 1, summed = 1;
  for (const bool kept : {true, false})
    for (std::size_t k = 0; k < std::size_t(op.muladd.ndim); ++k) {
      if ((ts[k] != 0 || op.muladd.shape[k] == 1) != kept) continue;
      const std::size_t at = std::size_t(result.ndim++);
      result.kept += kept;
      result.shape[at] = op.muladd.shape[k];
      link.source[at] = ss[k];
      link.target[at] = ts[k];
      link.constant[at] = op.muladd.cs[k];
      (kept ? targets : summed) *= op.muladd.shape[k];
    }
  result.links = {link};
  if (summed >= 2 * kLongReduction) {
    result.splits = std::min(kMaxSplits, summed / kLongReduction);
    scratch = std::max(scratch, result.splits * targets);
  }
  return result;
}

bool transposable(index rows, index columns, index row, index column) {
  return ((row == 1 || rows == 1) && (columns == 1 || column >= rows)) ||
         ((column == 1 || columns == 1) && (rows == 1 || row >= columns));
}

Launch product(const Structure& s, int number, Direction d) {
  const Instruction& op = s.instructions[std::size_t(number)];
  const MatMul& g = op.matmul;
  Launch result{Task::blas, number};
  result.overwrite = overwrites(op, d);
  Product& p = result.product;
  p.outer = g.outer;
  p.batch = g.b;
  p.m = g.m;
  if (d == Direction::forward) {
    p.n = g.n, p.k = g.k;
    p.left = {g.xo, g.xb, g.xm, g.xk};
    p.right = {g.co, g.cb, g.ck, g.cn};
    p.out = {g.yo, g.yb, g.ym, g.yn};
  } else {
    p.n = g.k, p.k = g.n;
    p.left = {g.yo, g.yb, g.ym, g.yn};
    p.right = {g.co, g.cb, g.cn, g.ck};
    p.out = {g.xo, g.xb, g.xm, g.xk};
  }
  const index largest = number_from_environment("PGDFAST_SMALL_PRODUCT", kSmallProduct);
  const bool small = p.m * p.n * p.k <= largest && p.k <= kShortSum;
  if (small || !fits_blas(p)) result.task = Task::small_product;
  return result;
}

// Buffers whose first write is a sum over dimensions that leaves nothing of them out: it need not add to zeros.
std::vector<int> first_sums(const Structure& s, Direction d, const std::vector<int>& order) {
  std::vector<int> found(s.buffers.size(), -1);
  std::vector<char> written(s.buffers.size(), 0);
  for (const int number : order) {
    const Instruction& op = s.instructions[std::size_t(number)];
    const std::size_t buffer = std::size_t(d == Direction::forward ? op.y : op.x);
    if (written[buffer]) continue;
    written[buffer] = 1;
    if (op.kind != Kind::muladd || !reduces(op, d)) continue;
    const index* strides = target_of(op, d).strides;
    index targets = 1;
    for (std::size_t k = 0; k < std::size_t(op.muladd.ndim); ++k)
      if (strides[k] != 0) targets *= op.muladd.shape[k];
    if (targets == s.buffers[buffer].live) found[buffer] = number;
  }
  return found;
}

}  // namespace

bool fits_blas(const Product& p) {
  const index most = 0x7fffffff;
  for (const index extent : {p.m, p.n, p.k, p.outer * p.batch})
    if (extent > most) return false;
  return transposable(p.m, p.k, p.left.row, p.left.column) && transposable(p.k, p.n, p.right.row, p.right.column) &&
         transposable(p.m, p.n, p.out.row, p.out.column);
}

Schedule schedule(const Structure& s, Direction d, Part part) {
  Schedule result;
  std::vector<int> order;
  const int count = int(s.instructions.size());
  const auto uses = [&](int i) { return s.buffers[std::size_t(s.instructions[std::size_t(i)].x)].role == Role::parameter; };
  if (d == Direction::forward) {
    for (int i = 0; i < count; ++i) order.push_back(i);
  } else {
    for (int i = count; part != Part::uses && i-- > 0;)
      if (!uses(i)) order.push_back(i);
    for (int i = count; part != Part::inner && i-- > 0;)
      if (uses(i)) order.push_back(i);
  }
  const std::vector<int> sums = first_sums(s, d, order);
  const std::vector<char>& marked = d == Direction::forward ? s.zero_forward : s.zero_adjoint;
  for (std::size_t i = 0; i < s.buffers.size(); ++i) {
    const bool parameter = s.buffers[i].role == Role::parameter;
    if (!marked[i] || sums[i] >= 0 || s.buffers[i].size == 0 || (d == Direction::forward && parameter)) continue;
    if (part == (parameter ? Part::inner : Part::uses)) continue;
    Launch launch{Task::clear};
    launch.buffer = int(i);
    result.launches.push_back(launch);
  }
  Chain chain(s, d);
  const auto flush = [&] {
    if (!chain.empty()) result.launches.push_back(chain.launch());
  };
  for (const int number : order) {
    const Instruction& op = s.instructions[std::size_t(number)];
    if (op.kind == Kind::muladd && !reduces(op, d)) {
      if (!chain.add(number)) {
        flush();
        chain.add(number);
      }
      continue;
    }
    flush();
    if (op.kind == Kind::muladd) {
      result.launches.push_back(reduction(s, number, d, result.scratch));
      if (sums[std::size_t(target_of(op, d).buffer)] == number) result.launches.back().overwrite = true;
    } else if (op.kind == Kind::matmul) {
      result.launches.push_back(product(s, number, d));
    } else {
      Launch launch{op.kind == Kind::project ? Task::project : d == Direction::forward ? Task::gather : Task::scatter, number};
      launch.overwrite = op.kind == Kind::gather && d == Direction::adjoint ? false : overwrites(op, d);
      result.launches.push_back(launch);
    }
  }
  flush();
  return result;
}

int gram_tile(index order, bool wide, int multiprocessors) {
  const int large = wide ? 4 : 8, small = 2;
  const index tiles = (order + 16 * large - 1) / (16 * large);
  return tiles * (tiles + 1) / 2 >= multiprocessors ? large : small;
}

}  // namespace pgdfast::cuda
