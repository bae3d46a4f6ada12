// The part of CUDA that the kernels use, on the CPU, so that every kernel can be tested on a machine without a GPU.
//
// Threads of a block are fibers, which change places at barriers and shuffles; blocks run one after the other. The order of
// both can be turned round or shuffled: results that depend on it are races. Dynamic shared memory is filled with NaN before
// every block, asynchronous copies arrive no earlier than they are waited for, and barriers that not all threads reach at one
// place end the program. Not seen: races within one phase that no order of whole threads shows, alignment, and speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define PGDFAST_NOINLINE
#define __syncthreads() pgdfast::emulate::machine().meet(pgdfast::emulate::At::block, __LINE__)
#define __syncwarp() pgdfast::emulate::machine().meet(pgdfast::emulate::At::warp, __LINE__)
#define PGDFAST_DYNAMIC_SHARED(name) unsigned char* const name = pgdfast::emulate::machine().shared.data()

using std::isfinite;
using std::sqrt;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pgdfast::emulate {

enum class At : char { ready, block, warp, done };
enum class Order : int { forward = 0, backward = 1, shuffled = 2 };

constexpr std::size_t kStack = 96 << 10;

class Machine {
 public:
  Order order = Order::forward;
  std::vector<unsigned char> shared;

  template <class F>
  void run(dim3 grid, dim3 block, std::size_t shared_bytes, F&& kernel) {
    body_ = std::ref(kernel);
    gridDim = grid;
    blockDim = block;
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned number : sequence(blocks)) {
      blockIdx = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
      shared.assign(std::max<std::size_t>(shared_bytes, 16), 0xff);
      run_block(block.x * block.y * block.z);
    }
  }

  void meet(At kind, int place) {
    state_[current_] = kind;
    place_[current_] = place;
    Fiber& fiber = *fibers_[fiber_of_[current_]];
    if (!_setjmp(fiber.at)) _longjmp(scheduler_, 1);
  }

  // What lane `from` of this thread's warp has brought, all lanes meeting here.
  std::uint64_t exchange(std::uint64_t value, unsigned from) {
    slots_[current_] = value;
    meet(At::warp, -1);
    const std::uint64_t found = slots_[current_ / 32 * 32 + from];
    meet(At::warp, -2);
    return found;
  }
  unsigned lane() const { return current_ % 32; }

  struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
  };
  void copy(const Copy& copy) { pending_[current_].push_back(copy); }
  void commit() { pending_[current_].push_back({nullptr, nullptr, 0}); }
  // Carries out all but the last `left` committed groups.
  void wait(int left) {
    std::vector<Copy>& queue = pending_[current_];
    int groups = 0;
    for (const Copy& c : queue) groups += c.to == nullptr;
    std::size_t at = 0;
    for (; groups > left; ++at) {
      if (queue[at].to) std::memcpy(queue[at].to, queue[at].from, queue[at].bytes);
      else --groups;
    }
    queue.erase(queue.begin(), queue.begin() + long(at));
  }

 private:
  struct Fiber {
    ucontext_t context;
    jmp_buf at;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool started = false;
  };

  std::vector<unsigned> sequence(unsigned count) {
    std::vector<unsigned> list(count);
    for (unsigned i = 0; i < count; ++i) list[i] = order == Order::backward ? count - 1 - i : i;
    if (order == Order::shuffled)
      for (unsigned i = count; i > 1; --i) {
        seed_ = seed_ * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(list[i - 1], list[(seed_ >> 33) % i]);
      }
    return list;
  }

  void run_block(unsigned threads) {
    state_.assign(threads, At::ready);
    place_.assign(threads, 0);
    fiber_of_.assign(threads, -1);
    slots_.assign(threads, 0);
    pending_.assign(threads, {});
    for (;;) {
      for (unsigned t : sequence(threads))
        if (state_[t] == At::ready) resume(t);
      bool released = false;
      for (unsigned w = 0; w < threads; w += 32) released |= release(w, std::min(w + 32, threads), At::warp);
      if (!released && !release(0, threads, At::block)) break;
    }
    for (unsigned t = 0; t < threads; ++t)
      if (state_[t] != At::done) fail("some threads wait at a barrier that others never reach");
  }

  // Lets threads go on that all wait for each other; those that have ended are not waited for.
  bool release(unsigned begin, unsigned end, At kind) {
    bool any = false;
    int place = 0;
    for (unsigned t = begin; t < end; ++t) {
      if (state_[t] == At::done) continue;
      if (state_[t] != kind) return false;
      if (any && place_[t] != place) fail("threads of one block or warp meet at barriers of different places");
      place = place_[t];
      any = true;
    }
    for (unsigned t = begin; any && t < end; ++t)
      if (state_[t] == kind) state_[t] = At::ready;
    return any;
  }

  void resume(unsigned t) {
    if (fiber_of_[t] < 0) {
      if (free_.empty()) {
        free_.push_back(int(fibers_.size()));
        fibers_.push_back(std::make_unique<Fiber>());
      }
      fiber_of_[t] = free_.back();
      free_.pop_back();
    }
    current_ = t;
    threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    Fiber& fiber = *fibers_[fiber_of_[t]];
    if (!_setjmp(scheduler_)) {
      if (fiber.started) _longjmp(fiber.at, 1);
      fiber.started = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::enter, 0);
      setcontext(&fiber.context);
    }
    if (state_[current_] == At::done) {
      free_.push_back(fiber_of_[current_]);
      fiber_of_[current_] = -1;
    }
  }

  static void enter();
  void loop() {
    for (;;) {
      body_();
      state_[current_] = At::done;
      Fiber& fiber = *fibers_[fiber_of_[current_]];
      if (!_setjmp(fiber.at)) _longjmp(scheduler_, 1);
    }
  }

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel: %s\n", what);
    std::abort();
  }

  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> free_, fiber_of_, place_;
  std::vector<At> state_;
  std::vector<std::uint64_t> slots_;
  std::vector<std::vector<Copy>> pending_;
  std::uint64_t seed_ = 1;
  unsigned current_ = 0;
  jmp_buf scheduler_;
};

inline Machine& machine() {
  static Machine one;
  return one;
}
inline void Machine::enter() { machine().loop(); }

template <class T>
T exchange(T value, unsigned from) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = machine().exchange(bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace pgdfast::emulate

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return pgdfast::emulate::exchange(value, pgdfast::emulate::machine().lane() ^ unsigned(mask));
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
