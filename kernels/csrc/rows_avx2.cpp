// The kernels for single tokens on AVX2.
#include "isa.h"
#ifdef LONGVID_X86_VARIANTS
#pragma GCC target("avx2,fma")
#define VARIANT rows_avx2
#define LANES 8
#include "rows.inc"
#endif
