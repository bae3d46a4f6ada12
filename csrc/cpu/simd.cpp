#include "simd.h"

#include "tiles.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "../plan/environment.h"

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

const Variant* best() {
  for (const Variant& variant : variants)
    if (variant.runs_here()) return &variant;
  return nullptr;
}

const Variant* current = best();

}  // namespace

void choose_instruction_set(const char* name) {
  std::string all, here;
  for (const Variant& variant : variants) {
    all += (all.empty() ? "" : ", ") + std::string(variant.name);
    if (variant.runs_here()) here += (here.empty() ? "" : ", ") + std::string(variant.name);
    if (std::strcmp(name, variant.name) != 0) continue;
    if (!variant.runs_here())
      throw std::invalid_argument(std::string("pgdfast: PGDFAST_ISA is '") + name + "', which this processor does not run; use " +
                                  "one of " + here + ".");
    current = &variant;
    return;
  }
  throw unknown_switch("PGDFAST_ISA", name, all);
}

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
