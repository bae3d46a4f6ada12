// The control of conjugate gradients, once for the C++ loop, the CUDA loop and the ensemble kernel: what follows from the numbers
// that an iteration's vectors have left. Arrival is judged by the true residual, which is computed every kCheckEvery iterations
// and whenever the recurrence claims to have arrived; CG restarts from it where the two differ, until that no longer helps, and
// goes back to the last check where the model's value has fallen since.
//
// One turn of the loop is one product with A = diag(d) + J^T J and the update of the vectors that `phase` asks for:
//
//   iterate   A p: x += step p, res -= step A p, with `step` from cg_step
//   start     A s, s the given start: x = step s, res = b - step A s, with `step` from cg_start
//   check     A x: res = b - A x. The check of iteration 0 needs no product: x is zero and res is b
//   restore   the same, at the iterate that CG went back to
//
// then `norm` = ||res||, `rz` = <res, z> with z the preconditioned residual and, in a check, `gain` = <b, x> and `slack` = <res, x>
// are filled in, and cg_judge says what follows: `restore_safe`, `keep_safe` and `slot` ask for copies of x, and `phase` is that
// of the next turn. Before an iteration p = z + beta p.
#pragma once

#include <cstdint>

#include "limits.h"
#include "status.h"

#ifdef __CUDACC__
#define PGDFAST_HOST_DEVICE __host__ __device__
#else
#define PGDFAST_HOST_DEVICE
#endif

namespace pgdfast {

enum class CGPhase : int { iterate = 0, start = 1, check = 2, restore = 3, ended = 4 };

struct CGLimits {
  int max_iterations;
  double tolerance, absolute;   // arrived at ||res|| <= max(tolerance ||b||, absolute)
  double progress;              // stop where k iterations won less than k * progress of the model's reduction; 0: never
  int slots;                    // iterates 1, 2, 4, ... are kept in so many places; 0: none
};

struct CGState {
  CGPhase phase;
  Status status;
  int iteration;
  int claimed;        // the recurrence said that it has arrived
  int broken;         // no curvature along p, or not finite
  int slot;           // x is to be copied to this place of the path; negative: to none
  int keep_safe;      // x is to be copied as the iterate to go back to
  int restore_safe;   // and here x is to be set back to it
  double b_norm, target, norm, rz;
  double before;      // rz of the iteration before
  double beta, step;
  double value;       // the model's reduction, by the recurrence
  double recurrence;  // the norm that the recurrence had when a check was called for
  double last_claim;  // the true norm at the last restart
  double safe;        // the model's reduction at the last check
  double gain, square, slack;
};

PGDFAST_HOST_DEVICE inline bool cg_finite(double x) { return x - x == 0; }

// The state of a solve for a right-hand side of this norm.
PGDFAST_HOST_DEVICE inline CGState cg_begin(double b_norm, const CGLimits& options, bool has_start) {
  CGState s{};
  s.phase = b_norm == 0 ? CGPhase::ended : has_start ? CGPhase::start : CGPhase::check;
  s.status = b_norm == 0 ? Status::solved : Status::max_iterations;
  s.b_norm = s.last_claim = b_norm;
  s.target = options.tolerance * b_norm > options.absolute ? options.tolerance * b_norm : options.absolute;
  s.slot = -1;
  return s;
}

// The multiple of a start s to begin at, with along = <b, s> and curvature = <s, A s>; false, and zero, where none is better.
PGDFAST_HOST_DEVICE inline bool cg_start(CGState& s, double along, double curvature) {
  s.step = 0;
  if (!(cg_finite(along) && curvature > 0 && cg_finite(curvature))) return false;
  s.step = along / curvature;
  s.value = 0.5 * s.step * along;
  return true;
}

// The length of the step along p, with curvature = <p, A p>; false where there is none.
PGDFAST_HOST_DEVICE inline bool cg_step(CGState& s, double curvature) {
  s.broken = !(curvature > 0 && s.rz > 0);   // the exact solution in a singular direction, or lost to rounding
  s.step = s.broken ? 0 : s.rz / curvature;
  s.before = s.rz;
  return !s.broken;
}

// What follows from a turn. values: the model's reduction at every iterate before this one; null where progress is not judged.
PGDFAST_HOST_DEVICE inline void cg_judge(CGState& s, const CGLimits& options, const double* values) {
  const auto end = [&](Status status) {
    s.phase = CGPhase::ended;
    s.status = status;
  };
  const auto go_on = [&](bool restart) {
    const int i = s.iteration, part = i / limits::kProgressPart;
    const int k = part > limits::kProgressLeast ? part : limits::kProgressLeast;
    if (options.progress > 0 && i > k && s.value - values[i - k] < k * options.progress * s.value) return end(Status::progress);
    if (i >= options.max_iterations) return end(Status::max_iterations);
    s.beta = restart || s.before == 0 ? 0.0 : s.rz / s.before;
    s.phase = CGPhase::iterate;
  };
  const bool claim = s.norm <= s.target;
  s.slot = -1;
  s.keep_safe = s.restore_safe = 0;
  switch (s.phase) {
    case CGPhase::start:
      s.safe = s.value;
      s.keep_safe = 1;
      if (claim) return end(Status::solved);
      return go_on(true);
    case CGPhase::iterate: {
      if (s.broken) return end(Status::breakdown);
      const int i = ++s.iteration;
      s.value += 0.5 * s.step * s.before;
      if (options.slots > 0 && (i & (i - 1)) == 0) {
        int power = 0;
        while (i >> (power + 1)) ++power;
        s.slot = power % options.slots;
      }
      s.claimed = claim;
      if (claim || i % limits::kCheckEvery == 0) {
        s.recurrence = s.norm;
        s.phase = CGPhase::check;
        return;
      }
      return go_on(false);
    }
    case CGPhase::check: {
      if (claim) return end(Status::solved);
      if (s.iteration == 0) {   // begun at zero
        s.keep_safe = 1;
        return go_on(true);
      }
      const double reached = 0.5 * (s.gain + s.slack);
      if (!(reached >= (1 - limits::kFall) * s.safe)) {
        s.restore_safe = 1;
        s.phase = CGPhase::restore;
        return;
      }
      if (s.iteration % limits::kCheckEvery == 0) {
        s.safe = reached;
        s.keep_safe = 1;
      }
      const bool restart = s.claimed || s.norm > limits::kRestartRatio * s.recurrence;
      if (restart && s.norm > limits::kClaimRatio * s.last_claim) return end(Status::stagnated);
      if (restart) s.last_claim = s.norm;
      return go_on(restart);
    }
    default: return end(Status::stagnated);   // the residual of the iterate that CG went back to is known now
  }
}

}  // namespace pgdfast
