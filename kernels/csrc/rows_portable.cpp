// The kernels for single tokens on any processor.
#define VARIANT rows_portable
#define LANES 4
#include "rows.inc"
