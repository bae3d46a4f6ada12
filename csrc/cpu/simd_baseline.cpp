#define PGDFAST_ISA baseline
#define PGDFAST_VECTOR_BYTES 16
#define PGDFAST_TILE_ROWS 4
#include "simd_body.inl"
#include "tiles_body.inl"
