#define PGDFAST_ISA avx512
#define PGDFAST_VECTOR_BYTES 64
#define PGDFAST_TILE_ROWS 8
#include "simd_body.inl"
#include "tiles_body.inl"
