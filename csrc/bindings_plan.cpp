// Plans in Python: a program with its constants, its products and its solves.
#include <pybind11/stl.h>

#include <mutex>

#include "bindings_factor.h"
#include "cpu/members.h"
#include "cpu/simd.h"
#include "cpu/solve.h"
#include "plan/read.h"

namespace pgdfast {
namespace {

struct ConstantLayout {
  bool scalar;
  std::vector<index> sizes, strides;
  Function function = Function::identity;
};

// A contiguous CPU tensor of 64-bit integers: what plan/read.h reads.
std::pair<const index*, index> words_of(py::handle object) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("words must be a tensor");
  const at::Tensor& t = THPVariable_Unpack(object.ptr());
  if (t.scalar_type() != at::kLong || !t.device().is_cpu() || !t.is_contiguous())
    throw py::value_error("words must be a contiguous CPU tensor of 64-bit integers");
  return {t.const_data_ptr<std::int64_t>(), t.numel()};
}

// A program with its constants. One call at a time works on it: others wait, without the GIL.
template <class T>
class Plan {
 public:
  // words and alphas: the program, as plan/read.h has it. constants: per constant (sizes, strides), or None for a number.
  Plan(py::handle words, const std::vector<double>& alphas, const py::list& constants, const std::vector<int>& functions) {
    const auto [numbers, count] = words_of(words);
    solver_.structure = read_program(numbers, count, alphas.data(), index(alphas.size()));
    for (py::handle item : constants) {
      if (item.is_none()) layouts_.push_back({true, {}, {}, {}});
      else {
        auto [sizes, strides] = py::cast<std::pair<std::vector<index>, std::vector<index>>>(item);
        layouts_.push_back({false, sizes, strides, static_cast<Function>(functions.at(layouts_.size()))});
      }
    }
    for (const Instruction& op : solver_.structure.instructions)
      if (op.constant >= int(layouts_.size())) throw py::value_error("an instruction with a constant that there is not");
    solver_.program.constants.resize(layouts_.size());
  }

  // Points the constants at this step's tensors, and the row scale at one of the plan's dtype, or None. False if a constant
  // differs in layout from those the plan was built for.
  bool bind(const py::list& constants, py::handle row_scale) {
    if (constants.size() != layouts_.size()) return false;
    const T* scale = optional_pointer<T>(row_scale, M(), "row_scale");
    const Locked locked(mutex_);
    bound_ = false;   // until all are in place: memory may run out on the way
    solver_.program.row_scale = scale;
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
    if (members_.count) place(0);
    for (const Instruction& op : solver_.structure.instructions) {
      if (op.kind != Kind::gather) continue;
      const index* positions = solver_.program.constants[std::size_t(op.constant)].positions;
      for (index i = 0; i < op.gather.rows; ++i)
        if (positions[i] < -1 || positions[i] >= op.gather.count) throw py::index_error("a position outside of its tensor");
    }
    bound_ = true;
    return true;
  }

  // The constants are those of an ensemble; member 0 is selected when they are bound.
  void set_members(index count, std::vector<index> shifts, std::vector<index> spans) {
    if (count < 1 || shifts.size() != layouts_.size() || spans.size() != layouts_.size())
      throw py::value_error("one shift and one span per constant, and a member or more");
    const Locked locked(mutex_);
    members_.count = count;
    members_.shifts = std::move(shifts);
    members_.spans = std::move(spans);
  }
  void select(index member) {
    if (member < 0 || member >= members_.count) throw py::index_error("no such member");
    const Locked locked(mutex_);
    place(member);
  }

  void clear_rows() {
    const Locked locked(mutex_);
    solver_.layout = {};
    solver_.invalidate();
    members_.forget();
  }

  // words: the row layout, as plan/read.h has it.
  void set_rows(py::handle words) {
    const auto [numbers, count] = words_of(words);
    const Locked locked(mutex_);
    solver_.layout = read_rows(numbers, count, solver_.structure);
    solver_.invalidate();
    members_.forget();
  }

  void jvp(py::handle v, py::handle u) {
    const T* from = pointer<T>(v, P(), "v");
    T* to = pointer<T>(u, M(), "u");
    const Running running = alone();
    solver_.product(from, to);
  }
  void vjp(py::handle u, py::handle v) {
    const T* from = pointer<T>(u, M(), "u");
    T* to = pointer<T>(v, P(), "v");
    const Running running = alone();
    solver_.adjoint_product(from, to);
  }
  void vjps(py::handle U, index K, py::handle V) {
    const T* from = pointer<T>(U, K * M(), "U");
    T* to = pointer<T>(V, K * P(), "V");
    const Running running = alone();
    solver_.adjoint_products(from, K, to);
  }
  void dense(py::handle J) {
    T* to = pointer<T>(J, M() * P(), "J");
    const Running running = alone();
    pgdfast::dense(solver_.program, solver_.layout, solver_.work, to);
  }
  void gram(py::handle weights, py::handle K) {
    require_rows("gram");
    const T* w = pointer<T>(weights, solver_.structure.num_parameter_buffers, "weights");
    T* to = pointer<T>(K, M() * M(), "K");
    const Running running = alone();
    solver_.gram_matrix(w, to);
  }
  void add_normal(py::handle H) {
    T* to = pointer<T>(H, (P() + 1) * gram_stride<T>(P()), "H");
    const Running running = alone();
    solver_.add_normal(to);
  }
  PackedHandle<T> pack() {
    require_rows("pack");
    std::shared_ptr<Packed<T>> packed;
    {
      const Running running = alone();
      packed = pgdfast::pack(solver_.program, solver_.layout, solver_.work);
      solver_.work.unit_cotangents_valid = true;   // products with J^T are likely to follow
    }
    const auto options = at::TensorOptions().dtype(scalar_type<T>);
    T* data = packed->own.get();
    return {packed, at::from_blob(data, {packed->elements}, [packed](void*) {}, options)};
  }
  std::vector<index> gram_order() const {
    require_rows("gram_order");
    return solver_.layout.k_of;
  }
  bool has_rows() const { return solver_.layout.local; }
  void columns(const std::vector<int>& parameters, py::handle J) {
    require_rows("columns");
    std::vector<char> met(std::size_t(solver_.structure.num_parameter_buffers), 0);
    index width = 0;
    for (int l : parameters) {
      if (l < 0 || l >= solver_.structure.num_parameter_buffers || met[std::size_t(l)]++)
        throw py::index_error("no such parameter, or named twice");
      width += solver_.structure.buffers[std::size_t(l)].size;
    }
    T* to = pointer<T>(J, M() * width, "J");
    const Running running = alone();
    solver_.columns(parameters, to);
  }
  void squared(py::handle A, index rows, index columns, bool transposed, py::handle K) {
    const T* from = pointer<T>(A, rows * columns, "A");
    const index n = transposed ? columns : rows;
    T* to = pointer<T>(K, n * n, "K");
    const Running running = alone();
    if (transposed) solver_.squared(from, n, rows, 1, columns, to);
    else solver_.squared(from, n, columns, columns, 1, to);
  }
  void diagonal(py::handle d) {
    T* to = pointer<T>(d, P(), "d");
    const Running running = alone();
    pgdfast::diagonal(solver_.program, solver_.layout, solver_.work, to);
  }
  py::tuple dual(py::handle r, py::handle weights, double shift, py::handle q, py::handle delta) {
    require_rows("dual");
    const T* r_ = pointer<T>(r, M(), "r");
    const T* w_ = pointer<T>(weights, solver_.structure.num_parameter_buffers, "weights");
    const T* q_ = optional_pointer<T>(q, P(), "q");
    T* delta_ = pointer<T>(delta, P(), "delta");
    return solved_by_factor([&] { return solver_.dual(r_, w_, shift, q_, delta_); });
  }
  py::tuple primal(py::handle r, py::handle d, py::handle q, py::handle delta) {
    const T* r_ = pointer<T>(r, M(), "r");
    const T* d_ = pointer<T>(d, P(), "d");
    const T* q_ = optional_pointer<T>(q, P(), "q");
    T* delta_ = pointer<T>(delta, P(), "delta");
    return solved_by_factor([&] { return solver_.primal(r_, d_, q_, delta_); });
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
      const Running running = alone();
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
  // members x P or None; delta: members x P, of which the rows of those listed are written; out: listed x kOutcomeNumbers, double: what
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
  // To be held while the solver works.
  Running alone() {
    if (!bound_) throw py::value_error("pgdfast: the plan has no constants; bind them first");
    return Running(mutex_);
  }
  void place(index member) {
    members_.place(member, solver_.program.constants, own_);
    solver_.invalidate();
  }
  // Behind the numbers of the outcome: the factor, None where there is none.
  template <class F>
  py::tuple solved_by_factor(F&& run) {
    Outcome o;
    std::shared_ptr<Factor<T>> factor;
    {
      const Running running = alone();
      o = run();
      if (o.status == Status::solved) factor = solver_.factor;
    }
    const py::object held = factor ? py::cast(FactorHandle<T>(std::move(factor))) : py::none();
    return py::make_tuple(int(o.status), o.iterations, o.residual_norm, o.gain, o.square, o.trace, o.slack, held);
  }
  template <class F>
  py::tuple solved(F&& run) {
    Outcome outcome;
    {
      const Running running = alone();
      outcome = run();
    }
    return tuple_of(outcome);
  }
  static py::tuple tuple_of(const Outcome& o) {
    return py::make_tuple(int(o.status), o.iterations, o.residual_norm, o.gain, o.square, o.trace, o.slack);
  }
  static constexpr index kNumbers = limits::kOutcomeNumbers;
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
    double* out_ = pointer<double>(out, index(listed.size()) * kNumbers, "out");
    const Running running = alone();
    members_.each(solver_, listed, [&](Solver<T>& solver, index i, index b) {
      const System system{b, r_ + b * M(), mu_[b], scale_ ? scale_ + b * P() : nullptr, q_ ? q_ + b * P() : nullptr,
                          delta_ + b * P()};
      const Outcome o = solve(solver, system);
      const double values[kNumbers] = {double(o.status), double(o.iterations), o.residual_norm, o.gain, o.square, o.trace, o.slack};
      std::copy_n(values, kNumbers, out_ + kNumbers * i);
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
  Solver<T> solver_;
  std::vector<ConstantLayout> layouts_;
  std::vector<std::vector<T>> own_;
  Members<T> members_;
  std::mutex mutex_;
  bool bound_ = false;
};

template <class T>
void bind_plan(py::module_& m, const char* name) {
  using P = Plan<T>;
  py::class_<P>(m, name)
      .def(py::init<py::handle, const std::vector<double>&, const py::list&, const std::vector<int>&>(), py::arg("words"),
           py::arg("alphas"), py::arg("constants"), py::arg("functions"))
      .def("bind", &P::bind, py::arg("constants"), py::arg("row_scale") = py::none())
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
      .def("add_normal", &P::add_normal)
      .def("pack", &P::pack)
      .def("gram_order", &P::gram_order)
      .def_property_readonly("has_rows", &P::has_rows)
      .def("columns", &P::columns)
      .def("squared", &P::squared)
      .def("diagonal", &P::diagonal)
      .def("dual", &P::dual)
      .def("primal", &P::primal)
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
