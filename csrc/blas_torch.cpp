// Fills the BLAS table from the PyTorch that is loaded: its MKL where libtorch_cpu exports one (x86 Linux wheels),
// else ATen's own operators, about a microsecond dearer per call.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <c10/core/InferenceMode.h>

#ifndef _WIN32
#include <dlfcn.h>
#endif

#include <cstring>

#include "blas_torch.h"
#include "plan/blas.h"

namespace pgdfast {
namespace {

template <class T>
constexpr at::ScalarType scalar_type = std::is_same_v<T, float> ? at::kFloat : at::kDouble;

// A column-major operand, transposed if asked, as a tensor that owns nothing.
template <class T>
at::Tensor view(const T* data, char trans, int rows, int cols, int ld) {
  const auto options = at::TensorOptions().dtype(scalar_type<T>);
  T* p = const_cast<T*>(data);
  if (trans == 'N') return at::from_blob(p, {rows, cols}, {1, ld}, options);
  return at::from_blob(p, {rows, cols}, {ld, 1}, options);
}

template <class T>
void aten_gemm(char ta, char tb, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb, T beta, T* c,
               int ldc) {
  c10::InferenceMode guard;
  at::Tensor out = view(c, 'N', m, n, ldc);
  at::addmm_out(out, out, view(a, ta, m, k, lda), view(b, tb, k, n, ldb), beta, alpha);
}

template <class T>
int aten_potrf(char uplo, int n, T* a, int lda) {
  c10::InferenceMode guard;
  at::Tensor matrix = view(a, 'N', n, n, lda);
  auto [factor, info] = at::linalg_cholesky_ex(matrix, uplo == 'U', false);
  matrix.copy_(factor);
  return info.template item<int>();
}

template <class T>
void aten_potrs(char uplo, int n, int columns, const T* a, int lda, T* b, int ldb) {
  c10::InferenceMode guard;
  at::Tensor x = view(b, 'N', n, columns, ldb);
  x.copy_(at::cholesky_solve(x, view(a, 'N', n, n, lda), uplo == 'U'));
}

// Fortran symbols of the BLAS inside libtorch_cpu.
template <class T>
struct Fortran {
  using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*,
                        const T*, const int*, const T*, T*, const int*);
  using Potrf = void (*)(const char*, const int*, T*, const int*, int*);
  using Potrs = void (*)(const char*, const int*, const int*, const T*, const int*, T*, const int*, int*);
  static Gemm gemm;
  static Potrf potrf;
  static Potrs potrs;
};
template <class T>
typename Fortran<T>::Gemm Fortran<T>::gemm = nullptr;
template <class T>
typename Fortran<T>::Potrf Fortran<T>::potrf = nullptr;
template <class T>
typename Fortran<T>::Potrs Fortran<T>::potrs = nullptr;

template <class T>
void mkl_gemm(char ta, char tb, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb, T beta, T* c,
              int ldc) {
  Fortran<T>::gemm(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

template <class T>
int mkl_potrf(char uplo, int n, T* a, int lda) {
  int info = 0;
  Fortran<T>::potrf(&uplo, &n, a, &lda, &info);
  return info;
}

template <class T>
void mkl_potrs(char uplo, int n, int columns, const T* a, int lda, T* b, int ldb) {
  int info = 0;
  Fortran<T>::potrs(&uplo, &n, &columns, a, &lda, b, &ldb, &info);
}

template <class T>
bool load(void* library, const char* gemm, const char* potrf, const char* potrs) {
#ifdef _WIN32
  return false;
#else
  Fortran<T>::gemm = reinterpret_cast<typename Fortran<T>::Gemm>(dlsym(library, gemm));
  Fortran<T>::potrf = reinterpret_cast<typename Fortran<T>::Potrf>(dlsym(library, potrf));
  Fortran<T>::potrs = reinterpret_cast<typename Fortran<T>::Potrs>(dlsym(library, potrs));
  return Fortran<T>::gemm && Fortran<T>::potrf && Fortran<T>::potrs;
#endif
}

template <class T>
void use_aten() {
  blas<T>() = {aten_gemm<T>, aten_potrf<T>, aten_potrs<T>};
}

template <class T>
void use_mkl() {
  blas<T>() = {mkl_gemm<T>, mkl_potrf<T>, mkl_potrs<T>};
}

}  // namespace

const char* fill_blas(const char* wanted) {
  use_aten<float>();
  use_aten<double>();
  set_blas_threads = nullptr;
#ifndef _WIN32
  if (wanted == nullptr || std::strcmp(wanted, "mkl") == 0) {
    void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (library) {
      auto threads = reinterpret_cast<int (*)(int)>(dlsym(library, "MKL_Set_Num_Threads_Local"));
      if (threads && load<float>(library, "sgemm_", "spotrf_", "spotrs_") &&
          load<double>(library, "dgemm_", "dpotrf_", "dpotrs_")) {
        use_mkl<float>();
        use_mkl<double>();
        set_blas_threads = threads;
        return "mkl";
      }
    }
  }
#endif
  return "aten";
}

}  // namespace pgdfast
