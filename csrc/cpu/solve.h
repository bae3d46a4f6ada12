// Whole solves of (D + J^T J) delta = J^T r + q on a bound program, each one call.
//
// D is diagonal: `shift` times the inverse of one weight per parameter buffer (dual), or a full vector (CG, primal).
#pragma once

#include <memory>
#include <vector>

#include "../plan/limits.h"
#include "../plan/status.h"
#include "factor.h"
#include "gram.h"
#include "krylov.h"

namespace pgdfast {

struct Outcome {
  Status status = Status::solved;
  int iterations = 0;
  double residual_norm = 0;   // CG and LSMR: final ||b - A x|| / ||b||
  double gain = 0;            // g . delta with g = J^T r + q
  double square = 0;          // ||delta||^2
  double trace = 0;           // of J D^-1 J^T: bounds the condition of the damped matrix; 0 from CG and LSMR
  double slack = 0;           // (b - A x) . x: 0 for solves that are exact
};

template <class T>
struct Solver {
  Structure structure;
  RowLayout layout;
  Bound<T> program{&structure, {}};
  Workspace<T> work;

  // The Gram or the normal matrix of the current constants, kept for further dampings, and the factor of the last damping. Its
  // memory serves the next one unless somebody still holds it.
  std::vector<T> matrix, weights_used;
  std::shared_ptr<Factor<T>> factor;
  FactorScratch<T> factor_scratch;
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
    explicit_J = work.unit_cotangents_valid = false;
  }

  // J v and J^T u: by the J that a primal solve has left, where it is smaller than what a sweep reads and writes, else by sweeps.
  void product(const T* v, T* u);
  void adjoint_product(const T* u, T* v);
  // J^T u for K of them, U (K, M) and V (K, P), in parallel; from the unit sweeps that a Gram matrix has left, where they serve.
  void adjoint_products(const T* U, index K, T* V);

  // delta = W (J^T y + q / s), (s I + J W J^T) y = r - J W q / s; W by parameter buffer, q may be null. Both direct solves leave
  // their factor in `factor`, with y of the dual one.
  Outcome dual(const T* r, const T* weights, double shift, const T* q, T* delta);
  // (diag(d) + J^T J) delta = J^T r + q by Cholesky of the P x P matrix.
  Outcome primal(const T* r, const T* d, const T* q, T* delta);
  // The same by preconditioned conjugate gradients, by the rules of ../plan/cg_rules.h. `kept`, if there is a path, gets one
  // entry per slot.
  Outcome cg(const T* r, const T* d, const T* q, const CGOptions<T>& options, T* delta, std::vector<Kept>* kept);
  // The same for K ascending mu with d = mu_k D + c from one Krylov space, begun at zero; D (scale) and c (penalty) may be
  // null; steps is K x P. A step is solved where its true residual is at most max(tolerance ||b||, absolute), else its status is
  // max_iterations, breakdown, or stagnated where rounding has parted recurrence and truth. Keeps K directions, and residuals
  // as many as limits.h says.
  std::vector<Outcome> multishift(const T* r, const T* q, const double* mu, index K, const T* scale, const T* penalty,
                                  int max_iterations, double tolerance, double absolute, T* steps);
  // The same by LSMR on [J W; damp I] y = [r - J q / d; 0], delta = q / d + W y, W^-2 damp^2 = d; `root` is the diagonal of
  // W or null. Stops where its recurrence says ||A^T e|| <= tolerance ||A^T b||, e the residual, or where the backward errors
  // of Fong and Saunders (2011) are a hundredth of the rounding unit.
  Outcome lsmr(const T* r, const T* d, const T* root, double damp, const T* q, int max_iterations, double tolerance, T* delta);

  void gram_matrix(const T* weights, T* K);   // J W J^T, full symmetric, residual order; W by parameter buffer
  // The columns of J of these parameter buffers, one after the other, M x their elements. Needs a row layout.
  void columns(const std::vector<int>& parameters, T* J);
  // K = A A^T, full symmetric, n x n, of any matrix: element (i, l) at i * row + l * column. What is held is lost.
  void squared(const T* A, index n, index depth, index row, index column, T* K);
  // H += J^T J, the upper triangle: row-major, gram_stride(P) elements to a row, of P + 1 rows. Where the factors do not give it
  // at most kRowsBytes of J are there at once.
  void add_normal(T* H);
  // Does J^T J come cheaper from factors summed over outputs (normal.h) than from J?
  bool normal_pays() const;

 private:
  // The part that direct solves share: x <- (matrix + diag(added))^-1 x, n x n with rows `ld` apart, and the trace. False, with
  // a zero step, where the matrix is not positive definite. positions: as for Factor.
  template <class D>
  bool solve_direct(index ld, index n, D&& added, const std::vector<index>* positions, T* x, T* delta, Outcome& outcome);

  // J^T J, written to H or added to it, by at most `most` rows of J at once.
  void normal_matrix(T* H, bool add, index most);

  bool explicit_J = false;   // J holds the rows of the current constants
};

}  // namespace pgdfast
