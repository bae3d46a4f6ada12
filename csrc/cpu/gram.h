// K = J W J^T without the Jacobian, and explicit Jacobian rows where those are wanted.
//
// One adjoint sweep with unit cotangents per section o gives, at every use of a weight, its constant rows C (N x k)
// and its cotangent rows Y_o (N x m); the rows of J for that use are the outer products C_i (x) Y_oi, hence
//     K[(i,o),(j,o')] += sum over pairs of uses (C C'^T)_ij * (Y_o Y'_o'^T)_ij.
#pragma once

#include "sweep.h"

namespace pgdfast {

// Two products of factors: the scratch of one block of K.
template <class T>
struct Scratch {
  std::vector<T> high, low;
};

// Buffers that persist between steps; grown when first needed.
template <class T>
struct Workspace {
  std::vector<T> arenas;            // one arena per section
  std::vector<T> unit;              // M: a unit cotangent
  std::vector<T> rows;              // M x P_explicit: Jacobian of the parameters whose uses are explicit
  std::vector<Scratch<T>> scratch;  // one per thread
};

// K index order (see Tile), upper triangle, row-major, M x M. `weights` has one factor per parameter buffer.
template <class T>
void gram(const Bound<T>& program, const RowLayout& layout, const T* weights, Workspace<T>& work, T* K);

// v = J^T y for y in K index order, from the unit sweeps of the last gram(): where rows have one section each and lie in
// order, the cotangents of y are those of ones, row by row times y. False, with nothing done, elsewhere.
template <class T>
bool vjp_from_units(const Bound<T>& program, const RowLayout& layout, const Workspace<T>& work, const T* y, T* v, T* arena);

// J, row-major M x P, rows in residual order.
template <class T>
void dense(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* J);

// diag(J^T J), P entries.
template <class T>
void diagonal(const Bound<T>& program, const RowLayout& layout, Workspace<T>& work, T* d);

}  // namespace pgdfast
