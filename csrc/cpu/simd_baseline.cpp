#define PGDFAST_ISA baseline
#include "simd_body.inl"
