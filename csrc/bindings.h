// What the binding files share: tensors as pointers, and the state in which the core runs.
#pragma once

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <mutex>
#include <string>

#include "plan/blas.h"

namespace pgdfast {

namespace py = pybind11;

template <class T>
constexpr at::ScalarType scalar_type = std::is_same_v<T, float> ? at::kFloat : at::kDouble;

// While the core works: no GIL, as many threads as PyTorch may use at that moment, and alone at what the mutex guards.
struct Running {
  Running() { max_threads = at::get_num_threads(); }
  explicit Running(std::mutex& mutex) : Running() { lock = std::unique_lock(mutex); }
  py::gil_scoped_release release;     // waits for the GIL again when the lock is gone
  std::unique_lock<std::mutex> lock;
};

// The same with the GIL, which whoever holds the mutex may need: it is let go while the mutex is waited for.
struct Locked {
  explicit Locked(std::mutex& mutex) {
    const py::gil_scoped_release release;
    lock = std::unique_lock(mutex);
  }
  std::unique_lock<std::mutex> lock;
};

// A contiguous CPU tensor of T with exactly `count` elements, as a pointer.
template <class T>
T* pointer(py::handle object, index count, const char* name) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error(std::string(name) + " must be a tensor");
  const at::Tensor& t = THPVariable_Unpack(object.ptr());
  if (t.scalar_type() != scalar_type<T> || !t.device().is_cpu() || !t.is_contiguous() || t.numel() != count)
    throw py::value_error(std::string(name) + " must be a contiguous CPU tensor of the plan's dtype with " +
                          std::to_string(count) + " elements, got " + std::to_string(t.numel()) + " of " +
                          c10::toString(t.scalar_type()));
  return t.data_ptr<T>();
}

template <class T>
T* optional_pointer(py::handle object, index count, const char* name) {
  return object.is_none() ? nullptr : pointer<T>(object, count, name);
}

void bind_jets(py::module_& m);
void bind_parts(py::module_& m);
void bind_plans(py::module_& m);
void bind_rules(py::module_& m);

}  // namespace pgdfast
