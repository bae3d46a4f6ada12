// Conjugate gradients on (diag(d) + J^T J) delta = J^T r + q with all scalars on the GPU: the host enqueues iterations and never
// waits for one. The same algorithm as ../cpu/cg.cpp.
#pragma once

#include "sweep.h"

namespace pgdfast::cuda {

template <class T>
struct CGProblem {
  const T *r, *d, *q;           // M, P, P or null
  const T *inverse, *V, *c;     // the preconditioner (../cpu/krylov.h), each null or on the device; V: rank x P
  index rank;
  const T* start;               // P or null
  T* path;                      // slots x P or null
  index slots;
  int max_iterations;
  double tolerance, absolute, progress;
  T* delta;                     // P: the step
  T* work;                      // cg_vectors(...) elements
  double* scalars;              // cg_scalars(...) numbers
  double* report;               // 6 + 5 * slots numbers: status, iterations, residual norm, gain, square, slack; each slot's
                                // iteration, gain, square, slack, 0
  volatile int* ended;          // memory that the host can read, or null: nonzero once further iterations would do nothing
};

index cg_vectors(index parameters, index residuals, index rank);
index cg_scalars(int max_iterations);

template <class T>
void cg(const Bound<T>& program, const Schedule& forward, const Schedule& adjoint, T* arena, T* scratch,
        const CGProblem<T>& problem, Stream stream);

}  // namespace pgdfast::cuda
