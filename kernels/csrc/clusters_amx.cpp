// The kernels for clusters for AVX-512 with matrix units.
#include "isa.h"
#ifdef LONGVID_AMX
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define VARIANT clusters_amx
#define LANES 16
#define PRODUCT "product_amx.inc"
#include "clusters.inc"
#endif
