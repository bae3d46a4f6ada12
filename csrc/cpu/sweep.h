// The Jacobian's two products: the program run forward (tangents) and backward (cotangents).
//
// J is that of the program, or where there is a row scale that times it, row by row: all that is made of J comes from these.
#pragma once

#include "../plan/plan.h"

namespace pgdfast {

template <class T>
struct Bound {
  const Structure* structure;
  std::vector<Constant<T>> constants;
  const T* row_scale = nullptr;   // of every residual a factor of its row of J; null: ones
};

// u = J v. `arena` holds structure.arena_size elements.
template <class T>
void jvp(const Bound<T>& program, const T* v, T* u, T* arena);

// v = J^T u.
template <class T>
void vjp(const Bound<T>& program, const T* u, T* v, T* arena);

// The adjoint sweep that stops short of the parameters: leaves in `arena` the cotangent of every workspace buffer.
template <class T>
void adjoint_to_uses(const Bound<T>& program, const T* u, T* arena);

// The rest of that sweep: v = J^T u from the cotangents in `arena`, through the uses of parameters alone.
template <class T>
void adjoint_from_uses(const Bound<T>& program, T* v, T* arena);

}  // namespace pgdfast
