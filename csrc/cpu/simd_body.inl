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
void small_gemm(index m, index n, index k, T alpha, const T* a, index a_row, index a_col, const T* b, index b_row,
                index b_col, T* c, index c_row, index c_col, bool overwrite) {
  if (a_col == 1 && b_row == 1 && k > 1) {   // inner products of contiguous vectors
    for (index i = 0; i < m; ++i) {
      const T* ai = a + i * a_row;
      index j = 0;
      for (; j + 4 <= n; j += 4) {
        const T *b0 = b + j * b_col, *b1 = b0 + b_col, *b2 = b1 + b_col, *b3 = b2 + b_col;
        T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (index l = 0; l < k; ++l) {
          s0 += ai[l] * b0[l];
          s1 += ai[l] * b1[l];
          s2 += ai[l] * b2[l];
          s3 += ai[l] * b3[l];
        }
        const T sums[4] = {s0, s1, s2, s3};
        for (int q = 0; q < 4; ++q) {
          T& out = c[i * c_row + (j + q) * c_col];
          out = alpha * sums[q] + (overwrite ? T(0) : out);
        }
      }
      for (; j < n; ++j) {
        const T* bj = b + j * b_col;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (index l = 0; l < k; ++l) sum += ai[l] * bj[l];
        T& out = c[i * c_row + j * c_col];
        out = alpha * sum + (overwrite ? T(0) : out);
      }
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

// What one row sees of a coefficient: a vector, or one value for all.
template <bool vector, class T>
struct InRow {
  const T* data;
  T value;
  InRow(const Coefficients<T>& c, index i)
      : data(c.data ? c.data + i * c.row : nullptr), value(c.data && !vector ? c.data[i * c.row] : T(1)) {}
  T operator()(index j) const { return vector ? data[j] : value; }
};

// Rows with unit strides. The flags say which coefficients are vectors; a second term has vectors or does not exist.
template <bool Pre, bool Post, bool L, bool R, bool second, class T>
void project_rows(index rows, index n, T alpha, const Coefficients<T>& pre, const Coefficients<T>& post,
                  const Coefficients<T>* left, const Coefficients<T>* right, const Coefficients<T>& source, T* target,
                  index row, bool overwrite) {
  for (index i = 0; i < rows; ++i) {
    const InRow<Pre, T> a(pre, i);
    const InRow<Post, T> b(post, i);
    const InRow<L, T> l(left[0], i);
    const InRow<R, T> r(right[0], i);
    const InRow<second, T> l2(second ? left[1] : Coefficients<T>{}, i), r2(second ? right[1] : Coefficients<T>{}, i);
    const T* x = source.data + i * source.row;
    T* y = target + i * row;
    T s = 0, s2 = 0;
    if (second) {
#pragma omp simd reduction(+ : s, s2)
      for (index j = 0; j < n; ++j) {
        const T z = a(j) * x[j];
        s += r(j) * z;
        s2 += r2(j) * z;
      }
    } else {
#pragma omp simd reduction(+ : s)
      for (index j = 0; j < n; ++j) s += r(j) * (a(j) * x[j]);
    }
    s *= alpha;
    s2 *= alpha;
    if (overwrite) {
#pragma omp simd
      for (index j = 0; j < n; ++j) y[j] = b(j) * (a(j) * x[j] - l(j) * s - (second ? l2(j) * s2 : T(0)));
    } else {
#pragma omp simd
      for (index j = 0; j < n; ++j) y[j] += b(j) * (a(j) * x[j] - l(j) * s - (second ? l2(j) * s2 : T(0)));
    }
  }
}

template <class T>
void project(index rows, index n, T alpha, int terms, const Coefficients<T>& pre, const Coefficients<T>& post,
             const Coefficients<T>* left, const Coefficients<T>* right, const Coefficients<T>& x, T* y, index y_row,
             index y_step, bool overwrite) {
  // 1: a vector, 0: one value a row, -1: neither, for the plain loops.
  const auto kind = [](const Coefficients<T>& c) { return c.data == nullptr || c.step == 0 ? 0 : c.step == 1 ? 1 : -1; };
  int key = -1;
  if (x.step == 1 && y_step == 1 && terms >= 1 && kind(pre) >= 0 && kind(post) >= 0 && kind(left[0]) >= 0 &&
      kind(right[0]) >= 0 && (terms == 1 || (kind(left[1]) == 1 && kind(right[1]) == 1)))
    key = kind(pre) | kind(post) << 1 | kind(left[0]) << 2 | kind(right[0]) << 3 | (terms == 2) << 4;
  switch (key) {
#define PGDFAST_PROJECT(pre_, post_, left_, right_, second_)                                                        \
  case pre_ | post_ << 1 | left_ << 2 | right_ << 3 | second_ << 4:                                                 \
    return project_rows<pre_, post_, left_, right_, second_>(rows, n, alpha, pre, post, left, right, x, y, y_row, overwrite);
    PGDFAST_PROJECT(0, 0, 0, 0, 1)   // layer norm
    PGDFAST_PROJECT(0, 1, 0, 0, 1)   // with a weight
    PGDFAST_PROJECT(1, 0, 0, 0, 1)   // its adjoint
    PGDFAST_PROJECT(0, 0, 0, 1, 0)   // log-softmax
    PGDFAST_PROJECT(0, 0, 1, 0, 0)   // its adjoint
    PGDFAST_PROJECT(0, 1, 0, 1, 0)   // softmax
    PGDFAST_PROJECT(1, 0, 1, 0, 0)   // its adjoint
#undef PGDFAST_PROJECT
    default: break;
  }
  for (index i = 0; i < rows; ++i) {
    const auto get = [i](const Coefficients<T>& c, index j) { return c.data ? c.data[i * c.row + j * c.step] : T(1); };
    T sums[kMaxTerms] = {};
    for (int t = 0; t < terms; ++t) {
      for (index j = 0; j < n; ++j) sums[t] += get(right[t], j) * get(pre, j) * get(x, j);
      sums[t] *= alpha;
    }
    for (index j = 0; j < n; ++j) {
      T z = get(pre, j) * get(x, j);
      for (int t = 0; t < terms; ++t) z -= get(left[t], j) * sums[t];
      T& out = y[i * y_row + j * y_step];
      out = get(post, j) * z + (overwrite ? T(0) : out);
    }
  }
}

template <class T>
double damped_dot(index n, const T* d, const T* x, T* y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (index i = 0; i < n; ++i) {
    y[i] += d[i] * x[i];
    sum += double(x[i]) * double(y[i]);
  }
  return sum;
}

template <class T>
void cg_update(index n, T alpha, const T* p, const T* Ap, const T* m, T* x, T* r, double* sums) {
  double square = 0, weighted = 0;
  if (m == nullptr) {
#pragma omp simd reduction(+ : square)
    for (index i = 0; i < n; ++i) {
      x[i] += alpha * p[i];
      r[i] -= alpha * Ap[i];
      square += double(r[i]) * double(r[i]);
    }
    weighted = square;
  } else {
#pragma omp simd reduction(+ : square, weighted)
    for (index i = 0; i < n; ++i) {
      x[i] += alpha * p[i];
      r[i] -= alpha * Ap[i];
      square += double(r[i]) * double(r[i]);
      weighted += double(r[i]) * double(m[i] * r[i]);
    }
  }
  sums[0] = square;
  sums[1] = weighted;
}

template <class T>
void cg_direction(index n, T beta, const T* m, const T* r, T* p) {
  if (m == nullptr) {
#pragma omp simd
    for (index i = 0; i < n; ++i) p[i] = r[i] + beta * p[i];
  } else {
#pragma omp simd
    for (index i = 0; i < n; ++i) p[i] = m[i] * r[i] + beta * p[i];
  }
}

#include "jet_body.inl"

template <class T>
const Simd<T>* make_table() {
  static const Simd<T> table = {evaluate<T, T>, evaluate<T, float>, muladd<T>,     dot<T>,
                                axpby<T>,       small_gemm<T>,      project<T>,
                                damped_dot<T>,  cg_update<T>,       cg_direction<T>,
                                jet_activation<T>, jet_adjoint_rows<T>};
  return &table;
}

}  // namespace

#define PGDFAST_PASTE2(a, b) a##b
#define PGDFAST_PASTE(a, b) PGDFAST_PASTE2(a, b)
const Simd<float>* PGDFAST_PASTE(simd_float_, PGDFAST_ISA)() { return make_table<float>(); }
const Simd<double>* PGDFAST_PASTE(simd_double_, PGDFAST_ISA)() { return make_table<double>(); }

}  // namespace pgdfast
