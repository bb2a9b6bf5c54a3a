// What the entry points (matmul.cpp) and the kernels (matmul_amx.cpp) of linear layers share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longvid {

constexpr int PANEL = 32;  // columns of a panel of packed weights, and rows of a block: two tiles
constexpr int STEP = 32;  // of the depth, in one tile

enum LinearDtype : int32_t { LINEAR_FP32 = 0, LINEAR_BF16 = 1 };

// out[rows, columns] = x[rows, depth] times weight[columns, depth], turned; plus bias[columns], and GELU by tanh of that if
// asked for. All of one dtype. The weight comes as it is, or packed.
struct LinearArgs {
    const void *x, *weight, *packed;  // one of the last two is null
    const void *bias;  // or null
    void *out;
    int64_t rows, columns, depth, x_stride, weight_stride, out_stride;
    int32_t dtype, gelu, threads;
};

// Some blocks of rows by a panel, along a part of the depth. Between the first and the last part, sums wait in
// [block][half of the rows][half of the columns][16][16].
struct PanelWork {
    const uint16_t *parts, *packed, *next;  // the last: the panel that is asked for in the meantime
    float *sums;
    int64_t first_row, first_column;
    int num_blocks, num_steps;
    bool is_first, is_last;
};

// The kernels for one instruction set. Numbers of bf16 that a tile holds come in parts: three for fp32, one for bf16.
// Offsets and counts along the depth are in steps.
struct LinearVariant {
    // A panel of a weight: [step][part][half of the columns][tile].
    void (*pack)(const LinearArgs &args, int64_t panel, uint16_t *packed);
    // Some rows, a block behind the other: [block][step][part][half of the rows][tile].
    void (*split)(const LinearArgs &args, int64_t first_row, int num_blocks, int64_t first_step, int num_steps, uint16_t *parts);
    // A panel's columns of some blocks of rows.
    void (*multiply)(const LinearArgs &args, const PanelWork &work);
};

extern const LinearVariant linear_amx;

}  // namespace longvid

extern "C" {

// 0, 1 where this processor has no matrix units, or 2 where memory is lacking.
int longvid_linear(const longvid::LinearArgs *args);

}  // extern "C"
