// Programs and row layouts from lists of numbers, as Python hands them over (pgdfast/kernels/encoding.py writes them).
#pragma once

#include "plan.h"

namespace pgdfast {

// words: buffers (count; role, size, live), instructions (count; kind, y, its offset, x, its offset, constant, its offset, lists:
// count; each its length and numbers). alphas: one per instruction. Raises std::runtime_error where
// they end too early or too late, or name a buffer that there is not.
Structure read_program(const index* words, index count, const double* alphas, index num_alphas);

// words: rows, outputs; output_of (count; numbers); k_of; blocks (count; five numbers, and a list of rows); uses (count; seven); labels (count;
// buffer, length; numbers). Raises as above.
RowLayout read_rows(const index* words, index count, const Structure& s);

}  // namespace pgdfast
