// A sweep as a list of kernel launches: plain C++, decided once per structure, tested without a GPU.
//
// Neighbouring muladds whose lanes never meet run as one kernel (a bias with the coefficients behind it; whole chains in
// double-backward tapes), values passed on in registers. Muladds that reduce have a kernel of their own, in two stages where
// the sum is long. Products go to the vendor BLAS, or, where small or strided, to a kernel of our own. No launch adds
// atomically: every result is summed in one order.
#pragma once

#include "../plan/plan.h"

namespace pgdfast::cuda {

constexpr int kMaxChain = 8;   // kernel parameters hold so many instructions

enum class Direction { forward, adjoint };
enum class Part { inner, uses, all };   // of an adjoint sweep: what writes intermediate results, what writes parameters

enum class Task : int { clear = 0, chain = 1, reduce = 2, blas = 3, small_product = 4, gather = 5, scatter = 6, project = 7 };

// One muladd in the index space of its chain.
struct Link {
  int instruction;
  std::array<index, kMaxDims> source{}, target{}, constant{};   // strides
  bool from_register = false;   // its source is what the link before has just made
  bool same_target = false;     // it adds to what the link before has just made
  bool overwrite = false;
};

// out[b] (+)= alpha left[b] right[b], strides per dimension.
struct Product {
  index outer = 1, batch = 1, m = 0, n = 0, k = 0;
  struct Operand {
    index outer, batch, row, column;
  } left{}, right{}, out{};
};

struct Launch {
  Task task;
  int instruction = -1;               // all but clear and chain
  int buffer = -1;                    // clear
  bool overwrite = false;
  int ndim = 0;                       // chain, reduce: the index space; reduce: kept dimensions first
  int kept = 0;
  std::array<index, kMaxDims> shape{};
  std::vector<Link> links{};          // chain, reduce
  index splits = 1;                   // reduce: partial sums per target, in the scratch memory
  Product product{};
};

struct Schedule {
  std::vector<Launch> launches;
  index scratch = 0;                  // elements of partial sums
};

Schedule schedule(const Structure& s, Direction direction, Part part = Part::all);

// Can a BLAS take these operands in place?
bool fits_blas(const Product& p);

// Which tile, 16 times this many rows, the Gram matrix of `order` residuals takes: the largest that still gives every
// multiprocessor a tile, the smallest where none does.
int gram_tile(index order, bool wide, int multiprocessors);

}  // namespace pgdfast::cuda
