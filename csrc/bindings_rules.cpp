// The table of thresholds and the rules of CG, for Python.
#include <pybind11/stl.h>


#include "bindings.h"
#include "cpu/parallel.h"
#include "plan/cg_rules.h"

namespace pgdfast {
namespace {

using Numbers = std::vector<double>;

// A state as numbers, in the order of CG_STATE.
constexpr const char* kFields[] = {
    "phase", "status", "iteration", "claimed", "broken", "slot", "keep_safe", "restore_safe", "b_norm", "target", "norm", "rz",
    "before", "beta", "step", "value", "recurrence", "last_claim", "safe", "gain", "slack"};

Numbers numbers_of(const CGState& s) {
  return {double(s.phase), double(s.status), double(s.iteration), double(s.claimed), double(s.broken), double(s.slot),
          double(s.keep_safe), double(s.restore_safe), s.b_norm, s.target, s.norm, s.rz, s.before, s.beta, s.step, s.value,
          s.recurrence, s.last_claim, s.safe, s.gain, s.slack};
}

CGState state_of(const Numbers& n) {
  if (n.size() != std::size(kFields)) throw py::value_error("a state has the numbers that CG_STATE names");
  CGState s{};
  s.phase = static_cast<CGPhase>(int(n[0]));
  s.status = static_cast<Status>(int(n[1]));
  s.iteration = int(n[2]), s.claimed = int(n[3]), s.broken = int(n[4]), s.slot = int(n[5]);
  s.keep_safe = int(n[6]), s.restore_safe = int(n[7]);
  s.b_norm = n[8], s.target = n[9], s.norm = n[10], s.rz = n[11], s.before = n[12], s.beta = n[13], s.step = n[14];
  s.value = n[15], s.recurrence = n[16], s.last_claim = n[17], s.safe = n[18], s.gain = n[19], s.slack = n[20];
  return s;
}

// max_iterations, tolerance, absolute, progress, slots.
CGLimits limits_of(const Numbers& n) {
  if (n.size() != 5) throw py::value_error("limits are max_iterations, tolerance, absolute, progress and slots");
  return {int(n[0]), n[1], n[2], n[3], int(n[4])};
}

}  // namespace

void bind_rules(py::module_& m) {
  m.def("fail_in_parallel", [](const std::string& kind, int threads, index failing) {
    const Running running;
    fail_in_parallel(kind, threads, failing);
  });
  m.def("limits", [] {
    py::dict table;
    for (const limits::Limit& limit : limits::kAll)
      table[limit.name] = limit.whole ? py::object(py::int_(std::int64_t(limit.value))) : py::object(py::float_(limit.value));
    return table;
  });
  py::list fields;
  for (const char* name : kFields) fields.append(name);
  m.attr("CG_STATE") = py::tuple(fields);
  m.attr("CG_PHASES") = py::make_tuple("iterate", "start", "check", "restore", "ended");
  m.attr("STATUS") = py::make_tuple("solved", "not_positive_definite", "max_iterations", "breakdown", "stagnated", "progress");
  m.def("cg_begin", [](double b_norm, const Numbers& limits, bool has_start) {
    return numbers_of(cg_begin(b_norm, limits_of(limits), has_start));
  });
  m.def("cg_start", [](const Numbers& state, double along, double curvature) {
    CGState s = state_of(state);
    cg_start(s, along, curvature);
    return numbers_of(s);
  });
  m.def("cg_step", [](const Numbers& state, double curvature) {
    CGState s = state_of(state);
    cg_step(s, curvature);
    return numbers_of(s);
  });
  m.def("cg_judge", [](const Numbers& state, const Numbers& limits, const Numbers& values) {
    CGState s = state_of(state);
    const CGLimits options = limits_of(limits);
    if (options.progress > 0 && index(values.size()) < s.iteration)
      throw py::value_error("progress is judged by the model's reduction at every iterate");
    cg_judge(s, options, values.data());
    return numbers_of(s);
  });
}

}  // namespace pgdfast
