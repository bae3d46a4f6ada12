// The factors of all rows of J, packed for products with those of other rows: K = J W J^T of a problem in parts, whose rows come
// from several programs or processes.
//
// What is packed does not depend on its program any more. It is numbers, which may lie anywhere, and a header that describes
// them; machines with tiles of one width understand each other.
#pragma once

#include <memory>
#include <vector>

#include "factors.h"

namespace pgdfast {

template <class T>
struct Packed {
  index count = 0;                     // residuals
  std::vector<index> sizes;            // elements of every parameter buffer
  std::vector<Block> blocks;           // rows, outputs, base
  std::vector<Side<T>> sides;          // one per block
  std::vector<Slice> slices;           // the columns of explicit rows
  std::vector<char> repeated;          // see Passes
  const T* data = nullptr;             // the numbers; null until they are known
  index elements = 0;
  std::unique_ptr<T[]> own;            // they, where they were packed here

  Packed() = default;
  Packed(const Packed&) = delete;      // sides point to blocks
  Packed& operator=(const Packed&) = delete;

  std::vector<index> header() const;
};

// From the unit sweeps of what is bound, which it makes; unweighed. Needs a row layout.
template <class T>
std::shared_ptr<Packed<T>> pack(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work);

// What a header describes, over numbers that the caller keeps. Raises std::runtime_error for a header that is not one, or of
// tiles of another width, or not of so many numbers.
template <class T>
std::shared_ptr<Packed<T>> read_packed(const std::vector<index>& header, const T* data, index elements);

// Rows first .. last - 1 of J_a W J_b^T in the orders of K of both, at K, `ld` elements to a row; where a and b are one object,
// from the diagonal on. Nothing else is written. Parameters that one of them has as factors and the other as explicit rows are
// spread out for both. Raises std::runtime_error where parameters differ in number or size.
template <class T>
void gram_rows(const Packed<T>& a, const Packed<T>& b, index first, index last, const T* weights, T* K, index ld);

}  // namespace pgdfast
