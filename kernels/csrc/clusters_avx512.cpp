// The kernels for clusters for AVX-512.
#include "isa.h"
#ifdef LONGVID_X86_VARIANTS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define VARIANT clusters_avx512
#define LANES 16
#define ROWS 8
#define VECTORS 2
#define PRODUCT "product.inc"
#include "clusters.inc"
#endif
