#include "members.h"

#include <algorithm>

#include "../plan/blas.h"
#include "parallel.h"

namespace pgdfast {

template <class T>
void Members<T>::place(index b, std::vector<Constant<T>>& constants, std::vector<std::vector<T>>& own) const {
  constants.resize(sources.size());
  own.resize(sources.size());
  for (std::size_t k = 0; k < sources.size(); ++k) {
    const Source& source = sources[k];
    const index shift = b * shifts[k], span = spans[k];
    constants[k] = source.first;
    if (source.first.data) constants[k].data += shift;
    if (!source.raw && !source.narrow) continue;
    if (index(own[k].size()) < span) own[k].resize(std::size_t(span));
    if (source.raw) simd<T>().evaluate(source.function, span, source.raw + shift, own[k].data());
    else simd<T>().evaluate_float(source.function, span, source.narrow + shift, own[k].data());
    constants[k].data = own[k].data();
  }
}

template <class T>
void Members<T>::each(const Solver<T>& model, const std::vector<index>& listed, const Body& body) {
  const int threads = int(std::min<index>(max_threads.load(), index(listed.size())));
  while (int(workers_.size()) < threads) {
    workers_.push_back(std::make_unique<Worker>());
    Solver<T>& solver = workers_.back()->solver;
    solver.structure = model.structure;
    solver.layout = model.layout;
    solver.program.structure = &solver.structure;
  }
  const auto run = [&](index i, int thread) {
    Worker& worker = *workers_[std::size_t(thread)];
    place(listed[std::size_t(i)], worker.solver.program.constants, worker.own);
    worker.solver.invalidate();
    body(worker.solver, i, listed[std::size_t(i)]);
  };
  if (listed.size() == 1) return run(0, 0);
  each_item(threads, index(listed.size()), [&](index i, int thread) {
    const Alone alone;
    run(i, thread);
  });
}

template class Members<float>;
template class Members<double>;

}  // namespace pgdfast
