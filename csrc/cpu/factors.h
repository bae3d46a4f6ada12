// What a pass over K needs of the uses of parameters: their factors, or columns of J, packed into panels.
//
// K sums over parameters, so it is built in passes, each with as many parameters as fit into a budget of memory. A small
// problem takes one; each further one costs a walk through K. Parameters with explicit rows, which would take M columns
// elements together, are cut into slices of columns.
#pragma once

#include <utility>
#include <vector>

#include "rows.h"
#include "tiles.h"

namespace pgdfast {

// A factor's rows in one block of K, packed.
template <class T>
struct Panels {
  const T* data = nullptr;
  index stride = 0, depth = 0;   // elements from panel to panel
};

// One use of a weight in one block: constants by row of the block (by residual where `Pass::repeated`), cotangents by
// residual. Uses of one weight may have their roles exchanged: in one the cotangents run along the weight's high dimension,
// in the other along its low one, as in double-backward nodes.
template <class T>
struct Factors {
  int parameter, fused_bias;
  bool m_is_high;
  Panels<T> constants, cotangents;
  index offset = 0, m_stride = 0, k_stride = 0;   // cotangent m and constant k belong to element offset + m m_stride + k k_stride
};

// What one block of residuals brings to K in a pass.
template <class T>
struct Side {
  const Block* block;
  index count;                       // residuals
  std::vector<Factors<T>> factors;
  Panels<T> explicit_rows;
};

// Elements first .. first + size - 1 of a parameter as columns of J, from column `start` of the pass on.
struct Slice {
  int parameter;
  index first, size, start;
  Folding folding;
};

struct Pass {
  std::vector<char> factored;   // per parameter buffer
  std::vector<Slice> slices;
  index columns = 0;            // of the slices
  index elements = 0;           // packed and shared, roughly
};

// The passes over K, and per parameter buffer whether constants are repeated for every output of a row: where uses have
// exchanged roles, or the products that outputs share would take too much.
struct Passes {
  std::vector<Pass> list;
  std::vector<char> repeated;
};

// `budget`: elements that one pass may take, unless a single parameter that cannot be cut takes more.
Passes plan_passes(const Structure& s, const RowLayout& layout, index width, index budget);

// Packs the factors and explicit rows of a pass, block by block, into the memory that `memory(elements)` gives.
// Needs unit sweeps.
template <class T>
std::vector<Side<T>> pack_pass(const Bound<T>& program, const RowLayout& layout, const T* weights, const Passes& passes,
                               const Pass& pass, int threads, Workspace<T>& work,
                               const std::function<T*(index)>& memory);

}  // namespace pgdfast
