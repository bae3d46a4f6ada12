#include "parallel.h"

#include <new>

namespace pgdfast {

void fail_in_parallel(const std::string& kind, int threads, index failing) {
  constexpr index kCount = 64;
  max_threads = threads;
  const auto at = [&](index number) {
    if (number == failing) throw std::bad_alloc();
  };
  if (kind == "items") return each_item(threads, kCount, [&](index item, int) { at(item); });
  if (kind == "parts") return in_parts(kCount, true, [&](index begin, index end) { at(begin <= failing && failing < end ? failing : -1); });
  if (kind == "steps") return in_steps(threads, kCount, [&](index step, int thread) { at(thread == threads - 1 ? step : -1); });
  throw std::invalid_argument("fail_in_parallel: kind is '" + kind + "'; it must be items, parts or steps.");
}

}  // namespace pgdfast
