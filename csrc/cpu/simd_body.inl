// Included by one file per instruction set with PGDFAST_ISA defined. Everything but the two tables has internal
// linkage and uses no library template, so that no code compiled for one set can be linked into another.
#include "simd.h"

namespace pgdfast {
namespace {

template <class T, class C>
inline void muladd_loop(index n, C coefficient, const T* x, index ix, T* y, index iy, bool overwrite) {
  if (iy == 1 && ix == 1) {
    if (overwrite) {
#pragma omp simd
      for (index i = 0; i < n; ++i) y[i] = coefficient(i) * x[i];
    } else {
#pragma omp simd
      for (index i = 0; i < n; ++i) y[i] += coefficient(i) * x[i];
    }
  } else if (iy == 1 && ix == 0) {
    const T value = x[0];
    if (overwrite) {
#pragma omp simd
      for (index i = 0; i < n; ++i) y[i] = coefficient(i) * value;
    } else {
#pragma omp simd
      for (index i = 0; i < n; ++i) y[i] += coefficient(i) * value;
    }
  } else if (iy == 0) {
    T sum = 0;
    if (ix == 1) {
#pragma omp simd reduction(+ : sum)
      for (index i = 0; i < n; ++i) sum += coefficient(i) * x[i];
    } else {
      for (index i = 0; i < n; ++i) sum += coefficient(i) * x[i * ix];
    }
    y[0] += sum;
  } else if (overwrite) {
    for (index i = 0; i < n; ++i) y[i * iy] = coefficient(i) * x[i * ix];
  } else {
    for (index i = 0; i < n; ++i) y[i * iy] += coefficient(i) * x[i * ix];
  }
}

template <class T>
struct Uniform {
  T alpha;
  T operator()(index) const { return alpha; }
};
template <class T>
struct Contiguous {
  T alpha;
  const T* c;
  T operator()(index i) const { return alpha * c[i]; }
};
template <class T>
struct Strided {
  T alpha;
  const T* c;
  index step;
  T operator()(index i) const { return alpha * c[i * step]; }
};

template <class T>
void muladd(index n, T alpha, const T* c, index ic, const T* x, index ix, T* y, index iy, bool overwrite) {
  if (c == nullptr) {
    muladd_loop(n, Uniform<T>{alpha}, x, ix, y, iy, overwrite);
  } else if (ic == 0) {
    muladd_loop(n, Uniform<T>{alpha * c[0]}, x, ix, y, iy, overwrite);
  } else if (ic == 1) {
    muladd_loop(n, Contiguous<T>{alpha, c}, x, ix, y, iy, overwrite);
  } else {
    muladd_loop(n, Strided<T>{alpha, c, ic}, x, ix, y, iy, overwrite);
  }
}

template <class T, class S>
void evaluate(Function function, index n, const S* x, T* y) {
  if (function == Function::one_minus_square) {
#pragma omp simd
    for (index i = 0; i < n; ++i) y[i] = T(1) - T(x[i]) * T(x[i]);
  } else if (function == Function::minus_square) {
#pragma omp simd
    for (index i = 0; i < n; ++i) y[i] = T(x[i]) - T(x[i]) * T(x[i]);
  } else {
#pragma omp simd
    for (index i = 0; i < n; ++i) y[i] = T(x[i]);
  }
}

template <class T>
double dot(index n, const T* x, const T* y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (index i = 0; i < n; ++i) sum += double(x[i]) * double(y[i]);
  return sum;
}

template <class T>
void axpby(index n, T alpha, const T* x, T beta, T* y) {
#pragma omp simd
  for (index i = 0; i < n; ++i) y[i] = alpha * x[i] + beta * y[i];
}

template <class T>
void hadamard(index rows, index cols, T weight, T shift, const T* s, const T* t, index ld, T* acc, index ld_acc) {
  for (index i = 0; i < rows; ++i) {
    const T *si = s + i * ld, *ti = t + i * ld;
    T* out = acc + i * ld_acc;
#pragma omp simd
    for (index j = 0; j < cols; ++j) out[j] += (weight * si[j] + shift) * ti[j];
  }
}

template <class T>
const Simd<T>* make_table() {
  static const Simd<T> table = {evaluate<T, T>, evaluate<T, float>, muladd<T>, dot<T>, axpby<T>, hadamard<T>};
  return &table;
}

}  // namespace

#define PGDFAST_PASTE2(a, b) a##b
#define PGDFAST_PASTE(a, b) PGDFAST_PASTE2(a, b)
const Simd<float>* PGDFAST_PASTE(simd_float_, PGDFAST_ISA)() { return make_table<float>(); }
const Simd<double>* PGDFAST_PASTE(simd_double_, PGDFAST_ISA)() { return make_table<double>(); }

}  // namespace pgdfast
