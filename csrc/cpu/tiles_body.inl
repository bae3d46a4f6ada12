// Included by one file per instruction set, after simd_body.inl, with PGDFAST_ISA, the bytes of its vectors and the rows
// of a tile defined: as many accumulators as its registers hold. Internal linkage, no library template, as there.
#include <type_traits>
#include <utility>

#include "tiles.h"

namespace pgdfast {
namespace {

template <class T>
struct Lanes {
  static constexpr int count = PGDFAST_VECTOR_BYTES / int(sizeof(T));
  static constexpr int rows = count < PGDFAST_TILE_ROWS ? count : PGDFAST_TILE_ROWS;
#if defined(__GNUC__)
  typedef T Vector __attribute__((vector_size(PGDFAST_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(PGDFAST_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static Vector load(const T* x) { return *reinterpret_cast<const Unaligned*>(x); }
  static void store(T* x, Vector v) { *reinterpret_cast<Unaligned*>(x) = v; }
  static Vector all(T x) { return x - Vector{}; }   // folds to a broadcast, which Vector{} + x may not
#else
  struct Vector {
    T lane[count];
    Vector& operator+=(const Vector& v) { return *this = *this + v; }
    friend Vector operator+(Vector a, const Vector& b) {
      for (int i = 0; i < count; ++i) a.lane[i] += b.lane[i];
      return a;
    }
    friend Vector operator-(Vector a, const Vector& b) {
      for (int i = 0; i < count; ++i) a.lane[i] -= b.lane[i];
      return a;
    }
    friend Vector operator*(Vector a, const Vector& b) {
      for (int i = 0; i < count; ++i) a.lane[i] *= b.lane[i];
      return a;
    }
  };
  static Vector load(const T* x) {
    Vector v;
    for (int i = 0; i < count; ++i) v.lane[i] = x[i];
    return v;
  }
  static void store(T* x, const Vector& v) {
    for (int i = 0; i < count; ++i) x[i] = v.lane[i];
  }
  static Vector all(T x) {
    Vector v;
    for (int i = 0; i < count; ++i) v.lane[i] = x;
    return v;
  }
#endif
};

template <class T>
using Vector = typename Lanes<T>::Vector;

#if defined(__GNUC__)
#define PGDFAST_UNROLL _Pragma("GCC unroll 16")
#else
#define PGDFAST_UNROLL
#endif

// acc[i][v] += sum_{l < depth} a[l * width + i] * b_v[l * width + :]
template <class T, int panels>
inline void accumulate(index depth, const T* a, const T* const* b, Vector<T> (&acc)[Lanes<T>::rows][panels]) {
  constexpr int width = Lanes<T>::count, rows = Lanes<T>::rows;
  const T* columns[panels];
  for (int v = 0; v < panels; ++v) columns[v] = b[v];
  for (index l = 0; l < depth; ++l) {
    Vector<T> right[panels];
    PGDFAST_UNROLL
    for (int v = 0; v < panels; ++v) {
      right[v] = Lanes<T>::load(columns[v]);
      columns[v] += width;
    }
    PGDFAST_UNROLL
    for (int i = 0; i < rows; ++i) {
      const Vector<T> left = Lanes<T>::all(a[i]);
      PGDFAST_UNROLL
      for (int v = 0; v < panels; ++v) acc[i][v] += left * right[v];
    }
    a += width;
  }
}

// Hands every valid row's accumulator to write(i, v, value).
template <class T, int panels, class F>
inline void each(index valid, const Vector<T> (&acc)[Lanes<T>::rows][panels], F&& write) {
  constexpr int rows = Lanes<T>::rows;
  if (valid >= rows) {
    PGDFAST_UNROLL
    for (int i = 0; i < rows; ++i) {
      PGDFAST_UNROLL
      for (int v = 0; v < panels; ++v) write(i, v, acc[i][v]);
    }
    return;
  }
  PGDFAST_UNROLL
  for (int i = 0; i < rows; ++i) {
    if (i >= valid) break;
    PGDFAST_UNROLL
    for (int v = 0; v < panels; ++v) write(i, v, acc[i][v]);
  }
}

template <class T, int panels>
void product_of(index valid, index depth, const T* a, const T* const* b, T* out, index ld, bool add) {
  constexpr int width = Lanes<T>::count;
  Vector<T> acc[Lanes<T>::rows][panels] = {};
  accumulate<T, panels>(depth, a, b, acc);
  each<T, panels>(valid, acc, [&](int i, int v, Vector<T> sum) {
    T* at = out + i * ld + v * width;
    Lanes<T>::store(at, add ? Lanes<T>::load(at) + sum : sum);
  });
}

template <class T, int panels>
void scaled_product_of(index valid, index depth, const T* a, const T* const* b, const T* s, index lds, T weight, T shift,
                       T* out, index ld, bool add) {
  constexpr int width = Lanes<T>::count;
  Vector<T> acc[Lanes<T>::rows][panels] = {};
  accumulate<T, panels>(depth, a, b, acc);
  const Vector<T> w = Lanes<T>::all(weight), c = Lanes<T>::all(shift);
  each<T, panels>(valid, acc, [&](int i, int v, Vector<T> sum) {
    T* at = out + i * ld + v * width;
    const Vector<T> value = (w * Lanes<T>::load(s + i * lds + v * width) + c) * sum;
    Lanes<T>::store(at, add ? Lanes<T>::load(at) + value : value);
  });
}

template <class T>
void product(int panels, index valid, index depth, const T* a, const T* const* b, T* out, index ld, bool add) {
  if (panels == 1) product_of<T, 1>(valid, depth, a, b, out, ld, add);
  else if (panels == 2) product_of<T, 2>(valid, depth, a, b, out, ld, add);
  else product_of<T, 3>(valid, depth, a, b, out, ld, add);
}

template <class T>
void scaled_product(int panels, index valid, index depth, const T* a, const T* const* b, const T* s, index lds, T weight,
                    T shift, T* out, index ld, bool add) {
  if (panels == 1) scaled_product_of<T, 1>(valid, depth, a, b, s, lds, weight, shift, out, ld, add);
  else if (panels == 2) scaled_product_of<T, 2>(valid, depth, a, b, s, lds, weight, shift, out, ld, add);
  else scaled_product_of<T, 3>(valid, depth, a, b, s, lds, weight, shift, out, ld, add);
}

// Exchanges the off-diagonal blocks of size s of a square of `width` vectors.
#if defined(__GNUC__) && !defined(__clang__)
template <class T, int s, std::size_t... lane>
inline void exchange(Vector<T>* v, std::index_sequence<lane...>) {
  constexpr int width = Lanes<T>::count;
  using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Integer Mask __attribute__((vector_size(PGDFAST_VECTOR_BYTES)));
  const Mask low = {Integer(int(lane) & s ? width + int(lane) - s : int(lane))...};
  const Mask high = {Integer(int(lane) & s ? width + int(lane) : int(lane) + s)...};
  PGDFAST_UNROLL
  for (int i = 0; i < width; ++i) {
    if (i & s) continue;
    const Vector<T> a = v[i], b = v[i + s];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + s] = __builtin_shuffle(a, b, high);
  }
}
#endif

// Transposes `width` vectors in place.
template <class T>
inline void transpose(Vector<T>* v) {
  constexpr int width = Lanes<T>::count;
#if defined(__GNUC__) && !defined(__clang__)
  constexpr auto lanes = std::make_index_sequence<std::size_t(width)>();
  if constexpr (width > 1) exchange<T, 1>(v, lanes);
  if constexpr (width > 2) exchange<T, 2>(v, lanes);
  if constexpr (width > 4) exchange<T, 4>(v, lanes);
  if constexpr (width > 8) exchange<T, 8>(v, lanes);
#else
  T plain[width][width];
  for (int i = 0; i < width; ++i) Lanes<T>::store(plain[i], v[i]);
  for (int i = 0; i < width; ++i) {
    T column[width];
    for (int j = 0; j < width; ++j) column[j] = plain[j][i];
    v[i] = Lanes<T>::load(column);
  }
#endif
}

template <class T>
void pack(index count, index depth, const T* x, index row, index column, T* out, index panel) {
  constexpr int width = Lanes<T>::count;
  for (index i = 0; i < count; i += width, out += panel) {
    const T* from = x + i * row;
    const index valid = count - i < width ? count - i : width;
    if (valid == width && row == 1) {
      for (index l = 0; l < depth; ++l) Lanes<T>::store(out + l * width, Lanes<T>::load(from + l * column));
      continue;
    }
    index l = 0;
    if (valid == width && column == 1) {
      for (; l + width <= depth; l += width) {
        Vector<T> block[width];
        PGDFAST_UNROLL
        for (int j = 0; j < width; ++j) block[j] = Lanes<T>::load(from + j * row + l);
        transpose<T>(block);
        PGDFAST_UNROLL
        for (int j = 0; j < width; ++j) Lanes<T>::store(out + (l + j) * width, block[j]);
      }
    }
    for (; l < depth; ++l) {
      for (index j = 0; j < valid; ++j) out[l * width + j] = from[j * row + l * column];
      for (index j = valid; j < width; ++j) out[l * width + j] = T(0);
    }
  }
}

template <class T>
inline T square_root(T x) {
  return sizeof(T) == 4 ? T(__builtin_sqrtf(float(x))) : T(__builtin_sqrt(double(x)));
}

template <class T, int panels>
bool eliminate_of(index k0, index r, const T* a, T* const* b, const T* c, index ldc, const T* added, T* inverse) {
  constexpr int width = Lanes<T>::count, rows = Lanes<T>::rows;
  const index lane = r % width;
  Vector<T> acc[rows][panels] = {};
  const T* before[panels];
  for (int v = 0; v < panels; ++v) before[v] = b[v] + k0 * width;
  accumulate<T, panels>(r - k0, a + k0 * width + lane, before, acc);
  PGDFAST_UNROLL
  for (int i = 0; i < rows; ++i) {
    PGDFAST_UNROLL
    for (int v = 0; v < panels; ++v) acc[i][v] = Lanes<T>::load(c + i * ldc + v * width) - acc[i][v];
  }
  T u[rows][rows];   // the factor of the diagonal block, upper triangle
  const bool diagonal = a == b[0];
  if (diagonal) {
    T block[rows][width];
    for (int i = 0; i < rows; ++i) {
      Lanes<T>::store(block[i], acc[i][0]);
      block[i][lane + i] += added[r + i];
      acc[i][0] = Lanes<T>::load(block[i]);
    }
    for (int i = 0; i < rows; ++i) {
      const T pivot = block[i][lane + i];
      if (!(pivot > T(0))) return false;
      inverse[r + i] = T(1) / square_root(pivot);
      for (int j = i; j < rows; ++j) u[i][j] = block[i][lane + j] * inverse[r + i];
      for (int k = i + 1; k < rows; ++k)
        for (int j = k; j < rows; ++j) block[k][lane + j] -= u[i][k] * u[i][j];
    }
  } else {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < rows; ++j) u[i][j] = a[(r + i) * width + lane + j];
  }
  PGDFAST_UNROLL
  for (int i = 0; i < rows; ++i) {
    PGDFAST_UNROLL
    for (int s = 0; s < i; ++s) {
      const Vector<T> factor = Lanes<T>::all(u[s][i]);
      PGDFAST_UNROLL
      for (int v = 0; v < panels; ++v) acc[i][v] = acc[i][v] - factor * acc[s][v];
    }
    const Vector<T> scale = Lanes<T>::all(inverse[r + i]);
    PGDFAST_UNROLL
    for (int v = 0; v < panels; ++v) {
      acc[i][v] = acc[i][v] * scale;
      Lanes<T>::store(b[v] + (r + i) * width, acc[i][v]);
    }
  }
  if (diagonal)
    for (int i = 0; i < rows; ++i)
      for (index j = 0; j < lane + i; ++j) b[0][(r + i) * width + j] = T(0);
  return true;
}

template <class T>
bool eliminate(int panels, index k0, index r, const T* a, T* const* b, const T* c, index ldc, const T* added, T* inverse) {
  if (panels == 1) return eliminate_of<T, 1>(k0, r, a, b, c, ldc, added, inverse);
  if (panels == 2) return eliminate_of<T, 2>(k0, r, a, b, c, ldc, added, inverse);
  return eliminate_of<T, 3>(k0, r, a, b, c, ldc, added, inverse);
}

template <class T>
void scale_panel(index depth, const T* s, const T* x, T* out, bool add) {
  constexpr int width = Lanes<T>::count;
  for (index l = 0; l < depth * width; l += width) {
    const Vector<T> value = Lanes<T>::all(s[l]) * Lanes<T>::load(x + l);
    Lanes<T>::store(out + l, add ? Lanes<T>::load(out + l) + value : value);
  }
}

template <class T>
void subtract_rows(index depth, const T* panel, const T* y, T* x) {
  constexpr int width = Lanes<T>::count;
  Vector<T> acc[4] = {};
  index l = 0;
  for (; l + 4 <= depth; l += 4) {
    PGDFAST_UNROLL
    for (int j = 0; j < 4; ++j) acc[j] += Lanes<T>::load(panel + (l + j) * width) * Lanes<T>::all(y[l + j]);
  }
  for (; l < depth; ++l) acc[0] += Lanes<T>::load(panel + l * width) * Lanes<T>::all(y[l]);
  Lanes<T>::store(x, Lanes<T>::load(x) - (acc[0] + acc[1] + (acc[2] + acc[3])));
}

template <class T>
void subtract_columns(index depth, const T* panel, const T* y, T* x) {
  constexpr int width = Lanes<T>::count;
  for (index l = 0; l < depth; ++l) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < width; ++j) sum += panel[l * width + j] * y[j];
    x[l] -= sum;
  }
}

template <class T>
const Tiles<T>* make_tiles() {
  static const Tiles<T> table = {Lanes<T>::count, Lanes<T>::rows, pack<T>,          product<T>,         scaled_product<T>,
                                 eliminate<T>,    scale_panel<T>, subtract_rows<T>, subtract_columns<T>};
  return &table;
}

}  // namespace

const Tiles<float>* PGDFAST_PASTE(tiles_float_, PGDFAST_ISA)() { return make_tiles<float>(); }
const Tiles<double>* PGDFAST_PASTE(tiles_double_, PGDFAST_ISA)() { return make_tiles<double>(); }

}  // namespace pgdfast
