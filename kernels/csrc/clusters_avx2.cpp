// The kernels for clusters for AVX2 with FMA.
#include "isa.h"
#ifdef LONGVID_X86_VARIANTS
#pragma GCC target("avx2,fma")
#define VARIANT clusters_avx2
#define LANES 8
#define ROWS 4
#define VECTORS 2
#define PRODUCT "product.inc"
#include "clusters.inc"
#endif
