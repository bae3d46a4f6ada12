// The module, and tapes in Python. Only the binding files know pybind11: they unpack tensors into pointers, check them and
// release the GIL.
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "bindings.h"
#include "blas_torch.h"
#include "cpu/simd.h"
#include "plan/environment.h"
#include "tape/replay.h"
#include "tape/walk.h"

namespace pgdfast {
namespace {

const char* blas_name = "none";

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

  // A walk; what is known of structures goes with these.
  Walk walk(const std::vector<at::Tensor>& roots) {
    const int before = generation();
    Walk found = Walker::walk(roots);
    if (generation() != before) known.clear();
    return found;
  }
};

// (number of the structure, is it new, nodes, positions of active nodes with hooks).
py::tuple walk(Reader& reader, const py::list& roots) {
  const Walker::Walk found = reader.walk(unpack(roots));
  py::list nodes(found.nodes.size());
  for (std::size_t i = 0; i < found.nodes.size(); ++i)
    PyList_SET_ITEM(nodes.ptr(), Py_ssize_t(i), torch::autograd::functionToPyObject(found.nodes[i]));
  return py::make_tuple(found.structure, found.fresh, nodes, found.hooked);
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
    if (walk.fresh || !walk.hooked.empty() || found == reader.known.end()) return py::none();
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
        const auto found = reader.known.find(structure);
        if (found == reader.known.end()) return;   // forgotten with its generation
        std::erase_if(found->second, [&](const Known& known) { return known.attached.is(attached); });
      })
      .def_property_readonly("generation", &Reader::generation);
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

// Contiguous CPU tensors copied one by one; false, with nothing done, where a pair differs in dtype or size or is not such.
bool copy_tensors(const py::list& to, const py::list& from) {
  const Py_ssize_t count = PyList_GET_SIZE(to.ptr());
  if (PyList_GET_SIZE(from.ptr()) != count) return false;
  const auto tensor = [](const py::list& list, Py_ssize_t i) -> const at::Tensor& {
    PyObject* item = PyList_GET_ITEM(list.ptr(), i);
    if (!THPVariable_Check(item)) throw py::type_error("expected tensors");
    return THPVariable_Unpack(item);
  };
  const auto plain = [](const at::Tensor& t) {
    return t.device().is_cpu() && t.layout() == at::kStrided && t.is_contiguous() && !t.is_neg() && !t.is_conj() && t.has_storage();
  };
  for (Py_ssize_t i = 0; i < count; ++i) {
    const at::Tensor &a = tensor(to, i), &b = tensor(from, i);
    if (!plain(a) || !plain(b) || a.is_inference() || a.scalar_type() != b.scalar_type() || a.numel() != b.numel()) return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    const at::Tensor &a = tensor(to, i), &b = tensor(from, i);
    if (a.numel() > 0) std::memmove(a.mutable_data_ptr(), b.const_data_ptr(), a.nbytes());
    a.unsafeGetTensorImpl()->bump_version();
  }
  return true;
}

}  // namespace
}  // namespace pgdfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pgdfast: plans, sweeps, Gram matrices and solves on the CPU.";
  using namespace pgdfast;
  blas_name = fill_blas(nullptr);
  fill_maths();
  bind_jets(m);
  bind_parts(m);
  bind_plans(m);
  bind_rules(m);
  bind_tapes(m);
  m.def("subtract", [](const py::list& params, const std::vector<double>& rates, py::handle direction) {
    if (!THPVariable_Check(direction.ptr())) throw py::type_error("direction must be a tensor");
    const std::vector<at::Tensor> tensors = unpack(params);
    const at::Tensor& d = THPVariable_Unpack(direction.ptr());
    return d.scalar_type() == at::kFloat ? subtract<float>(tensors, rates, d) : subtract<double>(tensors, rates, d);
  });
  m.def("copy_tensors", &copy_tensors);
  m.def("configure", [] {
    if (const char* name = std::getenv("PGDFAST_ISA")) choose_instruction_set(name);
    if (const char* name = std::getenv("PGDFAST_BLAS")) blas_name = fill_blas(name);
    number_from_environment("PGDFAST_PASS_BYTES", 0);
  }, "Takes the switches from the environment; raises ValueError for a value that is not known.");
  m.attr("torch_version") = PGDFAST_TORCH_VERSION;
  m.def("instruction_set", [] { return std::string(simd_name()); });
  m.def("blas_threads", [](int count) { return set_blas_threads ? set_blas_threads(count) : 0; },
        "Sets the threads of BLAS and LAPACK calls made by this thread, 0 for the default; returns what was set before.");
  m.def("blas", [] { return std::string(blas_name); });
  m.def("select_blas", [](const std::string& name) { return std::string(blas_name = fill_blas(name.c_str())); });
}
