// Products with J and its transpose: the launches of a schedule, on memory that the caller owns.
#pragma once

#include "blas.h"

namespace pgdfast::cuda {

// The three memories a buffer can live in, and scratch memory for partial sums.
template <class T>
struct Memory {
  T *v, *u, *arena, *scratch;
  T* at(const Buffer& buffer) const {
    return (buffer.role == Role::parameter ? v : buffer.role == Role::residual ? u : arena) + buffer.offset;
  }
};

template <class T>
struct Bound {
  const Structure* structure;
  std::vector<Constant<T>> constants;
};

// What an instruction multiplies by: alpha with a scalar constant taken in, and the tensor or positions, if any.
template <class T>
struct Coefficient {
  T alpha;
  const T* data = nullptr;
  const index* positions = nullptr;
};
template <class T>
Coefficient<T> coefficient(const Bound<T>& program, const Instruction& op) {
  if (op.constant < 0) return {T(op.alpha)};
  const Constant<T>& c = program.constants[std::size_t(op.constant)];
  if (c.positions) return {T(op.alpha), nullptr, c.positions + op.c_offset};
  if (c.data == nullptr) return {T(op.alpha) * c.value};
  return {T(op.alpha), c.data + op.c_offset};
}

// Runs a schedule of this direction.
template <class T>
void run(const Bound<T>& program, const Schedule& schedule, Direction direction, const Memory<T>& memory, Stream stream);

// out[i] = function(x[i]) for `count` elements; x in T or in float.
template <class T>
void evaluate(int function, index count, const void* x, bool x_is_float, T* out, Stream stream);

// out[b] (+)= alpha left[b] right[b] by our own kernel, whatever the strides.
template <class T>
void small_product(const Product& p, T alpha, const T* left, const T* right, T* out, bool overwrite, Stream stream);

}  // namespace pgdfast::cuda
