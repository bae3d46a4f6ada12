#define PGDFAST_ISA avx512
#include "simd_body.inl"
