#pragma once

namespace pgdfast {

// Fills blas<float>() and blas<double>(); `wanted` is "mkl", "aten" or null for the best. Returns what was taken.
const char* fill_blas(const char* wanted);

// Fills maths<float>() and maths<double>().
void fill_maths();

}  // namespace pgdfast
