// The thresholds of the numerics, all in one place, for the C++ core, the CUDA kernels and Python.
//
// `_C.limits()` hands them to Python (pgdfast/kernels/limits.py), which reads the lines `constexpr TYPE kName = VALUE;` of this
// file where the core is not built: VALUE is one number, or one number shifted left.
#pragma once

#include <cstdint>

namespace pgdfast::limits {

using index = std::int64_t;

// --- Precision of direct solves of float32 problems -------------------------------------------------------------------------
constexpr index kDoubleFactor = 192;       // up to this order the factor is float64: as fast as float32, which is twice as fast beyond
constexpr index kOneThreadOrder = 256;     // up to this order a factor or eigendecomposition takes longer on two threads than on one
constexpr index kWideFactor = 2048;        // up to this order a problem may be summed and factored in float64 at an affordable price
constexpr double kNarrowCondition = 5e3;   // trace bound of the condition number from which float32 loses more than four digits
constexpr double kNarrowTolerance = 1e-6;  // iterative solves to smaller tolerances than this take float64 products
constexpr int kRefineRounds = 6;           // rounds of iterative refinement at most; two are the rule
constexpr double kRefinedError = 1e-7;     // relative error at which refinement ends: float32 holds no more
constexpr double kRefineFirst = 3e-3;      // a first correction beyond this part of the step would take too many rounds
constexpr double kRefineRate = 0.1;        // and a later one beyond this part of the correction before

// --- Conjugate gradients (cg_rules.h) ---------------------------------------------------------------------------------------
constexpr int kCheckEvery = 50;            // iterations between two true residuals
constexpr double kFall = 1e-3;             // the model's reduction cannot fall; where it does by this part, rounding has taken over
constexpr double kRestartRatio = 1.1;      // true residual over the recurrence's beyond which CG restarts from the true one
constexpr double kClaimRatio = 0.5;        // a restart has to bring the true residual below this part of that of the last restart
constexpr int kProgressLeast = 10;         // progress is judged over this many iterations ...
constexpr int kProgressPart = 10;          // ... or, where more, over one in so many of those done
constexpr int kPathSlots = 8;              // iterates that are kept for truncation: the last powers of two
constexpr double kLeastTolerance = 1e-12;  // the least relative tolerance that float64 solves are asked for as a rule
constexpr int kClaims = 41;                // true residuals beyond the regular ones that such a solve may take (claims_within)

// --- Multi-shift CG ---------------------------------------------------------------------------------------------------------
constexpr int kShiftPanel = 32;            // residuals that are kept between two updates of all steps
constexpr int kShiftProbes = 2;            // random combinations of all true residuals that are computed at the end
constexpr double kShiftEarly = 0.6;        // of the tolerance: where a shift claims to have arrived, so that rounding has room
constexpr double kShiftDrift = 1.1;        // true residual over the recurrence's beyond which the recurrence is given up

// --- Memory -----------------------------------------------------------------------------------------------------------------
constexpr index kPassBytes = 64 << 20;     // what a pass over the Gram matrix may pack at least ...
constexpr int kPassPart = 4;               // ... or one in so many of the matrix's own bytes
constexpr index kRowsBytes = 64 << 20;     // of J at once where J^T J is added up
constexpr index kOneArenaBytes = 64 << 20; // larger arenas serve unit sweeps and products alike

// --- Formats ----------------------------------------------------------------------------------------------------------------
constexpr int kOutcomeNumbers = 7;         // status, iterations, residual norm, gain, square, trace, slack of one solve

// The number of claims to have arrived that can fail before the tolerance is reached, each at a true residual of at most
// kClaimRatio of the one before, and the one product more that returning to the last check takes.
constexpr int claims_within(double tolerance) {
  int count = 1;
  for (double norm = 1; norm > tolerance && count < 64; norm *= kClaimRatio) ++count;
  return count;
}
static_assert(kClaims == claims_within(kLeastTolerance), "kClaims does not cover the halvings down to kLeastTolerance");

#ifndef __CUDACC__
struct Limit {
  const char* name;
  double value;
  bool whole;   // an integer
};

#define PGDFAST_LIMIT(name) Limit{#name, double(name), whole(name)}
constexpr bool whole(double) { return false; }
constexpr bool whole(index) { return true; }
constexpr bool whole(int) { return true; }
constexpr Limit kAll[] = {
    PGDFAST_LIMIT(kDoubleFactor),  PGDFAST_LIMIT(kOneThreadOrder), PGDFAST_LIMIT(kWideFactor),
    PGDFAST_LIMIT(kNarrowCondition), PGDFAST_LIMIT(kNarrowTolerance),
    PGDFAST_LIMIT(kRefineRounds),  PGDFAST_LIMIT(kRefinedError),   PGDFAST_LIMIT(kRefineFirst),     PGDFAST_LIMIT(kRefineRate),
    PGDFAST_LIMIT(kCheckEvery),    PGDFAST_LIMIT(kFall),           PGDFAST_LIMIT(kRestartRatio),    PGDFAST_LIMIT(kClaimRatio),
    PGDFAST_LIMIT(kProgressLeast), PGDFAST_LIMIT(kProgressPart),   PGDFAST_LIMIT(kPathSlots),       PGDFAST_LIMIT(kLeastTolerance),
    PGDFAST_LIMIT(kClaims),        PGDFAST_LIMIT(kShiftPanel),     PGDFAST_LIMIT(kShiftProbes),     PGDFAST_LIMIT(kShiftEarly),
    PGDFAST_LIMIT(kShiftDrift),    PGDFAST_LIMIT(kPassBytes),      PGDFAST_LIMIT(kPassPart),        PGDFAST_LIMIT(kOneArenaBytes),
    PGDFAST_LIMIT(kOutcomeNumbers), PGDFAST_LIMIT(kRowsBytes),
};
#undef PGDFAST_LIMIT
#endif

}  // namespace pgdfast::limits
