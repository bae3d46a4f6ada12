// The module. With bindings_jet.cpp the only file that knows pybind11: unpacks tensors into pointers, checks them, releases the
// GIL.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>

#include <cstdlib>

#include "bindings.h"
#include "blas_torch.h"
#include "cpu/simd.h"
#include "cpu/solve.h"
#include "tape/replay.h"
#include "tape/walk.h"

namespace pgdfast {
namespace {

const char* blas_name = "none";

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
      else if (t.scalar_type() == scalar_type<T> || t.scalar_type() == at::kFloat)
        target = {evaluated(i, t), T(0)};
      else
        return false;
    }
    for (const Instruction& op : solver_.structure.instructions) {
      if (op.kind != Kind::gather) continue;
      const index* positions = solver_.program.constants[std::size_t(op.constant)].positions;
      for (index i = 0; i < op.gather.rows; ++i)
        if (positions[i] < -1 || positions[i] >= op.gather.count) throw py::index_error("a position outside of its tensor");
    }
    return true;
  }

  void clear_rows() {
    solver_.layout = {};
    solver_.invalidate();
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
};

std::vector<at::Tensor> unpack(const py::list& tensors) {
  std::vector<at::Tensor> result;
  for (py::handle item : tensors) {
    if (!THPVariable_Check(item.ptr())) throw py::type_error("expected tensors");
    result.push_back(THPVariable_Unpack(item.ptr()));
  }
  return result;
}

// A walker with the replays of the structures it knows, the one used last first; each with what its user attached to it and
// the places of the nodes that its user asked for.
struct Known {
  std::shared_ptr<const Replay> replay;
  py::object attached;
  std::vector<std::size_t> places;
};
struct Reader : Walker {
  using Walker::Walker;
  std::unordered_map<int, std::vector<Known>> known;
};

py::tuple walk(Reader& reader, const py::list& roots) {
  const Walker::Walk found = reader.walk(unpack(roots));
  py::list nodes(found.nodes.size());
  for (std::size_t i = 0; i < found.nodes.size(); ++i)
    PyList_SET_ITEM(nodes.ptr(), Py_ssize_t(i), torch::autograd::functionToPyObject(found.nodes[i]));
  return py::make_tuple(found.structure, found.fresh, nodes);
}

// (attached, loss, its value, residual or None, constants, nodes asked for) of a closure's result; None if no replay fits it.
py::object read(Reader& reader, const py::object& result) {
  const bool scalar = THPVariable_Check(result.ptr());
  std::vector<at::Tensor> results;
  if (scalar) results.push_back(THPVariable_Unpack(result.ptr()));
  else if (py::isinstance<py::tuple>(result) || py::isinstance<py::list>(result))
    for (py::handle item : result) {
      if (!THPVariable_Check(item.ptr())) return py::none();
      results.push_back(THPVariable_Unpack(item.ptr()));
    }
  const bool loss = scalar && results[0].dim() == 0;
  for (const at::Tensor& t : results)
    if (!t.requires_grad() || !t.is_floating_point() || (t.dim() == 0) != loss) return py::none();
  if (results.empty()) return py::none();
  try {
    const Walker::Walk walk = reader.walk(results);
    const auto found = reader.known.find(walk.structure);
    if (walk.fresh || found == reader.known.end()) return py::none();
    for (Known& known : found->second) {
      Replay::Reading reading;
      const auto outcome = known.replay->run(walk.nodes, results, loss, reading);
      if (outcome == Replay::Outcome::raised) throw py::error_already_set();
      if (outcome == Replay::Outcome::different) continue;
      std::swap(known, found->second.front());
      const Known& used = found->second.front();
      py::list nodes(used.places.size());
      for (std::size_t i = 0; i < used.places.size(); ++i)
        PyList_SET_ITEM(nodes.ptr(), Py_ssize_t(i), torch::autograd::functionToPyObject(walk.nodes.at(used.places[i])));
      const auto tensor = [](const at::Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); };
      return py::make_tuple(used.attached, tensor(reading.loss), reading.value, tensor(reading.residual),
                            py::reinterpret_steal<py::object>(reading.constants.release()), nodes);
    }
    return py::none();
  } catch (const py::error_already_set&) {
    throw;
  } catch (...) {   // PyTorch's own exceptions under their own names
    torch::translate_exception_to_python(std::current_exception());
    throw py::error_already_set();
  }
}

void bind_tapes(py::module_& m) {
  py::class_<Replay, std::shared_ptr<Replay>>(m, "Replay")
      .def(py::init([](bool wide) { return std::make_shared<Replay>(wide ? at::kDouble : at::kFloat); }), py::arg("wide"))
      .def("add_field",
           [](Replay& r, int place, py::handle node, const std::string& name, int same, py::handle seen) {
             const auto kind = static_cast<Replay::Same>(same);
             if (kind != Replay::Same::value && !THPVariable_Check(seen.ptr())) throw py::type_error("expected a tensor");
             if (!r.add_field(place, node.ptr(), name, kind, seen.ptr())) throw py::attribute_error(name);
           })
      .def("add_window", &Replay::add_window)
      .def("add_number", &Replay::add_number)
      .def("add_gap", &Replay::add_gap)
      .def_property_readonly("num_fields", &Replay::num_fields)
      .def("returned_residuals", &Replay::returned_residuals)
      .def("scalar_loss", [](Replay& r, const std::vector<std::tuple<int, int, double>>& blocks) {
        std::vector<Replay::Block> list;
        for (const auto& [a, b, scale] : blocks) list.push_back({a, b, scale});
        r.scalar_loss(std::move(list));
      });
  py::class_<Reader>(m, "Walker")
      .def(py::init([](const py::list& params) { return new Reader(unpack(params)); }))
      .def("walk", &walk)
      .def("want", [](Reader& reader, int structure, std::vector<int> places) { reader.want(structure, std::move(places)); })
      .def("read", &read)
      .def("attach",
           [](Reader& reader, int structure, std::shared_ptr<Replay> replay, py::object attached,
              std::vector<std::size_t> places) {
             reader.known[structure].push_back({std::move(replay), std::move(attached), std::move(places)});
           })
      .def("detach", [](Reader& reader, int structure, py::handle attached) {
        std::erase_if(reader.known[structure], [&](const Known& known) { return known.attached.is(attached); });
      });
}

// theta_l -= rate_l * direction_l for contiguous CPU parameters of one dtype; false, with nothing done, if one is not.
template <class T>
bool subtract(const std::vector<at::Tensor>& params, const std::vector<double>& rates, const at::Tensor& direction) {
  index total = 0;
  for (const at::Tensor& p : params) {
    if (p.scalar_type() != scalar_type<T> || !p.device().is_cpu() || !p.is_contiguous()) return false;
    total += p.numel();
  }
  if (direction.scalar_type() != scalar_type<T> || !direction.is_contiguous() || direction.numel() != total) return false;
  const T* from = direction.const_data_ptr<T>();
  for (std::size_t l = 0; l < params.size(); ++l) {
    const at::Tensor& p = params[l];
    simd<T>().muladd(p.numel(), T(-rates[l]), nullptr, 0, from, 1, p.mutable_data_ptr<T>(), 1, false);
    p.unsafeGetTensorImpl()->bump_version();   // tapes that saved the old values must notice
    from += p.numel();
  }
  return true;
}

template <class T>
void bind_plan(py::module_& m, const char* name) {
  using P = Plan<T>;
  py::class_<P>(m, name)
      .def(py::init<const std::vector<std::pair<int, index>>&, const std::vector<index>&, const py::list&, const py::list&,
                    const std::vector<int>&>(),
           py::arg("buffers"), py::arg("live"), py::arg("instructions"), py::arg("constants"), py::arg("functions"))
      .def("bind", &P::bind)
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
}  // namespace pgdfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pgdfast: plans, sweeps, Gram matrices and solves on the CPU.";
  using namespace pgdfast;
  blas_name = fill_blas(std::getenv("PGDFAST_BLAS"));
  fill_maths();
  bind_jets(m);
  bind_plan<float>(m, "PlanFloat");
  bind_plan<double>(m, "PlanDouble");
  bind_tapes(m);
  m.def("subtract", [](const py::list& params, const std::vector<double>& rates, py::handle direction) {
    if (!THPVariable_Check(direction.ptr())) throw py::type_error("direction must be a tensor");
    const std::vector<at::Tensor> tensors = unpack(params);
    const at::Tensor& d = THPVariable_Unpack(direction.ptr());
    return d.scalar_type() == at::kFloat ? subtract<float>(tensors, rates, d) : subtract<double>(tensors, rates, d);
  });
  m.attr("torch_version") = PGDFAST_TORCH_VERSION;
  m.def("instruction_set", [] { return std::string(simd_name()); });
  m.def("blas", [] { return std::string(blas_name); });
  m.def("select_blas", [](const std::string& name) { return std::string(blas_name = fill_blas(name.c_str())); });
}
