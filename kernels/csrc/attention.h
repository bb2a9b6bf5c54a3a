// Arguments of attention on the CPU (sparse.cpp).
#pragma once

#include <cstdint>

#include "blocks.h"

namespace longvid {

// Floats, or bf16, with strides between batch entries, tokens and heads; the elements of a head lie side by side.
struct TensorArgs {
    float *data;
    int64_t batch, token, head;
};

struct AttentionArgs {
    TensorArgs q, k, v, out, lse;  // lse is of floats, the others are all of one kind
    const float *bias;  // or null; the tokens lie side by side
    int64_t bias_batch, bias_head;
    BlocksArgs q_blocks, k_blocks;
    const int32_t *row_ptr, *col, *group;
    int64_t group_batch;
    int64_t num_col;
    int32_t num_groups, batch, heads, dim, threads, isa, is_bf16;
    float scale;
};

struct MassArgs {
    TensorArgs q, k, lse;
    float *mass;  // [batch][heads][query blocks][key blocks]
    BlocksArgs q_blocks, k_blocks;
    int32_t batch, heads, dim, sample_every, threads, isa, is_bf16;  // of q and k
    float scale;
};

enum Status { DONE = 0, UNSUPPORTED = 1, BAD_LAYOUT = 2, NO_MEMORY = 3 };

}  // namespace longvid

extern "C" {

// A `Status`.
int longvid_attention(const longvid::AttentionArgs *args);

}  // extern "C"
