// Dense products on packed panels: the tiles of K and of its Cholesky factor. Written once (tiles_body.inl), compiled per
// instruction set, picked with the tables of simd.h.
//
// A panel holds `width` rows of a factor side by side: element (i, l) of rows i and depth l at panel[l * width + i].
#pragma once

#include "../plan/plan.h"

namespace pgdfast {

constexpr int kTilePanels = 3;   // panels that one tile spans at most

template <class T>
struct Tiles {
  index width;   // rows of a panel: one vector
  index rows;    // rows of a tile; divides width
  // Packs x (count x depth, given by strides) into ceil(count / width) panels, `panel` elements apart, with zeros
  // behind the last row.
  void (*pack)(index count, index depth, const T* x, index row, index column, T* out, index panel);
  // out[i, j] (+)= sum_l a[l * width + i] b_j[l * width + j'] for `valid` rows i and the columns of `panels` panels b.
  void (*product)(int panels, index valid, index depth, const T* a, const T* const* b, T* out, index ld, bool add);
  // out[i, j] (+)= (weight * s[i, j] + shift) * the same sum.
  void (*scaled_product)(int panels, index valid, index depth, const T* a, const T* const* b, const T* s, index lds,
                         T weight, T shift, T* out, index ld, bool add);
  // Rows r .. r + rows - 1 of U, U^T U = C, in the columns of some panels of U (see cholesky.h): c holds C less the products
  // of rows before k0; `a` is the panel of column r. Where that is b[0] itself the diagonal block is factored first, with
  // `added` on its diagonal. False if a pivot is not positive.
  bool (*eliminate)(int panels, index k0, index r, const T* a, T* const* b, const T* c, index ldc, const T* added, T* inverse);
  // out[l * width + j] (+)= s[l * width] * x[l * width + j], l < depth: a panel times a number per depth.
  void (*scale_panel)(index depth, const T* s, const T* x, T* out, bool add);
  // x[j] -= sum_{l < depth} panel[l * width + j] * y[l], j < width.
  void (*subtract_rows)(index depth, const T* panel, const T* y, T* x);
  // x[l] -= sum_j panel[l * width + j] * y[j], l < depth.
  void (*subtract_columns)(index depth, const T* panel, const T* y, T* x);
};

template <class T>
const Tiles<T>& tiles();

}  // namespace pgdfast
