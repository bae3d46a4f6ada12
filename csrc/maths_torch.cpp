// Elementwise functions for the kernels: ATen's, vectorized and accurate to the last bits.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh.h>
#include <c10/core/InferenceMode.h>

#include "blas_torch.h"
#include "cpu/jet.h"

namespace pgdfast {
namespace {

template <class T, class F>
void apply(index n, const T* x, T* y, F&& function) {
  c10::InferenceMode guard;
  const auto options = at::TensorOptions().dtype(std::is_same_v<T, float> ? at::kFloat : at::kDouble);
  at::Tensor out = at::from_blob(y, {n}, options);
  function(out, at::from_blob(const_cast<T*>(x), {n}, options));
}

template <class T>
void fill() {
#define PGDFAST_FUNCTION(name)                                                              \
  maths<T>().name = [](index n, const T* x, T* y) {                                         \
    apply(n, x, y, [](at::Tensor& out, const at::Tensor& in) { at::name##_out(out, in); }); \
  };
  PGDFAST_FUNCTION(tanh)
  PGDFAST_FUNCTION(sigmoid)
  PGDFAST_FUNCTION(sin)
  PGDFAST_FUNCTION(cos)
  PGDFAST_FUNCTION(exp)
  PGDFAST_FUNCTION(erf)
  PGDFAST_FUNCTION(softplus)
#undef PGDFAST_FUNCTION
}

}  // namespace

void fill_maths() {
  fill<float>();
  fill<double>();
}

}  // namespace pgdfast
