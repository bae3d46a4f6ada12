// Recognizes the structure of an autograd tape: which operations, on which shapes and dtypes, joined how,
// over which parameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace pgdfast {

// An owning pointer to a node, of whichever kind this PyTorch uses.
using NodePointer = decltype(torch::autograd::Edge::function);

class Walker {
 public:
  explicit Walker(const std::vector<at::Tensor>& params);

  struct Walk {
    int structure;                      // number of the structure
    bool fresh;                         // not seen before: `nodes` holds all nodes, else the wanted ones
    std::vector<NodePointer> nodes;     // inputs before users
    std::vector<int> hooked;            // positions of active nodes with hooks that may change a gradient
  };
  // Walks from the tensors' gradient edges down to the leaves.
  Walk walk(const std::vector<at::Tensor>& roots);

  // From now on, walks of this structure hand over the nodes at these positions only.
  void want(int structure, std::vector<int> positions) { wanted_[structure] = std::move(positions); }

  // How often all structures have been forgotten; what others keep by a structure's number is worthless when this has changed.
  int generation() const { return generation_; }

 private:
  struct Hash {
    std::size_t operator()(const std::vector<std::int64_t>& key) const;
  };
  std::unordered_map<const void*, std::int64_t> parameter_number_;   // by TensorImpl
  std::unordered_map<std::vector<std::int64_t>, int, Hash> known_;
  std::unordered_map<int, std::vector<int>> wanted_;
  int next_ = 0, generation_ = 0;
  // Kept between walks for their memory.
  std::vector<std::int64_t> key_;
  std::vector<const NodePointer*> order_, stack_;
  std::vector<char> active_;   // per node of order_: does a parameter reach it
  std::unordered_map<const torch::autograd::Node*, int> index_;
};

}  // namespace pgdfast
