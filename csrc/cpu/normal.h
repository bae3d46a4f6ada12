// H = J^T J by pairs of uses, without J: rows of J are outer products of constants C and cotangents Y_o (rows.h), hence
//     H[(m,k),(m',k')] += sum_n (sum_o Y_o[n,m] Y'_o[n,m']) C[n,k] C'[n,k'],
// N P^2 multiply-adds for N rows where the explicit J takes N O P^2: O outputs of a row are summed before the product.
#pragma once

#include "rows.h"

namespace pgdfast {

// Adds to H, row-major P x P with `ld` elements to a row, of which columns P .. ld - 1 must exist and are not changed. The
// upper triangle is right, what is left of the diagonal is not. Needs a row layout.
template <class T>
void normal(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* H, index ld);

// H = A A^T of an explicit A, n x depth, element (i, l) at i * row + l * column: the upper triangle, as above, with columns up
// to ld; H need not be cleared, unless the product is to be added to it.
template <class T>
void symmetric_product(const T* A, index n, index depth, index row, index column, Workspace<T>& work, T* H, index ld,
                       bool add = false);

}  // namespace pgdfast
