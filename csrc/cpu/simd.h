// Vector bodies written once (simd_body.inl), compiled per instruction set, picked at run time.
#pragma once

#include "../plan/plan.h"

namespace pgdfast {

// What becomes of a constant c when it is bound; FUNCTIONS in pgdfast/tape/program.py.
enum class Function : int { identity = 0, one_minus_square = 1, minus_square = 2 };

template <class T>
struct Simd {
  // y = function(x); x may be narrower than y.
  void (*evaluate)(Function function, index n, const T* x, T* y);
  void (*evaluate_float)(Function function, index n, const float* x, T* y);
  // y[i*iy] (+)= alpha * c[i*ic] * x[i*ix], i < n; c may be null. iy == 0 reduces into y[0] (never overwrites).
  void (*muladd)(index n, T alpha, const T* c, index ic, const T* x, index ix, T* y, index iy, bool overwrite);
  // sum_i x[i] * y[i], accumulated in double.
  double (*dot)(index n, const T* x, const T* y);
  // y = alpha * x + beta * y.
  void (*axpby)(index n, T alpha, const T* x, T beta, T* y);
  // acc[i, j] += (weight * s[i, j] + shift) * t[i, j].
  void (*hadamard)(index rows, index cols, T weight, T shift, const T* s, const T* t, index ld, T* acc, index ld_acc);
};

template <class T>
const Simd<T>& simd();

// "avx512", "avx2" or "baseline"; the best this processor runs unless PGDFAST_ISA names another it can run.
const char* simd_name();

}  // namespace pgdfast
