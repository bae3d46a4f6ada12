// What the Gram matrix and explicit rows of J need, decided on the host once per structure: plain C++.
//
// Everything that kernels read lies in one table of 64-bit numbers, which the caller copies to the GPU.
#pragma once

#include <cstring>

#include "../plan/plan.h"

namespace pgdfast::cuda {

constexpr index kGramDepth = 16;   // depths of panels are multiples of it, with zeros behind

// One product of K's tiles: (weight * left1 right1^T + shift) * (left2 right2^T), or left1 right1^T alone where depth2 is 0.
// Panels lie at these elements of the packed memory, [depth][ld of the block].
struct GramPair {
  index left1, right1, depth1, left2, right2, depth2, parameter, fused_bias;
};

// A tile of K in a pair of blocks, its first row and column there; counts and first rows of K of both blocks, their ld.
struct GramTile {
  index row, column, row_count, column_count, row_base, column_base, row_ld, column_ld, first_pair, pairs;
};

// A factor of one use in one block, to be packed: rows begin .. end - 1 of the block, by output; zeros elsewhere.
struct Pack {
  int use;
  bool constants;          // else cotangents, from the arena of each output
  index first;             // row of the use that stands at `begin`
  index begin, end, rows, outputs, first_output, depth, padded, out, ld;
};

// Contributions of one use to rows of J: for entry e of a row, J[x + k xk] += alpha y[e.y] c[e.c + k ck], k < lanes.
struct Entry {
  index y, x, c;
};
struct RowUse {
  int use;
  index starts, entries;   // places in the table: num_rows + 1 numbers, then Entry after Entry
  index lanes = 1, xk = 0, ck = 0;
  bool gathers = false;    // x of an entry counts within the row of x that position c names
  index x_row = 0;
  index offset = 0;        // of the parameter's columns
};

struct RowTable {
  std::vector<RowUse> uses;
  index row_at = 0, row_step = 0;   // places in the table: per (row, output) where the row of J begins (-1: none), and its step
};

struct GramPlan {
  int tile = 0;                     // rows of a tile
  std::vector<Pack> packs;
  index pairs = 0, tiles = 0, num_tiles = 0, order = 0;   // places in the table; order: residual element by row of K
  index packed = 0;                 // elements
  index explicit_begin = 0;         // of them, columns of J: cleared, then added to
  RowTable rows;
  std::vector<index> table;
};

// Appends structs of 64-bit numbers to a table; their place.
template <class S>
index append(std::vector<index>& table, const std::vector<S>& items) {
  static_assert(sizeof(S) % sizeof(index) == 0);
  const std::size_t at = table.size();
  table.resize(at + items.size() * (sizeof(S) / sizeof(index)));
  if (!items.empty()) std::memcpy(table.data() + at, items.data(), items.size() * sizeof(S));
  return index(at);
}

// The contributions of use `number` to rows of J, its parameter's columns beginning at `offset`; entries go to the table.
RowUse row_use(const Structure& s, const RowLayout& layout, int number, index offset, std::vector<index>& table);

// Tiles of 16 * `rows_per_thread`.
GramPlan plan_gram(const Structure& s, const RowLayout& layout, int rows_per_thread);

// All of J, row-major in residual order.
struct DensePlan {
  RowTable rows;
  std::vector<index> table;
};
DensePlan plan_dense(const Structure& s, const RowLayout& layout);

}  // namespace pgdfast::cuda
