#include "simd.h"

#include "tiles.h"

#include <cstdlib>
#include <cstring>

namespace pgdfast {

#define PGDFAST_DECLARE(isa)                  \
  const Simd<float>* simd_float_##isa();      \
  const Simd<double>* simd_double_##isa();    \
  const Tiles<float>* tiles_float_##isa();    \
  const Tiles<double>* tiles_double_##isa();
PGDFAST_DECLARE(baseline)
#ifdef PGDFAST_X86
PGDFAST_DECLARE(avx2)
PGDFAST_DECLARE(avx512)
#endif

namespace {

struct Variant {
  const char* name;
  bool (*runs_here)();
  const Simd<float>* (*table_float)();
  const Simd<double>* (*table_double)();
  const Tiles<float>* (*tiles_float)();
  const Tiles<double>* (*tiles_double)();
};

// Best first.
const Variant variants[] = {
#ifdef PGDFAST_X86
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     },
     simd_float_avx512, simd_double_avx512, tiles_float_avx512, tiles_double_avx512},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, simd_float_avx2,
     simd_double_avx2, tiles_float_avx2, tiles_double_avx2},
#endif
    {"baseline", [] { return true; }, simd_float_baseline, simd_double_baseline, tiles_float_baseline, tiles_double_baseline},
};

const Variant* find(const char* name) {
  for (const Variant& variant : variants)
    if ((name == nullptr || std::strcmp(name, variant.name) == 0) && variant.runs_here()) return &variant;
  return nullptr;
}

const Variant* start() {
  const Variant* forced = find(std::getenv("PGDFAST_ISA"));
  return forced ? forced : find(nullptr);
}

const Variant* const current = start();

}  // namespace

template <>
const Simd<float>& simd<float>() {
  return *current->table_float();
}
template <>
const Simd<double>& simd<double>() {
  return *current->table_double();
}

template <>
const Tiles<float>& tiles<float>() {
  return *current->tiles_float();
}
template <>
const Tiles<double>& tiles<double>() {
  return *current->tiles_double();
}

const char* simd_name() { return current->name; }

}  // namespace pgdfast
