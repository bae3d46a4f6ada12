#define PGDFAST_ISA avx2
#define PGDFAST_VECTOR_BYTES 32
#define PGDFAST_TILE_ROWS 4
#include "simd_body.inl"
#include "tiles_body.inl"
