// The kernels for any processor: vectors of 128 bits.
#define VARIANT portable
#define LANES 4
#define ROWS 4
#define VECTORS 2
#define CHUNK 16
#include "variant.inc"
