// The kernels for AVX2 with FMA: 16 registers of 256 bits.
#include "isa.h"
#ifdef LONGVID_X86_VARIANTS
#pragma GCC target("avx2,fma")
#define VARIANT avx2
#define LANES 8
#define ROWS 6
#define VECTORS 2
#define CHUNK 8
#include <immintrin.h>

#include "variant.inc"
#endif
