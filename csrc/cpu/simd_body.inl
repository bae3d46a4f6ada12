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
void small_gemm(index m, index n, index k, T alpha, const T* a, index a_row, index a_col, const T* b, index b_row,
                index b_col, T* c, index c_row, index c_col, bool overwrite) {
  if (a_col == 1 && b_row == 1 && k > 1) {   // inner products of contiguous vectors
    for (index i = 0; i < m; ++i)
      for (index j = 0; j < n; ++j) {
        const T *ai = a + i * a_row, *bj = b + j * b_col;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (index l = 0; l < k; ++l) sum += ai[l] * bj[l];
        T& out = c[i * c_row + j * c_col];
        out = alpha * sum + (overwrite ? T(0) : out);
      }
    return;
  }
  const bool transposed = a_row == 1 && c_row == 1 && !(b_col == 1 && c_col == 1 && n >= m);
  if (transposed) {
    small_gemm(n, m, k, alpha, b, b_col, b_row, a, a_col, a_row, c, c_col, c_row, overwrite);
    return;
  }
  for (index l = 0; l < k; ++l)
    for (index i = 0; i < m; ++i) {
      const T factor = alpha * a[i * a_row + l * a_col];
      const T* bl = b + l * b_row;
      T* ci = c + i * c_row;
      if (b_col == 1 && c_col == 1) {
        if (overwrite && l == 0) {
#pragma omp simd
          for (index j = 0; j < n; ++j) ci[j] = factor * bl[j];
        } else {
#pragma omp simd
          for (index j = 0; j < n; ++j) ci[j] += factor * bl[j];
        }
      } else {
        for (index j = 0; j < n; ++j)
          ci[j * c_col] = factor * bl[j * b_col] + (overwrite && l == 0 ? T(0) : ci[j * c_col]);
      }
    }
}

// Coefficient i: a vector's element, or one value for all.
template <bool vector, class T>
inline T at(const Coefficients<T>& c, index i) {
  return vector ? c.data[i] : c.value;
}

template <bool Pre, bool Post, bool L, bool R, bool L2, bool R2, class T>
inline void project_row(index n, T alpha, bool second, const Coefficients<T>& pre, const Coefficients<T>& post,
                        const Coefficients<T>* left, const Coefficients<T>* right, const T* x, T* y, bool overwrite) {
  T s = 0, s2 = 0;
  if (second) {
#pragma omp simd reduction(+ : s, s2)
    for (index i = 0; i < n; ++i) {
      const T z = at<Pre>(pre, i) * x[i];
      s += at<R>(right[0], i) * z;
      s2 += at<R2>(right[1], i) * z;
    }
  } else {
#pragma omp simd reduction(+ : s)
    for (index i = 0; i < n; ++i) s += at<R>(right[0], i) * (at<Pre>(pre, i) * x[i]);
  }
  s *= alpha;
  s2 *= alpha;
  const auto value = [&](index i) {
    T z = at<Pre>(pre, i) * x[i] - at<L>(left[0], i) * s;
    if (L2) z -= at<L2>(left[1], i) * s2;
    return at<Post>(post, i) * z;
  };
  if (overwrite) {
#pragma omp simd
    for (index i = 0; i < n; ++i) y[i] = value(i);
  } else {
#pragma omp simd
    for (index i = 0; i < n; ++i) y[i] += value(i);
  }
}

template <class T>
void project(index n, T alpha, int terms, const Coefficients<T>& pre, const Coefficients<T>& post,
             const Coefficients<T>* left, const Coefficients<T>* right, const T* x, index ix, T* y, index iy,
             bool overwrite) {
  const auto is = [](const Coefficients<T>& c) { return c.data && c.step == 1; };
  bool plain = ix == 1 && iy == 1;
  const auto usable = [](const Coefficients<T>& c) { return c.data == nullptr || c.step == 1; };
  plain = plain && usable(pre) && usable(post);
  for (int t = 0; t < terms; ++t) plain = plain && usable(left[t]) && usable(right[t]);
  if (plain && terms == 2 && !is(left[0]) && !is(right[0]) && is(left[1]) && is(right[1])) {   // layer norm
    if (!is(pre) && !is(post)) return project_row<false, false, false, false, true, true>(n, alpha, true, pre, post, left, right, x, y, overwrite);
    if (!is(pre)) return project_row<false, true, false, false, true, true>(n, alpha, true, pre, post, left, right, x, y, overwrite);
    if (!is(post)) return project_row<true, false, false, false, true, true>(n, alpha, true, pre, post, left, right, x, y, overwrite);
  }
  if (plain && terms == 1 && !is(left[0]) && is(right[0])) {   // softmax
    if (!is(pre) && !is(post)) return project_row<false, false, false, true, false, false>(n, alpha, false, pre, post, left, right, x, y, overwrite);
    if (!is(pre)) return project_row<false, true, false, true, false, false>(n, alpha, false, pre, post, left, right, x, y, overwrite);
  }
  if (plain && terms == 1 && is(left[0]) && !is(right[0])) {   // its adjoint
    if (!is(pre) && !is(post)) return project_row<false, false, true, false, false, false>(n, alpha, false, pre, post, left, right, x, y, overwrite);
    if (!is(post)) return project_row<true, false, true, false, false, false>(n, alpha, false, pre, post, left, right, x, y, overwrite);
  }
  const auto get = [](const Coefficients<T>& c, index i) { return c.data ? c.data[i * c.step] : c.value; };
  T sums[kMaxTerms] = {};
  for (int t = 0; t < terms; ++t) {
    for (index i = 0; i < n; ++i) sums[t] += get(right[t], i) * get(pre, i) * x[i * ix];
    sums[t] *= alpha;
  }
  for (index i = 0; i < n; ++i) {
    T z = get(pre, i) * x[i * ix];
    for (int t = 0; t < terms; ++t) z -= get(left[t], i) * sums[t];
    y[i * iy] = get(post, i) * z + (overwrite ? T(0) : y[i * iy]);
  }
}

template <class T>
const Simd<T>* make_table() {
  static const Simd<T> table = {evaluate<T, T>, evaluate<T, float>, muladd<T>,     dot<T>,
                                axpby<T>,       hadamard<T>,        small_gemm<T>, project<T>};
  return &table;
}

}  // namespace

#define PGDFAST_PASTE2(a, b) a##b
#define PGDFAST_PASTE(a, b) PGDFAST_PASTE2(a, b)
const Simd<float>* PGDFAST_PASTE(simd_float_, PGDFAST_ISA)() { return make_table<float>(); }
const Simd<double>* PGDFAST_PASTE(simd_double_, PGDFAST_ISA)() { return make_table<double>(); }

}  // namespace pgdfast
