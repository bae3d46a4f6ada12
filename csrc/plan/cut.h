// Cutting a program by rows: parts of it that no buffer joins, each over rows that do not meet, so that a sweep can take a
// few rows through all instructions while they are in the cache, and threads can take rows of their own.
#pragma once

#include "plan.h"

namespace pgdfast {

// The components of a program, each cut as finely as it can be.
std::vector<Component> components(const Structure& s);

// The instruction for rows begin .. end - 1.
Instruction restricted(const Instruction& op, const RowCut& cut, index begin, index end);

}  // namespace pgdfast
