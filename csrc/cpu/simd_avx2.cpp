#define PGDFAST_ISA avx2
#include "simd_body.inl"
