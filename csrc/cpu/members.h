// Many systems of one structure: the members of an ensemble, whose constants lie `shift` elements apart.
#pragma once

#include <exception>
#include <memory>
#include <mutex>

#include "parallel.h"
#include "solve.h"

namespace pgdfast {

template <class T>
class Members {
 public:
  index count = 0;               // 0: no ensemble
  std::vector<index> shifts;     // per constant, elements to the next member's; 0 where they share it

  // The constants of member b, given those of member 0.
  void place(const std::vector<Constant<T>>& first, index b, std::vector<Constant<T>>& constants) const {
    constants = first;
    for (std::size_t k = 0; k < constants.size(); ++k)
      if (constants[k].data) constants[k].data += b * shifts[k];
  }

  // body(solver, i, member) for every member listed, each by one thread with a solver of its own; for one member alone with
  // all threads. `model` says what all have in common.
  template <class F>
  void each(const Solver<T>& model, const std::vector<Constant<T>>& first, const std::vector<index>& listed, F&& body) {
    const int threads = int(std::min<index>(max_threads, index(listed.size())));
    while (int(workers_.size()) < threads) {
      workers_.push_back(std::make_unique<Solver<T>>());
      workers_.back()->structure = model.structure;
      workers_.back()->layout = model.layout;
      workers_.back()->program.structure = &workers_.back()->structure;
    }
    const auto run = [&](index i, int thread) {
      Solver<T>& solver = *workers_[std::size_t(thread)];
      place(first, listed[std::size_t(i)], solver.program.constants);
      solver.invalidate();
      body(solver, i, listed[std::size_t(i)]);
    };
    if (listed.size() == 1) return run(0, 0);
    std::exception_ptr raised;   // an exception must not leave its thread: out of memory, above all
    std::mutex mutex;
    each_item(threads, index(listed.size()), [&](index i, int thread) {
      const Alone alone;
      try {
        run(i, thread);
      } catch (...) {
        const std::lock_guard guard(mutex);
        raised = std::current_exception();
      }
    });
    if (raised) std::rethrow_exception(raised);
  }

  // To be called when the layout of rows changes.
  void forget() { workers_.clear(); }

 private:
  std::vector<std::unique_ptr<Solver<T>>> workers_;
};

}  // namespace pgdfast
