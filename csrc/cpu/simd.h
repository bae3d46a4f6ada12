// Vector bodies written once (simd_body.inl), compiled per instruction set, picked at run time.
#pragma once

#include "../plan/plan.h"
#include "jet.h"

namespace pgdfast {

// What becomes of a constant c when it is bound; FUNCTIONS in pgdfast/tape/program.py.
enum class Function : int { identity = 0, one_minus_square = 1, minus_square = 2, positions = 3 };

// Element j of row i is data[i * row + j * step]; ones where there is no data.
template <class T>
struct Coefficients {
  const T* data = nullptr;
  index row = 0, step = 0;
};

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
  // c[i, j] (+)= alpha * sum_l a[i, l] * b[l, j] for products too small for a BLAS; strides by rows and columns.
  void (*small_gemm)(index m, index n, index k, T alpha, const T* a, index a_row, index a_col, const T* b, index b_row,
                     index b_col, T* c, index c_row, index c_col, bool overwrite);
  // y (+)= post * (pre * x - alpha * sum_t left_t * <right_t, pre * x>), t < terms <= kMaxTerms, for rows of n.
  void (*project)(index rows, index n, T alpha, int terms, const Coefficients<T>& pre, const Coefficients<T>& post,
                  const Coefficients<T>* left, const Coefficients<T>* right, const Coefficients<T>& x, T* y, index y_row,
                  index y_step, bool overwrite);
  // One iteration of CG in three passes, sums in double; m may be null (ones).
  // y += d * x; returns <x, y>.
  double (*damped_dot)(index n, const T* d, const T* x, T* y);
  // x += alpha * p, r -= alpha * Ap; sums = <r, r>, <r, m * r>.
  void (*cg_update)(index n, T alpha, const T* p, const T* Ap, const T* m, T* x, T* r, double* sums);
  // p = m * r + beta * p.
  void (*cg_direction)(index n, T beta, const T* m, const T* r, T* p);
  // Activations of Taylor mode (jet.h), z (points, given, width): y, and kept unless null. along: null, or the first derivatives
  // that all points share, (K, width). a and b: what functions_of in jet.cpp computed, (points, width). scratch: 3 * (width + 16).
  void (*jet_activation)(Activation kind, index points, index width, index given, const Channels& channels, T scale, const T* z,
                         const T* along, const T* a, const T* b, T* y, T* kept, T* scratch);
  void (*jet_adjoint)(index points, index width, const Channels& channels, const T* kept, const T* y_bar, T* z_bar);
};

template <class T>
const Simd<T>& simd();

// "avx512", "avx2" or "baseline"; the best that this processor runs unless another was chosen.
const char* simd_name();
// Takes another from now on. Raises std::invalid_argument for one that there is not or that this processor does not run.
void choose_instruction_set(const char* name);

}  // namespace pgdfast
