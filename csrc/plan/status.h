// How a solve ended; numbered as STATUS in pgdfast/kernels/protocol.py.
#pragma once

namespace pgdfast {

enum class Status : int {
  solved = 0, not_positive_definite = 1, max_iterations = 2, breakdown = 3, stagnated = 4, progress = 5
};

}  // namespace pgdfast
