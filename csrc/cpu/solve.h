// Whole solves of (D + J^T J) delta = J^T r + q on a bound program, each one call.
//
// D is diagonal: `shift` times the inverse of one weight per parameter buffer (dual), or a full vector (CG, primal).
#pragma once

#include <vector>

#include "cholesky.h"
#include "gram.h"
#include "krylov.h"

namespace pgdfast {

enum class Status : int {
  solved = 0, not_positive_definite = 1, max_iterations = 2, breakdown = 3, stagnated = 4, progress = 5
};

struct Outcome {
  Status status = Status::solved;
  int iterations = 0;
  double residual_norm = 0;   // CG and LSMR: final ||b - A x|| / ||b||
  double gain = 0;            // g . delta with g = J^T r + q
  double square = 0;          // ||delta||^2
  double trace = 0;           // of J D^-1 J^T: bounds the condition of the damped matrix; 0 from CG and LSMR
  double slack = 0;           // (b - A x) . x: 0 for solves that are exact
};

// Up to this order the matrix of a float program is factored in double, and its normal matrix summed so. Beyond, float is
// twice as fast and, for the conditions that float sums are good for at all, loses little (bench/NOTES.md); for others the
// caller refines with `correct` and products of a double program.
constexpr index kDoubleFactor = 192;

constexpr index kOneArenaBytes = index(64) << 20;   // larger arenas serve unit sweeps and products alike (solve/memory.py)

template <class T>
struct Solver {
  Structure structure;
  RowLayout layout;
  Bound<T> program{&structure, {}};
  Workspace<T> work;

  // The Gram or the normal matrix of the current constants, kept for further dampings, and the factor of the last one:
  // `narrow` in T, or `wide` in double for small float programs.
  std::vector<T> matrix;
  std::vector<double> wide_matrix, wide_diagonal, wide_x;
  Cholesky<T> narrow_factor;
  Cholesky<double> wide_factor;
  std::vector<T> weights_used, diagonal;
  enum class Held { nothing, gram, normal } held = Held::nothing;

  std::vector<T> J, arena, arenas, scratch_u, rhs;
  std::vector<T> cg_r, cg_p, cg_Ap, cg_u, cg_z, cg_safe, small, shift_p, shift_r;

  Solver() = default;
  Solver(const Solver&) = delete;
  Solver& operator=(const Solver&) = delete;

  T* arena_data();
  // To be called whenever constants change: what is held belongs to the old ones.
  void invalidate() {
    held = Held::nothing;
    explicit_J = units_kept = false;
  }

  // J v and J^T u: by the J that a primal solve has left, where it is smaller than what a sweep reads and writes, else by sweeps.
  void product(const T* v, T* u);
  void adjoint_product(const T* u, T* v);
  // J^T u for K of them, U (K, M) and V (K, P), in parallel; from the unit sweeps that a Gram matrix has left, where they serve.
  void adjoint_products(const T* U, index K, T* V);

  // delta = W (J^T y + q / s), (s I + J W J^T) y = r - J W q / s; W by parameter buffer, q may be null.
  Outcome dual(const T* r, const T* weights, double shift, const T* q, T* delta);
  // (diag(d) + J^T J) delta = J^T r + q by Cholesky of the P x P matrix.
  Outcome primal(const T* r, const T* d, const T* q, T* delta);
  // The same by preconditioned conjugate gradients. Arrival is judged by the true residual, which is recomputed every 50
  // iterations and whenever the recurrence claims to have arrived; CG restarts from it where the two differ, until that no
  // longer helps, and goes back to the last check where the model's value has fallen since. `kept`, if there is a path,
  // gets one entry per slot.
  Outcome cg(const T* r, const T* d, const T* q, const CGOptions<T>& options, T* delta, std::vector<Kept>* kept);
  // The same for K ascending mu with d = mu_k D + c from one Krylov space, begun at zero; D (scale) and c (penalty) may be
  // null; steps is K x P. A step is solved where its true residual is at most max(tolerance ||b||, absolute), else its status is
  // max_iterations, breakdown, or stagnated where rounding has parted recurrence and truth. Keeps K directions and 34 residuals.
  std::vector<Outcome> multishift(const T* r, const T* q, const double* mu, index K, const T* scale, const T* penalty,
                                  int max_iterations, double tolerance, double absolute, T* steps);
  // The same by LSMR on [J W; damp I] y = [r - J q / d; 0], delta = q / d + W y, W^-2 damp^2 = d; `root` is the diagonal of
  // W or null. Stops where its recurrence says ||A^T e|| <= tolerance ||A^T b||, e the residual, or where the backward errors
  // of Fong and Saunders (2011) are a hundredth of the rounding unit.
  Outcome lsmr(const T* r, const T* d, const T* root, double damp, const T* q, int max_iterations, double tolerance, T* delta);

  // Solves with the factor of the last dual step (x, b: M, residual order) or primal step (P); x may be b.
  void correct(const T* b, T* x);
  // y of the last dual step, M, residual order.
  const T* dual_vector() const { return scratch_u.data(); }

  void gram_matrix(T* K);   // full symmetric, residual order
  // Does J^T J come cheaper from factors summed over sections (normal.h) than from J?
  bool normal_pays() const;

 private:
  // Factors matrix + diag(added) and keeps the factor; false if it is not positive definite.
  template <class D>
  bool factor(const std::vector<T>& from, index ld, index n, D added);
  void solve_in_place(T* x);

  index order = 0;
  bool wide = false;
  bool explicit_J = false;   // J holds the rows of the current constants
  bool units_kept = false;   // work.arenas holds the unit sweeps of the present constants
};

}  // namespace pgdfast
