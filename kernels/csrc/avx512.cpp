// The kernels for AVX-512: 32 registers of 512 bits.
#include "isa.h"
#ifdef LONGVID_X86_VARIANTS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define VARIANT avx512
#define LANES 16
#define ROWS 12
#define VECTORS 2
#define CHUNK 4
#include <immintrin.h>

#include "variant.inc"
#endif
