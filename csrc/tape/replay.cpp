#include "replay.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>

namespace pgdfast {

bool Replay::add_field(int place, PyObject* node, const std::string& name, Same same, PyObject* seen) {
  // Generated node types hold their fields as getset descriptors; calling one directly saves the attribute lookup.
  PyObject* descriptor = PyDict_GetItemString(Py_TYPE(node)->tp_dict, name.c_str());
  if (!descriptor || !Py_IS_TYPE(descriptor, &PyGetSetDescr_Type)) return false;
  const PyGetSetDef* definition = reinterpret_cast<PyGetSetDescrObject*>(descriptor)->d_getset;
  Field field{place, definition->get, definition->closure, same, nullptr};
  if (same == Same::value) {
    Py_INCREF(seen);
    field.seen.reset(seen);
  } else {
    const at::Tensor& t = THPVariable_Unpack(seen);
    field.sizes = t.sizes().vec();
    field.strides = t.strides().vec();
    field.dtype = t.scalar_type();
    field.device = t.device();
    if (same == Same::number) field.number = t.item().toDouble();
  }
  fields_.push_back(std::move(field));
  return true;
}

void Replay::add_window(int field, std::vector<std::int64_t> sizes, std::vector<std::int64_t> strides, std::int64_t offset) {
  Constant& c = constants_.emplace_back();
  c.whole = sizes == fields_[std::size_t(field)].sizes && strides == fields_[std::size_t(field)].strides && offset == 0;
  c.field = field;
  c.sizes = std::move(sizes);
  c.strides = std::move(strides);
  c.offset = offset;
}

void Replay::add_number(double number) { constants_.emplace_back().number.reset(PyFloat_FromDouble(number)); }

bool Replay::Field::matches(PyObject* value) const {
  if (same == Same::value) {
    PyObject* before = seen.get();
    return value == before || (Py_TYPE(value) == Py_TYPE(before) && PyObject_RichCompareBool(value, before, Py_EQ) == 1);
  }
  if (!THPVariable_Check(value)) return false;
  const at::Tensor& t = THPVariable_Unpack(value);
  return t.scalar_type() == dtype && t.device() == device && t.layout() == at::kStrided &&
         !t.is_neg() && !t.is_conj() && !t._is_zerotensor() &&   // what its memory holds is what it says
         t.sizes() == at::IntArrayRef(sizes) && t.strides() == at::IntArrayRef(strides) &&
         (same == Same::layout || t.item().toDouble() == number);
}

Replay::Outcome Replay::run(const std::vector<NodePointer>& nodes, const std::vector<at::Tensor>& results, bool scalar,
                            Reading& reading) const {
  if (scalar == (loss_ == Loss::returned)) return Outcome::different;
  const at::NoGradGuard no_grad;
  std::vector<Object> values(fields_.size());
  Object node;
  for (std::size_t i = 0; i < fields_.size(); ++i) {
    const Field& field = fields_[i];
    if (i == 0 || field.place != fields_[i - 1].place)
      node.reset(torch::autograd::functionToPyObject(nodes[std::size_t(field.place)]));
    values[i].reset(field.get(node.get(), field.closure));
    if (!values[i]) return Outcome::raised;
    if (!field.matches(values[i].get())) {
      PyErr_Clear();   // a comparison that raised is a difference
      return Outcome::different;
    }
  }
  const auto tensor = [&](int field) -> const at::Tensor& { return THPVariable_Unpack(values[std::size_t(field)].get()); };

  if (loss_ == Loss::returned) {
    std::vector<at::Tensor> parts;
    for (const at::Tensor& r : results) parts.push_back(r.detach());
    reading.residual = flat(parts, results[0]);
    reading.loss = reading.residual.dot(reading.residual).mul(0.5);
  } else {
    reading.loss = results[0].detach();
  }
  if (loss_ == Loss::blocks) {
    std::vector<at::Tensor> parts;
    for (const Block& block : blocks_)
      parts.push_back(block.b < 0 ? tensor(block.a).mul(block.scale) : tensor(block.a).sub(tensor(block.b)).mul_(block.scale));
    reading.residual = flat(parts, results[0]);
  }
  reading.value = reading.loss.item().toDouble();

  reading.constants.reset(PyList_New(Py_ssize_t(constants_.size())));
  if (!reading.constants) return Outcome::raised;
  for (std::size_t i = 0; i < constants_.size(); ++i) {
    const Constant& c = constants_[i];
    PyObject* object = c.number ? c.number.get() : c.whole ? values[std::size_t(c.field)].get() : Py_None;
    if (c.field >= 0 && !c.whole) {
      const at::Tensor& t = tensor(c.field);
      object = THPVariable_Wrap(t.as_strided(c.sizes, c.strides, t.storage_offset() + c.offset));
      if (!object) return Outcome::raised;
    } else {
      Py_INCREF(object);
    }
    PyList_SET_ITEM(reading.constants.get(), Py_ssize_t(i), object);
  }
  return Outcome::same;
}

// (M,), contiguous, of the program's dtype.
at::Tensor Replay::flat(const std::vector<at::Tensor>& parts, const at::Tensor& like) const {
  if (parts.size() == 1) return parts[0].reshape(-1).to(dtype_).contiguous();
  if (parts.empty()) return at::empty({0}, like.options().dtype(dtype_));
  std::vector<at::Tensor> rows;
  for (const at::Tensor& part : parts) rows.push_back(part.reshape(-1).to(dtype_));
  return at::cat(rows);
}

}  // namespace pgdfast
