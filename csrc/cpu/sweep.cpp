#include "sweep.h"

#include <cstring>

#include "../plan/blas.h"
#include "simd.h"

namespace pgdfast {
namespace {

constexpr index kParallelElements = 1 << 17;   // below this a second thread costs more than it saves

// One muladd with source and target given explicitly, so that the adjoint is the same code with the two exchanged.
template <class T>
void run_muladd(const MulAdd& op, T alpha, const T* c, const index* cs, const T* source, const index* ss, T* target,
                const index* ts, bool overwrite) {
  const Simd<T>& body = simd<T>();
  if (op.ndim == 0) {
    body.muladd(1, alpha, c, 0, source, 0, target, 1, overwrite);
    return;
  }
  const int inner = op.ndim - 1;
  const index n = op.shape[inner];
  index outer = 1;
  for (int d = 0; d < inner; ++d) outer *= op.shape[d];
  auto rows = [&](index begin, index end) {
    for (index i = begin; i < end; ++i) {
      index rest = i, so = 0, to = 0, co = 0;
      for (int d = inner - 1; d >= 0; --d) {
        const index id = rest % op.shape[d];
        rest /= op.shape[d];
        so += id * ss[d];
        to += id * ts[d];
        co += id * cs[d];
      }
      body.muladd(n, alpha, c ? c + co : nullptr, cs[inner], source + so, ss[inner], target + to, ts[inner],
                  overwrite);
    }
  };
#ifdef _OPENMP
  // Rows are independent when the outermost dimension moves the target.
  if (inner > 0 && ts[0] != 0 && outer * n >= kParallelElements && max_threads > 1) {
    const index per = outer / op.shape[0];
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (index i = 0; i < op.shape[0]; ++i) rows(i * per, (i + 1) * per);
    return;
  }
#endif
  rows(0, outer);
}

template <class T>
void run_matmul(const MatMul& g, T alpha, const T* c, const T* x, T* y, bool overwrite) {
  for (index b = 0; b < g.b; ++b)
    gemm<T>(g.m, g.n, g.k, alpha, x + b * g.xb, g.xm, g.xk, c + b * g.cb, g.ck, g.cn, T(overwrite ? 0 : 1),
            y + b * g.yb, g.ym, g.yn);
}

template <class T>
void run_matmul_adjoint(const MatMul& g, T alpha, const T* c, const T* y, T* x, bool overwrite) {
  if (g.n == 1 && g.xk == 1) {   // an outer product, row by row: what a BLAS does slowly
    for (index b = 0; b < g.b; ++b)
      for (index m = 0; m < g.m; ++m)
        simd<T>().muladd(g.k, alpha * y[b * g.yb + m * g.ym], nullptr, 0, c + b * g.cb, g.ck, x + b * g.xb + m * g.xm, 1,
                         overwrite);
    return;
  }
  for (index b = 0; b < g.b; ++b)
    gemm<T>(g.m, g.k, g.n, alpha, y + b * g.yb, g.ym, g.yn, c + b * g.cb, g.cn, g.ck, T(overwrite ? 0 : 1),
            x + b * g.xb, g.xm, g.xk);
}

template <class T>
struct Operands {
  T alpha;
  const T* c;
};

template <class T>
Operands<T> operands(const Bound<T>& program, const Instruction& op) {
  if (op.constant < 0) return {T(op.alpha), nullptr};
  const Constant<T>& constant = program.constants[std::size_t(op.constant)];
  if (constant.data == nullptr) return {T(op.alpha) * constant.value, nullptr};
  return {T(op.alpha), constant.data + op.c_offset};
}

// The three memories a buffer can live in.
template <class T>
struct Memory {
  T *v, *u, *arena;
  T* at(const Buffer& buffer) const {
    T* base = buffer.role == Role::parameter ? v : buffer.role == Role::residual ? u : arena;
    return base + buffer.offset;
  }
};

// Which instructions of the adjoint sweep to run: those that write intermediate results, those that write parameters.
enum class Part { inner, uses, all };

template <class T>
void clear(const Structure& s, const std::vector<char>& marked, const Memory<T>& memory, Part part) {
  for (std::size_t i = 0; i < s.buffers.size(); ++i) {
    if (!marked[i] || part == (s.buffers[i].role == Role::parameter ? Part::inner : Part::uses)) continue;
    std::memset(memory.at(s.buffers[i]), 0, sizeof(T) * std::size_t(s.buffers[i].size));
  }
}

template <class T>
void adjoint(const Bound<T>& program, const Memory<T>& memory, Part part) {
  const Structure& s = *program.structure;
  clear(s, s.zero_adjoint, memory, part);
  BlasThreads threads(threads_for(s.largest));
  for (std::size_t i = s.instructions.size(); i-- > 0;) {
    const Instruction& op = s.instructions[i];
    const Buffer& x = s.buffers[std::size_t(op.x)];
    if (part == (x.role == Role::parameter ? Part::inner : Part::uses)) continue;
    const T* from = memory.at(s.buffers[std::size_t(op.y)]) + op.y_offset;
    T* to = memory.at(x) + op.x_offset;
    const Operands<T> o = operands(program, op);
    if (op.kind == Kind::muladd)
      run_muladd(op.muladd, o.alpha, o.c, op.muladd.cs.data(), from, op.muladd.ys.data(), to, op.muladd.xs.data(),
                 op.overwrite_x);
    else
      run_matmul_adjoint(op.matmul, o.alpha, o.c, from, to, op.overwrite_x);
  }
}

}  // namespace

template <class T>
void jvp(const Bound<T>& program, const T* v, T* u, T* arena) {
  const Structure& s = *program.structure;
  const Memory<T> memory{const_cast<T*>(v), u, arena};   // parameters are only read in this direction
  clear(s, s.zero_forward, memory, Part::inner);
  BlasThreads threads(threads_for(s.largest));
  for (const Instruction& op : s.instructions) {
    const T* from = memory.at(s.buffers[std::size_t(op.x)]) + op.x_offset;
    T* to = memory.at(s.buffers[std::size_t(op.y)]) + op.y_offset;
    const Operands<T> o = operands(program, op);
    if (op.kind == Kind::muladd)
      run_muladd(op.muladd, o.alpha, o.c, op.muladd.cs.data(), from, op.muladd.xs.data(), to, op.muladd.ys.data(),
                 op.overwrite_y);
    else
      run_matmul(op.matmul, o.alpha, o.c, from, to, op.overwrite_y);
  }
}

template <class T>
void vjp(const Bound<T>& program, const T* u, T* v, T* arena) {
  adjoint(program, Memory<T>{v, const_cast<T*>(u), arena}, Part::all);
}

template <class T>
void adjoint_to_uses(const Bound<T>& program, const T* u, T* arena) {
  adjoint(program, Memory<T>{nullptr, const_cast<T*>(u), arena}, Part::inner);
}

template <class T>
void adjoint_from_uses(const Bound<T>& program, T* v, T* arena) {
  adjoint(program, Memory<T>{v, nullptr, arena}, Part::uses);
}

#define PGDFAST_INSTANTIATE(T)                                       \
  template void jvp<T>(const Bound<T>&, const T*, T*, T*);           \
  template void vjp<T>(const Bound<T>&, const T*, T*, T*);           \
  template void adjoint_to_uses<T>(const Bound<T>&, const T*, T*);   \
  template void adjoint_from_uses<T>(const Bound<T>&, T*, T*);
PGDFAST_INSTANTIATE(float)
PGDFAST_INSTANTIATE(double)

}  // namespace pgdfast
