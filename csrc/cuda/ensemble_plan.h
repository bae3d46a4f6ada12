// The program of one member as the ensemble kernel reads it: structs of 64-bit numbers in one table. Plain C++.
#pragma once

#include "gram_plan.h"

namespace pgdfast::cuda {

// An instruction. muladd: ndim dimensions; matmul: (outer, batch, m, n, k) in shape, strides of (outer, batch, m, n) in ys,
// (outer, batch, m, k) in xs, (outer, batch, k, n) in cs[0]; gather: (rows, width, count), rows of y and x in ys[0] and xs[0];
// project: as in plan.h.
struct MemberOp {
  index kind, y_role, y, x_role, x;   // places in the memory of the role
  index constant, c_offset;
  double alpha;
  index overwrite_y, overwrite_x, uses_parameter, apart_y, apart_x;   // apart: no two lanes write one element
  index ndim, terms;
  index shape[kMaxDims + 1], ys[kMaxDims + 1], xs[kMaxDims + 1], cs[1 + 2 * kMaxTerms][kMaxDims + 1];
  index constants[1 + 2 * kMaxTerms], offsets[1 + 2 * kMaxTerms];
};

// A factored use: constants c[row * cn + d * ck], cotangents arena[y + row * yn + d * ym], rows row0 .. row0 + n - 1.
struct MemberFactor {
  index constant, c_offset, cn, ck, k, y, yn, ym, m, row0, n;
};
struct MemberPair {
  index left, right;   // factors
  index alike;         // both have cotangents along the same dimension of the weight
  index biased;        // a bias joins: (C C'^T) + 1
};
struct MemberRows {    // an explicit use
  index starts, entries, lanes, xk, ck, gathers, x_row, offset, y, constant, c_offset;
  double alpha;
};
struct MemberBuffer {  // to be cleared before a sweep
  index role, offset, size;
};

// Where all that stands in the table, and how many there are.
struct MemberPlaces {
  index ops = 0, num_ops = 0, factors = 0, num_factors = 0, pairs = 0, num_pairs = 0, rows = 0, num_row_uses = 0;
  index clear_forward = 0, num_clear_forward = 0, clear_adjoint = 0, num_clear_adjoint = 0;
  index row_of = 0, output_of = 0;   // per residual
  index columns = 0;                  // explicit columns of J
  index num_rows = 0, outputs = 1, element = 0;   // element: residual by (row, output), -1: none
  index sizes = 0, num_parameter_buffers = 0;      // elements of every parameter buffer
};
struct EnsemblePlan : MemberPlaces {
  std::vector<index> table;
};

// layout.local decides whether there is a Gram matrix; CG needs none.
EnsemblePlan plan_ensemble(const Structure& s, const RowLayout& layout);

}  // namespace pgdfast::cuda
