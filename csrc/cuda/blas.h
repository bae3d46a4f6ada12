// cuBLAS as a table of function pointers, taken from the library that PyTorch has loaded; the emulation has a plain loop.
#pragma once

#include "platform.h"
#include "schedule.h"

namespace pgdfast::cuda {

// Finds the library by name among those that are loaded; null, or why it cannot be used.
const char* load_blas(const char* library);

// out[b] = alpha left[b] right[b] + (overwrite ? 0 : out[b]) for operands that a BLAS takes in place (schedule.h).
template <class T>
void blas_product(const Product& p, T alpha, const T* left, const T* right, T* out, bool overwrite, Stream stream);

}  // namespace pgdfast::cuda
