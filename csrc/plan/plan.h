// The linear program as the kernels see it: buffers, instructions, constants.
//
// Index legend, the same in every file: N rows (samples), O outputs of a row, M = residuals,
// P = parameters, (b, m, n, k) = batch and matrix extents of one product.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace pgdfast {

using index = std::int64_t;
constexpr int kMaxDims = 6;

// Grows a buffer that is kept between calls; what it held is kept, too.
template <class T>
void ensure(std::vector<T>& buffer, index size) {
  if (index(buffer.size()) < size) buffer.resize(std::size_t(size));
}

enum class Role : int { parameter = 0, residual = 1, workspace = 2 };

// Where a tangent (or, in the adjoint sweep, a cotangent) lives. `offset` counts elements from the start of
// the flat parameter vector, the flat residual vector, or the workspace arena.
struct Buffer {
  Role role;
  index size;
  index live;         // elements that the sweeps touch; the others reach no residual
  index offset = 0;
};

// y[i.ys] += alpha * c[i.cs] * x[i.xs] over all multi-indices i of `shape`; zero strides broadcast or reduce.
struct MulAdd {
  int ndim = 0;
  std::array<index, kMaxDims> shape{}, ys{}, xs{}, cs{};
};

// y[b, m, n] += alpha * sum_k x[b, m, k] * c[b, k, n]; a constant on the left is the same form transposed.
struct MatMul {
  index b, m, n, k;
  index yb, ym, yn;
  index xb, xm, xk;
  index cb, ck, cn;
  index outer = 1, yo = 0, xo = 0, co = 0;   // a second batch dimension
};

// y[i, :] += alpha * x[positions[i], :]; a position of -1 gives nothing. Rows are contiguous.
struct Gather {
  index rows, width, y_row, x_row, count;   // count: rows of x
};

// y[i, :] += a * (x[i, :] - alpha * sum_t l_t * <r_t, x[i, :]>), the last dimension being the row.
constexpr int kMaxTerms = 2;
struct Project {
  int ndim = 0, terms = 0;                            // ndim counts the row
  std::array<index, kMaxDims + 1> shape{}, ys{}, xs{};
  std::array<int, 1 + 2 * kMaxTerms> constants{};     // a, then l and r of each term; -1: ones
  std::array<std::array<index, kMaxDims + 1>, 1 + 2 * kMaxTerms> cs{};
  std::array<index, 1 + 2 * kMaxTerms> offsets{};     // elements into those constants
};

enum class Kind : int { muladd = 0, matmul = 1, gather = 2, project = 3 };

struct Instruction {
  Kind kind;
  int y, x;                     // buffer numbers
  index y_offset, x_offset;     // elements into those buffers
  int constant;                 // -1: none
  index c_offset;               // elements into the constant
  double alpha;
  MulAdd muladd;
  MatMul matmul;
  Gather gather;
  Project project;
  bool overwrite_y = false;     // first write of y in the forward sweep, and it covers all of y that is live
  bool overwrite_x = false;     // first write of x in the adjoint sweep, and it covers all of x that is live
};

// How a use of a parameter enters K: by explicit Jacobian rows, as (C C'^T) * (Y Y'^T), or with the weight whose
// fused bias it is.
enum class Form : int { rows = 0, factored = 1, fused_bias = 2 };

// One use of a parameter by the row-local part of the program (see gram.h).
struct Use {
  int instruction;
  int parameter;
  Form form;
  index row0;        // factored: rows row0 .. row0 + n - 1 are the n dimension of the product
  bool m_is_high;    // factored: which dimension of the weight has the larger stride
  int fused_bias;     // factored: the bias added to the same result, whose rows are Y itself; -1: none
  bool row_per_n;    // rows: the row of y depends on n alone (matmul), or not on the innermost index (muladd, gather)
};

// Residuals of `rows` rows, ascending: r0 and those that follow, or those listed. Outputs first_output .. first_output + outputs
// - 1 of each; K orders residuals block, output, row.
struct Block {
  index r0, rows, outputs, base, first_output = 0;
  std::vector<index> list;

  index row(index i) const { return list.empty() ? r0 + i : list[std::size_t(i)]; }
  // How many of its rows come before this one.
  index before(index row) const {
    if (list.empty()) return std::clamp<index>(row - r0, 0, rows);
    return std::lower_bound(list.begin(), list.end(), row) - list.begin();
  }
};

// How residuals group into rows: filled once per structure, needed for Gram and dense forms only.
struct RowLayout {
  index num_rows = 0, max_outputs = 0;
  std::vector<index> output_of;            // per residual element: which unit cotangent reaches it
  std::vector<index> k_of;                  // per residual element: its row of K
  std::vector<Block> blocks;
  std::vector<Use> uses;
  std::vector<std::vector<std::int32_t>> labels;   // per buffer: row of each element, or empty
  bool local = false;                       // false: no row structure, Jacobian rows come one VJP at a time

  // Derived by finalize(): row * max_outputs + output -> row of K, or residual element; -1 where there is none.
  std::vector<index> k_index, element;
  // Per buffer, where every labelled element e belongs to row first_row + e / row_width; width 0: no such form.
  std::vector<index> row_width, first_row;

  void finalize();
};

// A bound constant: a strided tensor, one number, or the positions of a gather.
template <class T>
struct Constant {
  const T* data = nullptr;
  T value{};
  const index* positions = nullptr;
};

// Operations of an instruction.
double flops_of(const Instruction& op);

// How an instruction runs over rows: dimension `dim` counts them, `per_row` of its indices to each.
struct RowCut {
  int instruction;
  int dim;         // muladd, project: of its shape; matmul: 0 outer, 1 b, 2 m, 3 n; gather: 0; -1: not cut
  index per_row;
};

// Instructions whose buffers meet, in the order of the program (see cut.h).
struct Component {
  index rows = 1;             // 1: not cut
  index row_elements = 0;     // of its buffers
  index largest_weight = 0;   // elements of the largest matrix that all rows are multiplied with
  double flops = 0;
  std::vector<RowCut> cuts;
};

struct Structure {
  std::vector<Buffer> buffers;
  std::vector<Instruction> instructions;
  index num_parameters = 0, num_residuals = 0, arena_size = 0;
  int num_parameter_buffers = 0;
  std::vector<char> zero_forward, zero_adjoint;   // buffers to clear before a sweep
  double flops = 0, largest = 0;                  // operations of one sweep, and of its largest instruction
  std::vector<Component> parts;

  // Lays out the arena, finds which writes may overwrite, and cuts by rows. Call once after filling the lists.
  void finalize();
};

}  // namespace pgdfast
