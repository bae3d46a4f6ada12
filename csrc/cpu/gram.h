// K = J W J^T without the Jacobian: with the constant rows C and cotangent rows Y_o of every use of a weight (rows.h),
//     K[(i,o),(j,o')] += sum over pairs of uses (C C'^T)_ij * (Y_o Y'_o'^T)_ij,
// tile by tile, so that neither product is ever stored whole. A bias added to the same result turns C C'^T into C C'^T + 1.
#pragma once

#include "factors.h"

namespace pgdfast {

// The leading dimension of K: rows end in whole panels.
template <class T>
index gram_stride(index num_residuals);

// K in K index order (see Block), row-major, gram_stride elements to a row. The upper triangle is right, what is left of
// the diagonal is not. `weights` has one factor per parameter buffer. Costs M^2 (m + k) a use with
// factors of m and k columns.
template <class T>
void gram(const Bound<T>& program, const RowLayout& layout, const T* weights, Workspace<T>& work, T* K);

// Elements that a pass over K may pack.
template <class T>
index pass_elements(index num_residuals);

// Rows first .. last - 1 of A W B^T, written to K or added to it: residual k of A stands in row k of K, and residual l of B in
// column l. same: A is B; from the diagonal on. repeated: see Passes. Explicit rows are weighed already.
template <class T>
void gram_of_sides(const std::vector<Side<T>>& A, const std::vector<Side<T>>& B, bool same, index first, index last,
                   const T* weights, const std::vector<char>& repeated, bool add, int threads, GramScratch<T>& scratch, T* K,
                   index ld);

}  // namespace pgdfast
