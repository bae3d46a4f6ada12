#pragma once

namespace pgdfast {

// Fills blas<float>() and blas<double>(); `wanted` is "mkl", "aten" or null for the best. Returns what was
// taken. Raises std::invalid_argument for anything else, and for "mkl" where this PyTorch exports none.
const char* fill_blas(const char* wanted);

// Fills maths<float>() and maths<double>().
void fill_maths();

}  // namespace pgdfast
