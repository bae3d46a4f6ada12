// Reads a tape whose structure and program are known, in one call: every saved field that the program's rules read is
// fetched and compared with what was seen when the program was recorded, and those that are constants are handed over.
#pragma once

#include <torch/csrc/python_headers.h>

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "walk.h"

namespace pgdfast {

// An owning pointer to a Python object; the GIL is held wherever one lives or dies.
struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

class Replay {
 public:
  // What a field must have in common with the one seen before: a tensor its layout, dtype and device; the number that a
  // one-element tensor holds; or, of anything else, everything.
  enum class Same : int { layout = 0, number = 1, value = 2 };

  // One scaled difference a - b of fields (b = -1: a alone) that is part of the residual.
  struct Block {
    int a, b;
    double scale;
  };

  explicit Replay(at::ScalarType dtype) : dtype_(dtype) {}

  // A `_saved_` field of the node at a place in the list of wanted nodes, with its value seen before. False if that type of
  // node has no such field. Fields of one node follow one another.
  bool add_field(int place, PyObject* node, const std::string& name, Same same, PyObject* seen);

  int num_fields() const { return int(fields_.size()); }

  // The next constant: a window on a field (offset in elements from the field's own); a number; or one left to the caller.
  void add_window(int field, std::vector<std::int64_t> sizes, std::vector<std::int64_t> strides, std::int64_t offset);
  void add_number(double number);
  void add_gap() { constants_.emplace_back(); }

  // How the residual follows: from what the closure returned, from blocks, or (neither) left to the caller.
  void returned_residuals() { loss_ = Loss::returned; }
  void scalar_loss(std::vector<Block> blocks) {
    loss_ = Loss::blocks;
    blocks_ = std::move(blocks);
  }

  struct Reading {
    Object constants;               // a list
    at::Tensor loss, residual;      // undefined where left to the caller
    double value = 0;               // of the loss
  };
  enum class Outcome { same, different, raised };   // raised: the Python error is set

  // nodes: the wanted ones of the walk from `results`. scalar: the closure returned a loss, not residuals.
  Outcome run(const std::vector<NodePointer>& nodes, const std::vector<at::Tensor>& results, bool scalar,
              Reading& reading) const;

 private:
  struct Field {
    int place;
    getter get;
    void* closure;
    Same same;
    Object seen;                    // for Same::value
    double number = 0;
    std::vector<std::int64_t> sizes, strides;
    at::ScalarType dtype = at::kFloat;
    at::Device device = at::kCPU;
    bool matches(PyObject* value) const;
  };
  struct Constant {                 // a window, a number, or neither: a gap
    int field = -1;
    bool whole = false;
    std::vector<std::int64_t> sizes, strides;
    std::int64_t offset = 0;
    Object number;
  };
  enum class Loss { caller, returned, blocks };

  at::Tensor flat(const std::vector<at::Tensor>& parts, const at::Tensor& like) const;

  at::ScalarType dtype_;
  std::vector<Field> fields_;
  std::vector<Constant> constants_;
  Loss loss_ = Loss::caller;
  std::vector<Block> blocks_;
};

}  // namespace pgdfast
