// Rows of the Jacobian by unit cotangents, explicit or as factors.
//
// One adjoint sweep with unit cotangents per output o leaves, at every use of a weight, its constant rows C (N x k) and its
// cotangent rows Y_o (N x m): the rows of J for that use are the outer products C_i (x) Y_oi.
#pragma once

#include <functional>

#include "sweep.h"

namespace pgdfast {

// What a pass over K (gram.h) needs beside its factors: products of constants that outputs share, and tiles of every thread.
template <class T>
struct GramScratch {
  std::vector<T> shared;
  std::vector<std::vector<T>> threads;
};

// Buffers that persist between steps; grown when first needed.
template <class T>
struct Workspace {
  std::vector<T> arenas;                // one arena per output
  bool unit_cotangents_valid = false;   // they hold the unit sweeps of the present constants
  std::vector<T> unit;                  // M: a unit cotangent
  std::vector<T> rows;                  // M x P_explicit: Jacobian of the parameters whose uses are explicit
  std::vector<T> packed, copy;          // panels of factors, a factor in K's order
  GramScratch<T> gram;
  std::vector<std::vector<T>> scratch;  // one per thread
};

// Fills one arena per output with the cotangents that unit residuals produce, unless they are there; the units are those of the
// row scale where there is one.
template <class T>
void unit_sweeps(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work);

// Where the cotangent of an instruction's result lies in the arena of a output. No use writes the residual itself.
template <class T>
const T* cotangent(const Structure& s, const Instruction& op, const T* arena) {
  return arena + s.buffers[std::size_t(op.y)].offset + op.y_offset;
}

// The columns that a parameter of `size` elements takes in explicit rows: in their own order, or folded, element x at
// (x % fold) * (size / fold) + x / fold, where that turns long strided loops into contiguous ones.
struct Folding {
  index fold = 1, size = 0;
  bool takes(index stride) const { return stride % fold == 0 || stride == 1; }
  index stride(index x) const { return fold == 1 ? x : x % fold == 0 ? x / fold : size / fold; }
  index offset(index x) const { return fold == 1 ? x : x % fold * (size / fold) + x / fold; }
};

// Adds the Jacobian rows of one use and output to J (leading dimension ld, origin at the parameter's columns). `op` is the
// use's instruction, or a part of it. `row_index` maps row * max_outputs + output to a row of J.
template <class T>
void add_rows(const Bound<T>& program, const RowLayout& layout, const Use& use, const Instruction& op, const T* arena,
              const std::vector<index>& row_index, index output, T* J, index ld, Folding columns = {});

// v = J^T y for y in K index order, from the last unit sweeps: where rows have one output each and lie in order, the
// cotangents of y are those of ones, row by row times y. False, with nothing done, elsewhere.
template <class T>
bool vjp_from_units(const Bound<T>& program, const RowLayout& layout, const Workspace<T>& work, const T* y, T* v, T* arena);

// J, row-major M x P, rows in residual order.
template <class T>
void dense(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* J);

// The columns of J of some parameters, M x width: those of parameter buffer l from start[l] on, none where that is negative.
// Needs a row layout.
template <class T>
void dense_columns(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, const std::vector<index>& start,
                   index width, T* J);

// body(rows) for all rows of J, `most` of them at a time in J: row-major with P columns, in the order of K where there is a row
// layout. Without one each row is a product with J^T.
template <class T>
void each_rows(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, index most, T* J,
               const std::function<void(index rows)>& body);

// H += J^T J of a J without a row layout, by P products with J and as many with J^T: H row-major, `ld` elements to a row, of which
// the upper triangle is written.
template <class T>
void normal_by_products(const Bound<T>& program, Workspace<T>& work, T* H, index ld);

// diag(J^T J), P entries.
template <class T>
void diagonal(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* d);

}  // namespace pgdfast
