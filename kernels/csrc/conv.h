// What the entry point (conv.cpp) and the kernel (conv_amx.cpp) of convolutions share.
#pragma once

#include <cstdint>

#include "rows.h"

namespace longvid {

constexpr int MAX_GROUPS = 4;

// A convolution with strides of one over frames, rows and columns, all tensors channels last and rows of memory dense.
// Its outputs come in groups, each with its own place in the result and its own corner: the row and column, beside the
// output's, of the first tap. A corner is -1 or 0.
//
// What it reads are `depth = taps[0] - 1` frames of the past, which are taken as they are, then `frames` of x, through
// norm (x / |x| over the channels) and SiLU if there is a gain.
struct ConvArgs {
    const void *x;  // [frames, source_rows, columns, channels]
    const void *past;  // [depth, source_rows, columns, channels]; null: zeros
    const void *above, *below;  // [depth + frames, columns, channels], around the source's rows; null: zeros
    void *kept;  // [depth, rows, columns, channels]: the last frames that were read; null: not wanted
    const float *gain;  // [channels, then zeros up to a multiple of 32]; null: no norm and no SiLU
    const uint16_t *weight;  // right-hand tiles [groups, sixteens of outputs, taps 0, 1, chunks, taps 2, parts]
    const float *bias;  // [groups, outputs up to a multiple of 16]
    const void *residual;  // [frames / residual_times, rows, columns, outputs], added; null: none
    void *out;
    int64_t out_frame, out_row, out_pixel, out_group[MAX_GROUPS];  // strides and places, in elements
    int32_t first_row[MAX_GROUPS], first_column[MAX_GROUPS];  // corners
    int32_t taps[3];
    int32_t frames, rows, columns, channels, groups, outputs;
    int32_t top;  // rows of the source above the first row of the output
    int32_t source_rows, residual_times, dtype, threads;
};

// Some rows and columns of the output.
struct Region {
    int row, rows, column, columns;
};

// All frames of a region. A pixel's result does not depend on the region.
void convolve_region(const ConvArgs &args, const Region &region);

// Bytes that the kernel keeps of a pixel of its input.
int64_t pixel_bytes(const ConvArgs &args);

}  // namespace longvid
