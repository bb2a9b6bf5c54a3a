// The kernels for single tokens on AVX-512.
#include "isa.h"
#ifdef LONGVID_X86_VARIANTS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define VARIANT rows_avx512
#define LANES 16
#include "rows.inc"
#endif
