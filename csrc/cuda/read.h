// Programs and row layouts from lists of numbers, as Python hands them over (pgdfast/kernels/cuda_plan.py writes them).
#pragma once

#include "../plan/plan.h"

namespace pgdfast::cuda {

// words: buffers (count; role, size, live), instructions (count; kind, y, its offset, x, its offset, constant, its offset, lists:
// count; each its length and numbers). alphas: one per instruction. Raises std::runtime_error where it does not end well.
Structure read_program(const index* words, index count, const double* alphas);

// words: rows, sections; section_of (count; numbers); k_of; blocks (count; four numbers); uses (count; seven); labels (count;
// buffer, length; numbers).
RowLayout read_rows(const index* words, index count, const Structure& s);

}  // namespace pgdfast::cuda
