// What the entry points (rows.cpp) and the variants (rows.inc) of the kernels for single tokens share.
#pragma once

#include <cstdint>

namespace longvid {

enum Dtype : int32_t { FP32 = 0, BF16 = 1 };

// How the elements of a row are made smaller before they meet the gain.
enum Norm : int32_t {
    LAYER = 0,  // (x - mean) / sqrt(variance + eps)
    RMS = 1,  // x / sqrt(mean of squares + eps)
    UNIT = 2,  // x / max(root of the sum of squares, eps)
};

// out = norm(x) * gain + shift, and SiLU of that if asked for.
struct NormArgs {
    const void *x;
    void *out;
    const float *gain, *shift;  // [kinds of rows, width]; shift may be null
    const int32_t *kinds;  // [count]; null: all are of kind 0
    int64_t count, x_stride, out_stride;  // the last two from row to row
    int32_t width, dtype, norm, silu, threads, isa;
    float eps;
};

// out = x + y * gate. Rows lie behind each other.
struct GateArgs {
    const void *x, *y;
    void *out;
    const float *gate;  // [kinds of rows, width]; null: 1
    const int32_t *kinds;
    int64_t count;
    int32_t width, dtype, threads, isa;
};

// GELU by tanh.
struct GeluArgs {
    const void *x;
    void *out;
    int64_t count;  // of all elements
    int32_t dtype, threads, isa;
};

// Each two neighbours of a head turned by an angle of their token's.
struct RopeArgs {
    const void *x;
    void *out;
    const float *cosines, *sines;  // [tokens, dim], each one twice
    int64_t x_token, x_head, out_token, out_head, table_token;  // strides
    int64_t tokens;
    int32_t heads, dim, dtype, threads, isa;
};

// The kernels for one instruction set: of the rows, elements or tokens from first up to last.
struct RowVariant {
    void (*norm)(const NormArgs &args, int64_t first, int64_t last);
    void (*gate)(const GateArgs &args, int64_t first, int64_t last);
    void (*gelu)(const GeluArgs &args, int64_t first, int64_t last);
    void (*rope)(const RopeArgs &args, int64_t first, int64_t last);
};

extern const RowVariant rows_portable;
extern const RowVariant rows_avx2;
extern const RowVariant rows_avx512;

}  // namespace longvid

extern "C" {

// 0, or 1 where the instruction set was not built.
int longvid_norm(const longvid::NormArgs *args);
int longvid_gate(const longvid::GateArgs *args);
int longvid_gelu(const longvid::GeluArgs *args);
int longvid_rope(const longvid::RopeArgs *args);

}  // extern "C"
