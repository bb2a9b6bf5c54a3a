// The kernels for clusters on any processor.
#define VARIANT clusters_portable
#define LANES 4
#define ROWS 4
#define VECTORS 2
#define PRODUCT "product.inc"
#include "clusters.inc"
