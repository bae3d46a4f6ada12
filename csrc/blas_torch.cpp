// Fills the BLAS table from the PyTorch that is loaded: its MKL where libtorch_cpu exports one (x86 Linux wheels),
// else ATen's own operators, about a microsecond dearer per call.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>

#ifndef _WIN32
#include <dlfcn.h>
#endif

#include <cstring>

#include "blas_torch.h"
#include "plan/blas.h"
#include "plan/environment.h"

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

// Fortran symbols of the BLAS inside libtorch_cpu.
template <class T>
struct Fortran {
  using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*,
                        const T*, const int*, const T*, T*, const int*);
  static Gemm gemm;
};
template <class T>
typename Fortran<T>::Gemm Fortran<T>::gemm = nullptr;

template <class T>
void mkl_gemm(char ta, char tb, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb, T beta, T* c,
              int ldc) {
  Fortran<T>::gemm(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

template <class T>
bool load(void* library, const char* gemm) {
#ifdef _WIN32
  return false;
#else
  Fortran<T>::gemm = reinterpret_cast<typename Fortran<T>::Gemm>(dlsym(library, gemm));
  return Fortran<T>::gemm != nullptr;
#endif
}

template <class T>
void use_aten() {
  blas<T>() = {aten_gemm<T>};
}

template <class T>
void use_mkl() {
  blas<T>() = {mkl_gemm<T>};
}

}  // namespace

const char* fill_blas(const char* wanted) {
  const bool best = wanted == nullptr;
  if (!best && std::strcmp(wanted, "mkl") != 0 && std::strcmp(wanted, "aten") != 0)
    throw unknown_switch("PGDFAST_BLAS", wanted, "mkl, aten");
  use_aten<float>();
  use_aten<double>();
  set_blas_threads = nullptr;
#ifndef _WIN32
  if (best || std::strcmp(wanted, "mkl") == 0) {
    void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (library) {
      auto threads = reinterpret_cast<int (*)(int)>(dlsym(library, "MKL_Set_Num_Threads_Local"));
      if (threads && load<float>(library, "sgemm_") && load<double>(library, "dgemm_")) {
        use_mkl<float>();
        use_mkl<double>();
        set_blas_threads = threads;
        return "mkl";
      }
    }
  }
#endif
  if (!best && std::strcmp(wanted, "mkl") == 0)
    throw std::invalid_argument("pgdfast: PGDFAST_BLAS is 'mkl', and this PyTorch exports no MKL; use aten.");
  return "aten";
}

}  // namespace pgdfast
