// The C interface of the ensemble kernel.
#include "ensemble.h"
#include "handle.h"

namespace pgdfast::cuda {

// The bytes of workspace that `members` members need, after the ensemble's table has been asked for. method: 0 dual, which needs
// a row structure, 1 CG.
PGDFAST_API index pgdfast_cuda_ensemble_bytes(void* handle, int method, index members) {
  const Plan& plan = *static_cast<Plan*>(handle);
  return ensemble_layout(plan.s, plan.ensemble, static_cast<Method>(method), members, plan.wide).bytes;
}

// pointers: table, constants (3 numbers each, ensemble.h), r, mu, active, step, report, parameters, rates, workspace. counts:
// members, method, max_iterations. limits: tolerance, absolute.
PGDFAST_API int pgdfast_cuda_ensemble(void* handle, void* const* pointers, const index* counts, const double* limits,
                                      Stream stream) {
  Plan* plan = static_cast<Plan*>(handle);
  return with(plan, [&](auto zero) {
    using T = decltype(zero);
    const auto p = [&](int i) { return pointers[i]; };
    const auto method = static_cast<Method>(counts[1]);
    if (!plan->ensemble_planned) throw std::runtime_error("no table: ask for it first");
    if (method == Method::dual && !plan->layout.local) throw std::runtime_error("no row layout: call set_rows first");
    const EnsembleProblem problem{counts[0], method, static_cast<const index*>(p(0)),
                                  static_cast<const EnsembleConstant*>(p(1)), p(2), static_cast<const double*>(p(3)),
                                  static_cast<const unsigned char*>(p(4)), p(5), static_cast<double*>(p(6)), int(counts[2]),
                                  limits[0], limits[1], static_cast<void* const*>(p(7)), static_cast<const double*>(p(8)),
                                  p(9)};
    ensemble<T>(plan->s, plan->ensemble, problem, stream);
  });
}

}  // namespace pgdfast::cuda
