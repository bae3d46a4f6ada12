#include "walk.h"

#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <string>
#include <typeinfo>

namespace pgdfast {

using torch::autograd::Node;

std::size_t Walker::Hash::operator()(const std::vector<std::int64_t>& key) const {
  std::uint64_t h = 1469598103934665603ull;
  for (const std::int64_t value : key) h = (h ^ std::uint64_t(value)) * 1099511628211ull;
  return std::size_t(h ^ (h >> 32));
}

Walker::Walker(const std::vector<at::Tensor>& params) {
  for (std::size_t i = 0; i < params.size(); ++i)
    parameter_number_[params[i].unsafeGetTensorImpl()] = std::int64_t(i);
}

namespace {

// Whether a hook does anything. Those of Python are a dictionary, which stays, empty, when its last hook is removed; PyTorch
// does not export their types, so only their names tell.
template <class PythonHook, class Hook>
bool acts(const Hook& hook, const char* name) {
  if (!std::strstr(typeid(hook).name(), name)) return false;
  const PyObject* dict = static_cast<const PythonHook&>(hook).dict;
  return dict == nullptr || PyDict_GET_SIZE(dict) > 0;
}
bool acts(const torch::autograd::FunctionPreHook& hook) {
  using namespace torch::autograd;
  if (!std::strstr(typeid(hook).name(), "PyFunction")) return true;   // of C++
  return acts<PyFunctionTensorPreHook>(hook, "PyFunctionTensorPreHook") || acts<PyFunctionPreHook>(hook, "PyFunctionPreHook");
}
bool acts(const torch::autograd::FunctionPostHook& hook) {
  if (!std::strstr(typeid(hook).name(), "PyFunction")) return true;
  return acts<torch::autograd::PyFunctionPostHook>(hook, "PyFunctionPostHook");
}
bool acts(const torch::autograd::PostAccumulateGradHook& hook) {
  if (!std::strstr(typeid(hook).name(), "PyFunction")) return true;
  return acts<torch::autograd::PyFunctionTensorPostAccGradHooks>(hook, "PyFunctionTensorPostAccGradHooks");
}

// Hooks that may change a gradient on its way, unlike retain_grad()'s.
bool has_hooks(Node& node) {
  for (const auto& hook : node.pre_hooks())
    if (acts(*hook)) return true;
  for (const auto& hook : node.tensor_pre_hooks())
    if (acts(*hook)) return true;
  for (const auto& hook : node.post_hooks())
    if (acts(*hook)) return true;
  const auto& accumulated = node.tensor_post_acc_grad_hooks();
  return accumulated != nullptr && acts(*accumulated);
}

// Says which operation a node is. Nodes of user-defined Functions share one C++ type, which PyTorch does not export; they are
// told by the type of their Python object, whatever its name, and by that name, since a type that is gone may leave its address.
void identify(const NodePointer& pointer, std::vector<std::int64_t>& key) {
  const Node& node = *pointer;
  if (!std::strstr(typeid(node).name(), "PyNode")) {
    key.push_back(reinterpret_cast<std::int64_t>(typeid(node).name()));
    return;
  }
  PyObject* object = torch::autograd::functionToPyObject(pointer);
  key.push_back(-3);
  key.push_back(reinterpret_cast<std::int64_t>(Py_TYPE(object)));
  key.push_back(std::int64_t(std::hash<std::string>()(node.name())));
  Py_DECREF(object);
}

}  // namespace

Walker::Walk Walker::walk(const std::vector<at::Tensor>& roots) {
  constexpr std::size_t kKept = 256;   // structures remembered; a closure that never repeats must not leak
  if (known_.size() > kKept) {
    known_.clear();
    wanted_.clear();
    ++generation_;
  }
  order_.clear();
  stack_.clear();
  index_.clear();
  key_.clear();

  std::vector<torch::autograd::Edge> edges;
  edges.reserve(roots.size());
  for (const at::Tensor& root : roots) edges.push_back(torch::autograd::impl::gradient_edge(root));
  for (const auto& edge : edges) stack_.push_back(&edge.function);
  constexpr int kOpen = -1;
  while (!stack_.empty()) {
    const NodePointer* at = stack_.back();
    const Node* node = at->get();
    const auto [found, first] = index_.try_emplace(node, kOpen);
    if (!first && found->second != kOpen) {
      stack_.pop_back();
      continue;
    }
    if (first) {
      const std::size_t before = stack_.size();
      for (const auto& edge : node->next_edges()) {
        if (!edge.is_valid()) continue;
        const auto child = index_.find(edge.function.get());
        if (child == index_.end() || child->second == kOpen) stack_.push_back(&edge.function);
      }
      if (stack_.size() > before) continue;
    }
    index_[node] = int(order_.size());
    order_.push_back(at);
    stack_.pop_back();
  }

  for (const auto& edge : edges) {
    key_.push_back(index_[edge.function.get()]);
    key_.push_back(edge.input_nr);
  }
  Walk result;
  active_.assign(order_.size(), 0);
  for (std::size_t position = 0; position < order_.size(); ++position) {
    Node& node = **order_[position];
    char& active = active_[position];
    if (const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(&node)) {
      const auto number = parameter_number_.find(leaf->variable.unsafeGetTensorImpl());
      active = number != parameter_number_.end();
      key_.push_back(-2);
      key_.push_back(active ? number->second : -1);
    } else {
      identify(*order_[position], key_);
      key_.push_back(std::int64_t(node.num_outputs()));
      for (const auto& edge : node.next_edges()) {
        const int child = edge.is_valid() ? index_[edge.function.get()] : -1;
        active |= child >= 0 && active_[std::size_t(child)];
        key_.push_back(child);
        key_.push_back(edge.input_nr);
      }
      key_.push_back(std::int64_t(node.num_inputs()));
      for (std::uint32_t i = 0; i < node.num_inputs(); ++i) {
        const auto& output = node.input_metadata(i);
        key_.push_back(std::int64_t(c10::typeMetaToScalarType(output.options().dtype())));
        const auto shape = output.shape_as_dim_vector();
        key_.push_back(std::int64_t(shape.size()));
        for (const auto& size : shape) key_.push_back(size.maybe_as_int().value_or(-1));
      }
    }
    if (active && has_hooks(node)) result.hooked.push_back(int(position));
  }
  // Behind all else, and counted: a tape with hooks is another structure than the same tape without.
  key_.push_back(std::int64_t(result.hooked.size()));
  key_.insert(key_.end(), result.hooked.begin(), result.hooked.end());

  const auto [entry, fresh] = known_.try_emplace(key_, next_);
  if (fresh) ++next_;
  result.structure = entry->second;
  const auto wanted = wanted_.find(result.structure);
  result.fresh = fresh || wanted == wanted_.end();
  if (result.fresh) {
    for (const NodePointer* pointer : order_) result.nodes.push_back(*pointer);
  } else {
    for (const int position : wanted->second) result.nodes.push_back(*order_[std::size_t(position)]);
  }
  return result;
}

}  // namespace pgdfast
