// What the iterative solvers take and keep besides the system itself.
#pragma once

#include <vector>

#include "../plan/plan.h"

namespace pgdfast {

// z = inverse * x + V^T (c * (V x)), V of `rank` rows of P: a diagonal (null: ones) and what a sketch adds to it.
template <class T>
struct Preconditioner {
  const T* inverse = nullptr;
  const T* V = nullptr;
  const T* c = nullptr;
  index rank = 0;
};

template <class T>
struct CGOptions {
  int max_iterations = 150;
  double tolerance = 1e-6;   // stop at ||b - A x|| <= max(tolerance ||b||, absolute)
  double absolute = 0;
  double progress = 0;       // stop where k iterations won less than k * progress of the model's reduction; 0: never
  Preconditioner<T> preconditioner;
  const T* start = nullptr;  // P: begin at its best multiple, or at zero where none is better
  T* path = nullptr;         // path_slots x P: iterates 1, 2, 4, ..., the last ones
  index path_slots = 0;
};

// An iterate in a slot of the path.
struct Kept {
  int iteration = 0;
  double gain = 0, square = 0, slack = 0;   // as in Outcome
};

}  // namespace pgdfast
