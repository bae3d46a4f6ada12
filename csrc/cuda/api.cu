// The C interface that pgdfast/kernels/cuda_library.py loads: plans by handle, memory and streams by number. Every function
// that can fail returns 0, or 1 with the reason in pgdfast_cuda_error().
#include <algorithm>
#include <memory>

#include "cg.h"
#include "handle.h"

namespace pgdfast::cuda {
namespace {

template <class T>
__global__ void one_at(index i, T* u) {
  u[i] = T(1);
}

template <class T>
void unit_sweeps(Plan& plan, const index* output_of, T* arenas, T* u, T* scratch, Stream stream) {
  for (index o = 0; o < plan.layout.max_outputs; ++o) {
    unit(output_of, o, plan.s.num_residuals, u, stream);
    run(plan.bound<T>(), plan.inner, Direction::adjoint, Memory<T>{nullptr, u, arenas + o * plan.s.arena_size, scratch},
        stream);
  }
}

}  // namespace

PGDFAST_API const char* pgdfast_cuda_error() { return message.c_str(); }

// Null, or why the library of this name is of no use as cuBLAS.
PGDFAST_API const char* pgdfast_cuda_load_blas(const char* library) { return load_blas(library); }

// The device of the calls that follow on this thread: this library's runtime does not know of PyTorch's choice.
PGDFAST_API int pgdfast_cuda_set_device([[maybe_unused]] int device) {
#ifdef PGDFAST_EMULATE
  return 0;
#else
  return guarded([&] { check(cudaSetDevice(device), "choosing the device"); });
#endif
}

PGDFAST_API void* pgdfast_cuda_new(int wide, const index* words, index count, const double* alphas, index num_alphas) {
  auto plan = std::make_unique<Plan>();
  const int failed = guarded([&] {
    plan->wide = wide != 0;
    plan->s = read_program(words, count, alphas, num_alphas);
    plan->forward = schedule(plan->s, Direction::forward);
    plan->adjoint = schedule(plan->s, Direction::adjoint);
    plan->inner = schedule(plan->s, Direction::adjoint, Part::inner);
  });
  return failed ? nullptr : plan.release();
}
PGDFAST_API void pgdfast_cuda_free(void* plan) { delete static_cast<Plan*>(plan); }

// 0 residuals, 1 parameters, 2 arena, 3 scratch, 4 parameter buffers, 5 elements of the Gram matrix's packed memory, 6 its tile,
// 7 place of output_of in the Gram table, 8 in the dense one; tables first.
PGDFAST_API index pgdfast_cuda_info(void* handle, int what) {
  const Plan& plan = *static_cast<Plan*>(handle);
  const index values[] = {plan.s.num_residuals, plan.s.num_parameters, plan.s.arena_size, plan.scratch(),
                          plan.s.num_parameter_buffers, plan.gram.packed, plan.gram.tile, plan.gram_outputs,
                          plan.dense_outputs};
  return values[what];
}
PGDFAST_API double pgdfast_cuda_flops(void* plan) { return static_cast<Plan*>(plan)->s.flops; }

// Constants: per item a pointer to numbers of the plan's type or to positions, or null and a value.
PGDFAST_API int pgdfast_cuda_bind(void* handle, index count, const void* const* data, const char* positions,
                                  const double* values) {
  Plan* plan = static_cast<Plan*>(handle);
  return with(plan, [&](auto zero) {
    using T = decltype(zero);
    auto& constants = plan->bound<T>().constants;
    constants.resize(std::size_t(count));
    for (index i = 0; i < count; ++i) {
      if (positions[i]) constants[std::size_t(i)] = {nullptr, T(0), static_cast<const index*>(data[i])};
      else constants[std::size_t(i)] = {static_cast<const T*>(data[i]), T(values[i])};
    }
  });
}

PGDFAST_API int pgdfast_cuda_evaluate(int wide, int function, index count, const void* x, int x_is_float, void* out,
                                      Stream stream) {
  return guarded([&] {
    if (wide) evaluate(function, count, x, x_is_float != 0, static_cast<double*>(out), stream);
    else evaluate(function, count, x, true, static_cast<float*>(out), stream);
  });
}

PGDFAST_API int pgdfast_cuda_jvp(void* handle, const void* v, void* u, void* arena, void* scratch, Stream stream) {
  Plan* plan = static_cast<Plan*>(handle);
  return with(plan, [&](auto zero) {
    using T = decltype(zero);
    run(plan->bound<T>(), plan->forward, Direction::forward,
        Memory<T>{static_cast<T*>(const_cast<void*>(v)), static_cast<T*>(u), static_cast<T*>(arena), static_cast<T*>(scratch)},
        stream);
  });
}
PGDFAST_API int pgdfast_cuda_vjp(void* handle, const void* u, void* v, void* arena, void* scratch, Stream stream) {
  Plan* plan = static_cast<Plan*>(handle);
  return with(plan, [&](auto zero) {
    using T = decltype(zero);
    run(plan->bound<T>(), plan->adjoint, Direction::adjoint,
        Memory<T>{static_cast<T*>(v), static_cast<T*>(const_cast<void*>(u)), static_cast<T*>(arena), static_cast<T*>(scratch)},
        stream);
  });
}

// No words: the program has no row structure.
PGDFAST_API int pgdfast_cuda_set_rows(void* handle, const index* words, index count) {
  Plan* plan = static_cast<Plan*>(handle);
  return guarded([&] {
    plan->layout = count > 0 ? read_rows(words, count, plan->s) : RowLayout{};
    plan->gram_planned = plan->dense_planned = plan->ensemble_planned = false;
  });
}

// The table of the Gram matrix (kind 0), of J (1) or of an ensemble (2), to be copied to the GPU: its length; its numbers where `out` is given. -1:
// there is none.
PGDFAST_API index pgdfast_cuda_table(void* handle, int kind, index* out) {
  index size = -1;
  guarded([&] {
    const std::vector<index>& table = static_cast<Plan*>(handle)->table(kind);
    if (out) std::copy(table.begin(), table.end(), out);
    size = index(table.size());
  });
  return size;
}

// arenas: one per output; output_of on the device; u: M.
PGDFAST_API int pgdfast_cuda_unit_sweeps(void* handle, const index* output_of, void* arenas, void* u, void* scratch,
                                         Stream stream) {
  Plan* plan = static_cast<Plan*>(handle);
  return with(plan, [&](auto zero) {
    using T = decltype(zero);
    unit_sweeps(*plan, output_of, static_cast<T*>(arenas), static_cast<T*>(u), static_cast<T*>(scratch), stream);
  });
}

PGDFAST_API int pgdfast_cuda_gram(void* handle, const index* table, const void* arenas, const void* weights, void* packed,
                                  void* K, Stream stream) {
  Plan* plan = static_cast<Plan*>(handle);
  return with(plan, [&](auto zero) {
    using T = decltype(zero);
    gram(plan->bound<T>(), plan->layout, plan->gram, table, static_cast<const T*>(arenas), static_cast<const T*>(weights),
         static_cast<T*>(packed), static_cast<T*>(K), stream);
  });
}

// J after unit sweeps; without a row structure (table null) one adjoint sweep per residual.
PGDFAST_API int pgdfast_cuda_dense(void* handle, const index* table, void* arenas, void* u, void* scratch, void* J,
                                   Stream stream) {
  Plan* plan = static_cast<Plan*>(handle);
  return with(plan, [&](auto zero) {
    using T = decltype(zero);
    if (table)
      return dense_rows(plan->bound<T>(), plan->layout, plan->dense, table, static_cast<const T*>(arenas), static_cast<T*>(J),
                        stream);
    const index M = plan->s.num_residuals, P = plan->s.num_parameters;
    for (index i = 0; i < M; ++i) {
      clear(u, sizeof(T) * std::size_t(M), stream);
      launch(one_at<T>, 1u, 1u, 0, stream, i, static_cast<T*>(u));
      run(plan->bound<T>(), plan->adjoint, Direction::adjoint,
          Memory<T>{static_cast<T*>(J) + i * P, static_cast<T*>(u), static_cast<T*>(arenas), static_cast<T*>(scratch)}, stream);
    }
  });
}

PGDFAST_API int pgdfast_cuda_squares(int wide, index rows, index columns, const void* J, void* d, Stream stream) {
  return guarded([&] {
    if (wide) squares(rows, columns, static_cast<const double*>(J), static_cast<double*>(d), stream);
    else squares(rows, columns, static_cast<const float*>(J), static_cast<float*>(d), stream);
  });
}

// out[m, n] = left[m, k] right[k, n] by the BLAS in the full precision of the type, whatever PyTorch's own products use.
// shape: m, n, k; strides: row and column of left, right, out.
PGDFAST_API int pgdfast_cuda_product(int wide, const index* shape, const index* strides, const void* left, const void* right,
                                     void* out, Stream stream) {
  return guarded([&] {
    Product p;
    p.m = shape[0], p.n = shape[1], p.k = shape[2];
    p.left = {0, 0, strides[0], strides[1]};
    p.right = {0, 0, strides[2], strides[3]};
    p.out = {0, 0, strides[4], strides[5]};
    if (!fits_blas(p)) throw std::runtime_error("a matrix whose rows and columns are both strided");
    if (wide)
      blas_product(p, 1.0, static_cast<const double*>(left), static_cast<const double*>(right), static_cast<double*>(out), true,
                   stream);
    else
      blas_product(p, 1.0f, static_cast<const float*>(left), static_cast<const float*>(right), static_cast<float*>(out), true,
                   stream);
  });
}

PGDFAST_API index pgdfast_cuda_cg_vectors(index P, index M, index rank) { return cg_vectors(P, M, rank); }
PGDFAST_API index pgdfast_cuda_cg_scalars(int iterations) { return cg_scalars(iterations); }

// pointers: r, d, q, inverse, V, c, start, path, delta, work, scalars, report, ended, arena, scratch (cg.h). counts: rank, slots,
// max_iterations. limits: tolerance, absolute, progress.
PGDFAST_API int pgdfast_cuda_cg(void* handle, void* const* pointers, const index* counts, const double* limits, Stream stream) {
  Plan* plan = static_cast<Plan*>(handle);
  return with(plan, [&](auto zero) {
    using T = decltype(zero);
    const auto p = [&](int i) { return static_cast<T*>(pointers[i]); };
    const CGProblem<T> problem{p(0), p(1), p(2), p(3), p(4), p(5), counts[0], p(6), p(7), counts[1], int(counts[2]), limits[0],
                               limits[1], limits[2], p(8), p(9), static_cast<double*>(pointers[10]),
                               static_cast<double*>(pointers[11]), static_cast<volatile int*>(pointers[12])};
    cg(plan->bound<T>(), plan->forward, plan->adjoint, p(13), p(14), problem, stream);
  });
}

// What a sweep launches, for tests: per launch its task, instruction (buffer, for a clear; -1 for a chain), links, splits,
// whether it overwrites; then per link its instruction and 1 from a register + 2 same target. direction: 0 forward, 1 adjoint,
// 2 adjoint without the uses of parameters. The number of words; at most `room` are written.
PGDFAST_API index pgdfast_cuda_schedule(void* handle, int direction, index* out, index room) {
  const Plan& plan = *static_cast<Plan*>(handle);
  const Schedule& found = direction == 0 ? plan.forward : direction == 1 ? plan.adjoint : plan.inner;
  std::vector<index> words;
  for (const Launch& l : found.launches) {
    const index what = l.task == Task::clear ? l.buffer : l.instruction;
    words.insert(words.end(), {index(l.task), what, index(l.links.size()), l.splits, index(l.overwrite)});
    for (const Link& link : l.links) words.insert(words.end(), {link.instruction, link.from_register + 2 * link.same_target});
  }
  std::copy_n(words.begin(), std::min(index(words.size()), room), out);
  return index(words.size());
}
PGDFAST_API int pgdfast_cuda_gram_tile(index order, int wide, int multiprocessors) {
  return gram_tile(order, wide != 0, multiprocessors);
}

// "emulated", or the architectures that were compiled.
PGDFAST_API const char* pgdfast_cuda_built_for() {
#ifdef PGDFAST_EMULATE
  return "emulated";
#else
  return PGDFAST_CUDA_ARCHITECTURES;
#endif
}

#ifdef PGDFAST_EMULATE
// 0 threads and blocks in their order, 1 backwards, 2 shuffled.
PGDFAST_API void pgdfast_cuda_order(int order) {
  emulate::machine().order = static_cast<emulate::Order>(order);
}
#endif

}  // namespace pgdfast::cuda
