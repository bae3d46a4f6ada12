// Many systems of one structure: the members of an ensemble, whose constants lie `shift` elements apart.
#pragma once

#include <functional>
#include <memory>

#include "simd.h"
#include "solve.h"

namespace pgdfast {

template <class T>
class Members {
 public:
  // What a member makes of a constant: a function of it, or a float one in double, over `span` elements.
  struct Source {
    Constant<T> first;                       // of member 0, where it is used as it is
    const T* raw = nullptr;                  // else one of these, to be evaluated
    const float* narrow = nullptr;
    Function function = Function::identity;
  };

  index count = 0;               // 0: no ensemble
  std::vector<index> shifts;     // per constant, elements to the next member's; 0 where they share it
  std::vector<index> spans;      // per constant, elements that one member reads
  std::vector<Source> sources;

  // The constants of member b; what has to be evaluated goes to `own`.
  void place(index b, std::vector<Constant<T>>& constants, std::vector<std::vector<T>>& own) const;

  // body(solver, i, member) for every member listed, each by one thread with a solver of its own; for one member alone with
  // all threads. `model` says what all have in common.
  using Body = std::function<void(Solver<T>&, index, index)>;
  void each(const Solver<T>& model, const std::vector<index>& listed, const Body& body);

  // To be called when the layout of rows changes.
  void forget() { workers_.clear(); }

 private:
  struct Worker {
    Solver<T> solver;
    std::vector<std::vector<T>> own;
  };
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace pgdfast
