// Many members in one launch: each block owns one, from its constants to its updated parameters, and takes the next when done.
#pragma once

#include "../plan/limits.h"
#include "ensemble_plan.h"
#include "platform.h"

namespace pgdfast::cuda {

// A constant of all members: member b's begins `shift` elements of its type behind member b - 1's.
struct EnsembleConstant {
  const void* data;   // null: the value
  double value;
  index shift;
};

constexpr int kReport = limits::kOutcomeNumbers;

enum class Method : int { dual = 0, cg = 1 };

struct EnsembleProblem {
  index members;
  Method method;
  const index* table;                  // the plan's, on the device, as all that follows
  const EnsembleConstant* constants;
  const void* r;                       // (B, M)
  const double* mu;                    // (B,), positive
  const unsigned char* active;         // (B,); members that are not keep what they have
  void* step;                          // (B, P): zero where a solve failed or the member is not active
  double* report;                      // (B, kReport): status (-1: not active), iterations, residual norm, gain, square, trace,
                                       // slack (../plan/status.h)
  int max_iterations;
  double tolerance, absolute;
  void* const* parameters;             // null, or one pointer per parameter buffer to (B, size) numbers ...
  const double* rates;                 // ... which lr delta is subtracted from where the step is usable, by member
  void* workspace;                     // ensemble_workspace(...) bytes
};

// Blocks that run at once, the bytes of workspace they need together.
struct EnsembleLayout {
  index blocks, bytes;
};
EnsembleLayout ensemble_layout(const Structure& s, const EnsemblePlan& plan, Method method, index members, bool wide);

template <class T>
void ensemble(const Structure& s, const EnsemblePlan& plan, const EnsembleProblem& problem, Stream stream);

}  // namespace pgdfast::cuda
