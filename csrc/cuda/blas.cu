#include "blas.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#ifndef PGDFAST_EMULATE
#include <dlfcn.h>
#endif

namespace pgdfast::cuda {
namespace {

// A column-major reading of a matrix, as BLAS has it.
struct Reading {
  bool transposed;
  index ld;
};
Reading read(index rows, index columns, index row, index column) {
  if ((row == 1 || rows == 1) && (columns == 1 || column >= rows))
    return {false, columns == 1 ? std::max<index>(rows, 1) : column};
  return {true, rows == 1 ? std::max<index>(columns, 1) : row};
}

struct Call {
  bool ta, tb;
  int m, n, k;
  index lda, sa, ldb, sb, ldc, sc;
  int count;
};

#ifdef PGDFAST_EMULATE

template <class T>
void call(const Call& c, T alpha, const T* a, const T* b, T beta, T* out, Stream) {
  for (index i = 0; i < c.count; ++i)
    for (index n = 0; n < c.n; ++n)
      for (index m = 0; m < c.m; ++m) {
        T sum = 0;
        for (index k = 0; k < c.k; ++k)
          sum += a[i * c.sa + (c.ta ? m * c.lda + k : k * c.lda + m)] * b[i * c.sb + (c.tb ? k * c.ldb + n : n * c.ldb + k)];
        T& to = out[i * c.sc + n * c.ldc + m];
        to = alpha * sum + (beta == T(0) ? T(0) : beta * to);
      }
}

#else

using Handle = void*;
template <class T>
using Batched = int (*)(Handle, int, int, int, int, int, const T*, const T*, int, long long, const T*, int, long long,
                        const T*, T*, int, long long, int);
struct Table {
  int (*create)(Handle*) = nullptr;
  int (*set_stream)(Handle, void*) = nullptr;
  Batched<float> single = nullptr;
  Batched<double> wide = nullptr;
};
Table table;
std::mutex guard;
std::map<int, Handle> handles;   // one per device, for the life of the process

Handle handle(Stream stream) {
  if (table.create == nullptr) throw std::runtime_error("no cuBLAS is loaded");
  int device = 0;
  check(cudaGetDevice(&device), "asking for the device");
  const std::lock_guard<std::mutex> lock(guard);
  Handle& found = handles[device];
  if (found == nullptr && table.create(&found) != 0) throw std::runtime_error("cuBLAS cannot be initialized");
  if (table.set_stream(found, stream) != 0) throw std::runtime_error("cuBLAS does not take the stream");
  return found;
}

int run(Handle h, const Call& c, const float* alpha, const float* a, const float* b, const float* beta, float* out) {
  return table.single(h, c.ta, c.tb, c.m, c.n, c.k, alpha, a, int(c.lda), c.sa, b, int(c.ldb), c.sb, beta, out, int(c.ldc),
                      c.sc, c.count);
}
int run(Handle h, const Call& c, const double* alpha, const double* a, const double* b, const double* beta, double* out) {
  return table.wide(h, c.ta, c.tb, c.m, c.n, c.k, alpha, a, int(c.lda), c.sa, b, int(c.ldb), c.sb, beta, out, int(c.ldc),
                    c.sc, c.count);
}

template <class T>
void call(const Call& c, T alpha, const T* a, const T* b, T beta, T* out, Stream stream) {
  const int status = run(handle(stream), c, &alpha, a, b, &beta, out);
  if (status != 0) throw std::runtime_error("a product by cuBLAS failed with status " + std::to_string(status));
}

#endif

}  // namespace

const char* load_blas([[maybe_unused]] const char* library) {
#ifdef PGDFAST_EMULATE
  return nullptr;
#else
  void* found = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
  if (found == nullptr) return "PyTorch has loaded no library of this name";
  Table t;
  t.create = reinterpret_cast<int (*)(Handle*)>(dlsym(found, "cublasCreate_v2"));
  t.set_stream = reinterpret_cast<int (*)(Handle, void*)>(dlsym(found, "cublasSetStream_v2"));
  t.single = reinterpret_cast<Batched<float>>(dlsym(found, "cublasSgemmStridedBatched"));
  t.wide = reinterpret_cast<Batched<double>>(dlsym(found, "cublasDgemmStridedBatched"));
  if (!t.create || !t.set_stream || !t.single || !t.wide) return "it lacks a function that is needed";
  table = t;
  return nullptr;
#endif
}

template <class T>
void blas_product(const Product& p, T alpha, const T* left, const T* right, T* out, bool overwrite, Stream stream) {
  if (p.m == 0 || p.n == 0 || p.outer == 0 || p.batch == 0) return;
  Call c{};
  Product::Operand a = p.left, b = p.right, o = p.out;
  index m = p.m, n = p.n;
  if (!((o.row == 1 || m == 1) && (n == 1 || o.column >= m))) {   // row-major: its transpose is column-major
    std::swap(m, n);
    std::swap(a, b);
    std::swap(left, right);
    for (Product::Operand* operand : {&a, &b, &o}) std::swap(operand->row, operand->column);
  }
  const Reading ra = read(m, p.k, a.row, a.column), rb = read(p.k, n, b.row, b.column);
  c.ta = ra.transposed, c.tb = rb.transposed;
  c.m = int(m), c.n = int(n), c.k = int(p.k);
  c.lda = std::max<index>(ra.ld, 1), c.ldb = std::max<index>(rb.ld, 1);
  c.ldc = n == 1 ? std::max<index>(m, 1) : o.column;
  // One call per outer index, unless one stride leads through both dimensions; sums over a batch are made one by one.
  index outer = p.outer, batch = p.batch;
  const auto joins = [&](const Product::Operand& x) { return x.outer == batch * x.batch; };
  if (outer > 1 && (batch == 1 || (joins(a) && joins(b) && joins(o)))) {
    if (batch == 1) a.batch = a.outer, b.batch = b.outer, o.batch = o.outer;
    batch *= outer;
    outer = 1;
  }
  const bool apart = batch == 1 || o.batch != 0;
  c.count = apart ? int(batch) : 1;
  c.sa = a.batch, c.sb = b.batch, c.sc = o.batch;
  for (index i = 0; i < outer; ++i)
    for (index j = 0; j < (apart ? 1 : batch); ++j) {
      const bool first = overwrite && (j == 0) && (i == 0 || o.outer != 0);
      call(c, alpha, left + i * a.outer + j * a.batch, right + i * b.outer + j * b.batch, T(first ? 0 : 1), out + i * o.outer,
           stream);
    }
}

template void blas_product<float>(const Product&, float, const float*, const float*, float*, bool, Stream);
template void blas_product<double>(const Product&, double, const double*, const double*, double*, bool, Stream);

}  // namespace pgdfast::cuda
