// Plans in Python: a program with its constants, its products and its solves.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/members.h"
#include "cpu/simd.h"
#include "cpu/solve.h"

namespace pgdfast {
namespace {

struct ConstantLayout {
  bool scalar;
  std::vector<index> sizes, strides;
  Function function = Function::identity;
};

template <class T>
class Plan {
 public:
  Plan(const std::vector<std::pair<int, index>>& buffers, const std::vector<index>& live, const py::list& instructions,
       const py::list& constants, const std::vector<int>& functions) {
    auto& s = solver_.structure;
    for (const auto& [role, size] : buffers) s.buffers.push_back({static_cast<Role>(role), size, live.at(s.buffers.size())});
    for (py::handle item : instructions) s.instructions.push_back(read_instruction(py::cast<py::tuple>(item)));
    for (py::handle item : constants) {
      if (item.is_none()) layouts_.push_back({true, {}, {}, {}});
      else {
        auto [sizes, strides] = py::cast<std::pair<std::vector<index>, std::vector<index>>>(item);
        layouts_.push_back({false, sizes, strides, static_cast<Function>(functions.at(layouts_.size()))});
      }
    }
    s.finalize();
    solver_.program.constants.resize(layouts_.size());
  }

  // Points the constants at this step's tensors. False if one differs in layout from those the plan was built for.
  bool bind(const py::list& constants) {
    if (constants.size() != layouts_.size()) return false;
    solver_.invalidate();
    members_.sources.assign(members_.count ? layouts_.size() : 0, {});
    for (std::size_t i = 0; i < layouts_.size(); ++i) {
      PyObject* object = PyList_GET_ITEM(constants.ptr(), Py_ssize_t(i));
      auto& target = solver_.program.constants[i];
      if (layouts_[i].scalar) {
        if (!PyFloat_Check(object)) return false;
        target = {nullptr, T(PyFloat_AS_DOUBLE(object))};
        continue;
      }
      if (!THPVariable_Check(object)) return false;
      const at::Tensor& t = THPVariable_Unpack(object);
      if (layouts_[i].function == Function::positions) {
        if (!t.device().is_cpu() || t.scalar_type() != at::kLong || !t.is_contiguous() ||
            t.sizes() != at::IntArrayRef(layouts_[i].sizes))
          return false;
        target = {nullptr, T(0), t.const_data_ptr<std::int64_t>()};
        continue;
      }
      if (!t.device().is_cpu() || t.sizes() != at::IntArrayRef(layouts_[i].sizes) ||
          t.strides() != at::IntArrayRef(layouts_[i].strides))
        return false;
      if (t.scalar_type() == scalar_type<T> && layouts_[i].function == Function::identity)
        target = {t.const_data_ptr<T>(), T(0)};
      else if (members_.count && t.scalar_type() == scalar_type<T>)   // each member evaluates its own when it is its turn
        members_.sources[i] = {{}, t.const_data_ptr<T>(), nullptr, layouts_[i].function};
      else if (members_.count && t.scalar_type() == at::kFloat)
        members_.sources[i] = {{}, nullptr, t.const_data_ptr<float>(), layouts_[i].function};
      else if (t.scalar_type() == scalar_type<T> || t.scalar_type() == at::kFloat)
        target = {evaluated(i, t), T(0)};
      else
        return false;
    }
    for (std::size_t i = 0; i < members_.sources.size(); ++i) {
      auto& source = members_.sources[i];
      if (!source.raw && !source.narrow) source.first = solver_.program.constants[i];
    }
    if (members_.count) select(0);
    for (const Instruction& op : solver_.structure.instructions) {
      if (op.kind != Kind::gather) continue;
      const index* positions = solver_.program.constants[std::size_t(op.constant)].positions;
      for (index i = 0; i < op.gather.rows; ++i)
        if (positions[i] < -1 || positions[i] >= op.gather.count) throw py::index_error("a position outside of its tensor");
    }
    return true;
  }

  // The constants are those of an ensemble; member 0 is selected when they are bound.
  void set_members(index count, std::vector<index> shifts, std::vector<index> spans) {
    if (count < 1 || shifts.size() != layouts_.size() || spans.size() != layouts_.size())
      throw py::value_error("one shift and one span per constant, and a member or more");
    members_.count = count;
    members_.shifts = std::move(shifts);
    members_.spans = std::move(spans);
  }
  void select(index member) {
    if (member < 0 || member >= members_.count) throw py::index_error("no such member");
    members_.place(member, solver_.program.constants, own_);
    solver_.invalidate();
  }

  void clear_rows() {
    solver_.layout = {};
    solver_.invalidate();
    members_.forget();
  }

  void set_rows(index num_rows, index max_sections, std::vector<index> section_of, std::vector<index> k_of,
                const std::vector<std::array<index, 4>>& blocks, const std::vector<std::array<index, 7>>& uses,
                const py::dict& labels) {
    auto& layout = solver_.layout;
    layout = {};
    layout.num_rows = num_rows;
    layout.max_sections = max_sections;
    layout.section_of = std::move(section_of);
    layout.k_of = std::move(k_of);
    for (const auto& b : blocks) layout.blocks.push_back({b[0], b[1], b[2], b[3]});
    for (const auto& u : uses)
      layout.uses.push_back({int(u[0]), int(u[1]), static_cast<Form>(u[2]), u[3], u[4] != 0, int(u[5]), u[6] != 0});
    layout.labels.resize(solver_.structure.buffers.size());
    for (auto item : labels) {
      const auto values = py::cast<py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>>(item.second);
      layout.labels[py::cast<std::size_t>(item.first)].assign(values.data(), values.data() + values.size());
    }
    layout.finalize();
    layout.local = true;
    solver_.invalidate();
    members_.forget();
  }

  void jvp(py::handle v, py::handle u) {
    const T* from = pointer<T>(v, P(), "v");
    T* to = pointer<T>(u, M(), "u");
    const Running running;
    solver_.product(from, to);
  }
  void vjp(py::handle u, py::handle v) {
    const T* from = pointer<T>(u, M(), "u");
    T* to = pointer<T>(v, P(), "v");
    const Running running;
    solver_.adjoint_product(from, to);
  }
  void vjps(py::handle U, index K, py::handle V) {
    const T* from = pointer<T>(U, K * M(), "U");
    T* to = pointer<T>(V, K * P(), "V");
    const Running running;
    solver_.adjoint_products(from, K, to);
  }
  void dense(py::handle J) {
    T* to = pointer<T>(J, M() * P(), "J");
    const Running running;
    pgdfast::dense(solver_.program, solver_.layout, solver_.work, to);
  }
  void gram(py::handle K) {
    require_rows("gram");
    T* to = pointer<T>(K, M() * M(), "K");
    const Running running;
    solver_.gram_matrix(to);
  }
  void diagonal(py::handle d) {
    T* to = pointer<T>(d, P(), "d");
    const Running running;
    pgdfast::diagonal(solver_.program, solver_.layout, solver_.work, to);
  }
  py::tuple dual(py::handle r, py::handle weights, double shift, py::handle q, py::handle delta) {
    require_rows("dual");
    const T* r_ = pointer<T>(r, M(), "r");
    const T* w_ = pointer<T>(weights, solver_.structure.num_parameter_buffers, "weights");
    const T* q_ = optional_pointer<T>(q, P(), "q");
    T* delta_ = pointer<T>(delta, P(), "delta");
    return solved([&] { return solver_.dual(r_, w_, shift, q_, delta_); });
  }
  py::tuple primal(py::handle r, py::handle d, py::handle q, py::handle delta) {
    const T* r_ = pointer<T>(r, M(), "r");
    const T* d_ = pointer<T>(d, P(), "d");
    const T* q_ = optional_pointer<T>(q, P(), "q");
    T* delta_ = pointer<T>(delta, P(), "delta");
    return solved([&] { return solver_.primal(r_, d_, q_, delta_); });
  }
  // Solves with the factor of the last dual or primal step.
  void correct(py::handle b, py::handle x) {
    if (solver_.held == Solver<T>::Held::nothing) throw py::value_error("correct needs a dual or primal step before it");
    const index n = solver_.held == Solver<T>::Held::gram ? M() : P();
    const T* from = pointer<T>(b, n, "b");
    T* to = pointer<T>(x, n, "x");
    const Running running;
    solver_.correct(from, to);
  }
  void dual_vector(py::handle y) {
    if (solver_.held != Solver<T>::Held::gram) throw py::value_error("dual_vector needs a dual step before it");
    std::copy_n(solver_.dual_vector(), M(), pointer<T>(y, M(), "y"));
  }
  // V and c: a sketch's rows (rank, P) and coefficients (rank,), or None; path: (slots, P) or None. The last item of the
  // result lists the iterates kept there: (slot, iteration, gain, square, slack).
  py::tuple cg(py::handle r, py::handle d, py::handle q, py::handle inverse, py::handle V, py::handle c, py::handle start,
               py::handle path, int max_iterations, double tolerance, double absolute, double progress, py::handle delta) {
    const T* r_ = pointer<T>(r, M(), "r");
    const T* d_ = pointer<T>(d, P(), "d");
    const T* q_ = optional_pointer<T>(q, P(), "q");
    CGOptions<T> options{max_iterations, tolerance, absolute, progress, {}, nullptr, nullptr, 0};
    options.preconditioner.inverse = optional_pointer<T>(inverse, P(), "inverse");
    const index rank = V.is_none() ? 0 : THPVariable_Unpack(V.ptr()).size(0);
    options.preconditioner.rank = rank;
    options.preconditioner.V = optional_pointer<T>(V, rank * P(), "V");
    options.preconditioner.c = optional_pointer<T>(c, rank, "c");
    options.start = optional_pointer<T>(start, P(), "start");
    options.path_slots = path.is_none() ? 0 : THPVariable_Unpack(path.ptr()).size(0);
    options.path = optional_pointer<T>(path, options.path_slots * P(), "path");
    T* delta_ = pointer<T>(delta, P(), "delta");
    std::vector<Kept> kept;
    const py::tuple found = solved([&] { return solver_.cg(r_, d_, q_, options, delta_, options.path ? &kept : nullptr); });
    py::list path_kept;
    for (std::size_t slot = 0; slot < kept.size(); ++slot)
      if (kept[slot].iteration > 0)
        path_kept.append(py::make_tuple(slot, kept[slot].iteration, kept[slot].gain, kept[slot].square, kept[slot].slack));
    return py::make_tuple(found, path_kept);
  }
  // scale, penalty: (P,) or None; steps: (K, P) for K ascending mu. One result per mu.
  std::vector<py::tuple> multishift(py::handle r, py::handle q, const std::vector<double>& mu, py::handle scale,
                                    py::handle penalty, int max_iterations, double tolerance, double absolute, py::handle steps) {
    const T* r_ = pointer<T>(r, M(), "r");
    const T* q_ = optional_pointer<T>(q, P(), "q");
    const T* scale_ = optional_pointer<T>(scale, P(), "scale");
    const T* penalty_ = optional_pointer<T>(penalty, P(), "penalty");
    T* steps_ = pointer<T>(steps, index(mu.size()) * P(), "steps");
    std::vector<Outcome> outcomes;
    {
      const Running running;
      outcomes = solver_.multishift(r_, q_, mu.data(), index(mu.size()), scale_, penalty_, max_iterations, tolerance, absolute,
                                    steps_);
    }
    std::vector<py::tuple> found;
    for (const Outcome& outcome : outcomes) found.push_back(tuple_of(outcome));
    return found;
  }
  py::tuple lsmr(py::handle r, py::handle d, py::handle root, double damp, py::handle q, int max_iterations, double tolerance,
                 py::handle delta) {
    const T* r_ = pointer<T>(r, M(), "r");
    const T* d_ = pointer<T>(d, P(), "d");
    const T* root_ = optional_pointer<T>(root, P(), "root");
    const T* q_ = optional_pointer<T>(q, P(), "q");
    T* delta_ = pointer<T>(delta, P(), "delta");
    return solved([&] { return solver_.lsmr(r_, d_, root_, damp, q_, max_iterations, tolerance, delta_); });
  }

  // Solves for the members listed. r: members x M; mu: members, double; penalty: c per parameter buffer, or empty; scale and q:
  // members x P or None; delta: members x P, of which the rows of those listed are written; out: listed x 7, double: what
  // `solved` returns. By CG also inverse, the diagonal that preconditions, and start: members x P or None.
  void members_dual(const std::vector<index>& listed, py::handle r, py::handle mu, const std::vector<double>& penalty,
                    py::handle q, py::handle delta, py::handle out) {
    require_rows("members_dual");
    std::vector<T> ones(std::size_t(solver_.structure.num_parameter_buffers), T(1));
    each_member(listed, r, mu, penalty, py::none(), q, delta, out, [&](Solver<T>& solver, const System& system) {
      if (penalty.empty()) return solver.dual(system.r, ones.data(), system.mu, nullptr, system.delta);
      std::vector<T> weights;
      for (double c : penalty) weights.push_back(T(1 / (system.mu + c)));
      return solver.dual(system.r, weights.data(), 1, system.q, system.delta);
    });
  }
  void members_primal(const std::vector<index>& listed, py::handle r, py::handle mu, const std::vector<double>& penalty,
                      py::handle scale, py::handle q, py::handle delta, py::handle out) {
    each_member(listed, r, mu, penalty, scale, q, delta, out, [&](Solver<T>& solver, const System& system) {
      return solver.primal(system.r, diagonal_of(system, penalty).data(), system.q, system.delta);
    });
  }
  void members_cg(const std::vector<index>& listed, py::handle r, py::handle mu, const std::vector<double>& penalty,
                  py::handle scale, py::handle q, py::handle inverse, py::handle start, int max_iterations, double tolerance,
                  double absolute, double progress, py::handle delta, py::handle out) {
    const T* inverse_ = optional_pointer<T>(inverse, members_.count * P(), "inverse");
    const T* start_ = optional_pointer<T>(start, members_.count * P(), "start");
    each_member(listed, r, mu, penalty, scale, q, delta, out, [&](Solver<T>& solver, const System& system) {
      CGOptions<T> options{max_iterations, tolerance, absolute, progress, {}, nullptr, nullptr, 0};
      if (inverse_) options.preconditioner.inverse = inverse_ + system.member * P();
      if (start_) options.start = start_ + system.member * P();
      return solver.cg(system.r, diagonal_of(system, penalty).data(), system.q, options, system.delta, nullptr);
    });
  }

  index M() const { return solver_.structure.num_residuals; }
  index P() const { return solver_.structure.num_parameters; }
  double flops() const { return solver_.structure.flops; }
  // Into how many rows each part of the program can be cut; 1: it cannot.
  std::vector<index> rows_of_parts() const {
    std::vector<index> rows;
    for (const Component& part : solver_.structure.parts) rows.push_back(part.rows);
    return rows;
  }
  bool normal_pays() const { return solver_.normal_pays(); }
  index arena_size() const { return solver_.structure.arena_size; }

 private:
  // A function of a constant, or a float constant for a double plan: over the memory it spans, under the same strides.
  const T* evaluated(std::size_t i, const at::Tensor& t) {
    index span = t.numel() > 0;
    for (std::int64_t d = 0; span && d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
    own_.resize(layouts_.size());
    if (index(own_[i].size()) < span) own_[i].resize(std::size_t(span));
    if (t.scalar_type() == scalar_type<T>)
      simd<T>().evaluate(layouts_[i].function, span, t.const_data_ptr<T>(), own_[i].data());
    else
      simd<T>().evaluate_float(layouts_[i].function, span, t.const_data_ptr<float>(), own_[i].data());
    return own_[i].data();
  }
  template <class F>
  py::tuple solved(F&& run) {
    Outcome outcome;
    {
      const Running running;
      outcome = run();
    }
    return tuple_of(outcome);
  }
  static py::tuple tuple_of(const Outcome& o) {
    return py::make_tuple(int(o.status), o.iterations, o.residual_norm, o.gain, o.square, o.trace, o.slack);
  }
  // One member's (mu scale + c + J^T J) delta = J^T r + q.
  struct System {
    index member;
    const T* r;
    double mu;
    const T* scale;
    const T* q;
    T* delta;
  };
  template <class F>
  void each_member(const std::vector<index>& listed, py::handle r, py::handle mu, const std::vector<double>& penalty,
                   py::handle scale, py::handle q, py::handle delta, py::handle out, F&& solve) {
    const index B = members_.count;
    if (!penalty.empty() && index(penalty.size()) != solver_.structure.num_parameter_buffers)
      throw py::value_error("one penalty per parameter");
    for (index b : listed)
      if (b < 0 || b >= B) throw py::index_error("no such member");
    const T* r_ = pointer<T>(r, B * M(), "r");
    const double* mu_ = pointer<double>(mu, B, "mu");
    const T* scale_ = optional_pointer<T>(scale, B * P(), "scale");
    const T* q_ = optional_pointer<T>(q, B * P(), "q");
    T* delta_ = pointer<T>(delta, B * P(), "delta");
    double* out_ = pointer<double>(out, index(listed.size()) * 7, "out");
    const Running running;
    members_.each(solver_, listed, [&](Solver<T>& solver, index i, index b) {
      const System system{b, r_ + b * M(), mu_[b], scale_ ? scale_ + b * P() : nullptr, q_ ? q_ + b * P() : nullptr,
                          delta_ + b * P()};
      const Outcome o = solve(solver, system);
      const double values[7] = {double(o.status), double(o.iterations), o.residual_norm, o.gain, o.square, o.trace, o.slack};
      std::copy_n(values, 7, out_ + 7 * i);
    });
  }
  std::vector<T> diagonal_of(const System& system, const std::vector<double>& penalty) const {
    std::vector<T> d(std::size_t(P()), T(system.mu));
    if (system.scale)
      for (index i = 0; i < P(); ++i) d[std::size_t(i)] = T(system.mu) * system.scale[i];
    for (std::size_t l = 0; l < penalty.size(); ++l) {
      const Buffer& buffer = solver_.structure.buffers[l];   // parameters come first
      for (index i = 0; i < buffer.size; ++i) d[std::size_t(buffer.offset + i)] += T(penalty[l]);
    }
    return d;
  }
  void require_rows(const char* what) const {
    if (!solver_.layout.local) throw py::value_error(std::string(what) + " needs a row layout: call set_rows first");
  }
  static Instruction read_instruction(const py::tuple& t) {
    // (kind, y, y_offset, x, x_offset, constant, c_offset, alpha, extents...)
    Instruction op{};
    op.kind = static_cast<Kind>(py::cast<int>(t[0]));
    op.y = py::cast<int>(t[1]);
    op.y_offset = py::cast<index>(t[2]);
    op.x = py::cast<int>(t[3]);
    op.x_offset = py::cast<index>(t[4]);
    op.constant = py::cast<int>(t[5]);
    op.c_offset = py::cast<index>(t[6]);
    op.alpha = py::cast<double>(t[7]);
    const auto list = py::cast<std::vector<std::vector<index>>>(t[8]);
    if (op.kind == Kind::matmul) {
      const auto& g = list.at(0);
      op.matmul = {g.at(0), g.at(1), g.at(2),  g.at(3),  g.at(4),  g.at(5), g.at(6),
                   g.at(7), g.at(8), g.at(9), g.at(10), g.at(11), g.at(12), g.at(13), g.at(14), g.at(15), g.at(16)};
    } else if (op.kind == Kind::gather) {
      const auto& g = list.at(0);
      op.gather = {g.at(0), g.at(1), g.at(2), g.at(3), g.at(4)};
    } else if (op.kind == Kind::project) {
      Project& p = op.project;
      p.ndim = int(list.at(0).size());
      const std::size_t operands = list.size() - 5;   // all but shape, strides of y and x, numbers and offsets
      if (p.ndim > kMaxDims + 1 || operands > p.constants.size()) throw py::value_error("a projection beyond the limits");
      p.terms = int(operands - 1) / 2;
      for (std::size_t d = 0; d < list[0].size(); ++d) {
        p.shape[d] = list[0][d];
        p.ys[d] = list.at(1).at(d);
        p.xs[d] = list.at(2).at(d);
        for (std::size_t c = 0; c < operands; ++c) p.cs[c][d] = list.at(3 + c).at(d);
      }
      for (std::size_t c = 0; c < operands; ++c) {
        p.constants[c] = int(list[list.size() - 2].at(c));
        p.offsets[c] = list.back().at(c);
      }
    } else {
      op.muladd.ndim = int(list.at(0).size());
      if (op.muladd.ndim > kMaxDims) throw py::value_error("more than 6 dimensions in one instruction");
      for (std::size_t d = 0; d < list[0].size(); ++d) {
        op.muladd.shape[d] = list[0][d];
        op.muladd.ys[d] = list.at(1).at(d);
        op.muladd.xs[d] = list.at(2).at(d);
        op.muladd.cs[d] = list.at(3).at(d);
      }
    }
    return op;
  }

  Solver<T> solver_;
  std::vector<ConstantLayout> layouts_;
  std::vector<std::vector<T>> own_;
  Members<T> members_;
};

template <class T>
void bind_plan(py::module_& m, const char* name) {
  using P = Plan<T>;
  py::class_<P>(m, name)
      .def(py::init<const std::vector<std::pair<int, index>>&, const std::vector<index>&, const py::list&, const py::list&,
                    const std::vector<int>&>(),
           py::arg("buffers"), py::arg("live"), py::arg("instructions"), py::arg("constants"), py::arg("functions"))
      .def("bind", &P::bind)
      .def("set_members", &P::set_members)
      .def("select", &P::select)
      .def("members_dual", &P::members_dual)
      .def("members_primal", &P::members_primal)
      .def("members_cg", &P::members_cg)
      .def("set_rows", &P::set_rows)
      .def("clear_rows", &P::clear_rows)
      .def("jvp", &P::jvp)
      .def("vjp", &P::vjp)
      .def("vjps", &P::vjps)
      .def("dense", &P::dense)
      .def("gram", &P::gram)
      .def("diagonal", &P::diagonal)
      .def("dual", &P::dual)
      .def("primal", &P::primal)
      .def("correct", &P::correct)
      .def("dual_vector", &P::dual_vector)
      .def("cg", &P::cg)
      .def("multishift", &P::multishift)
      .def("lsmr", &P::lsmr)
      .def_property_readonly("num_residuals", &P::M)
      .def_property_readonly("num_parameters", &P::P)
      .def_property_readonly("flops", &P::flops)
      .def_property_readonly("normal_pays", &P::normal_pays)
      .def_property_readonly("rows_of_parts", &P::rows_of_parts)
      .def_property_readonly("arena_size", &P::arena_size);
}

}  // namespace

void bind_plans(py::module_& m) {
  bind_plan<float>(m, "PlanFloat");
  bind_plan<double>(m, "PlanDouble");
}

}  // namespace pgdfast
