// What the entry points of a transformer's layer (layer.cpp) take.
#pragma once

#include <cstdint>

namespace longvid {

struct LayerLinear {
    const void *packed, *bias;  // the bias may be null
    int64_t columns;
};

// A layer's weights. `width` is that of hidden states, `inner` of all heads together.
struct LayerArgs {
    const float *table;  // [6, width]: shift, gain and gate of self-attention, then of the feed-forward
    const float *query_gain, *key_gain, *text_query_gain;  // [inner]
    const float *text_gain, *text_shift;  // [width], of the norm before attention to the text; null: there is none
    LayerLinear qkv, self_out, text_query, text_out, up, down;
    int64_t width, inner;
    int32_t heads, dtype, isa;
    float eps;
};

// The tokens of a pass. Rows lie behind each other.
struct PassArgs {
    const float *modulation;  // [6, kinds of tokens, width], added to the layer's table
    const int32_t *kinds;  // [tokens]; null: all are of kind 0
    const void *hidden, *attended;
    void *out, *query;
    int64_t tokens, num_kinds;
    int32_t threads;
};

// Keys, normed and not rotated, and values [tokens, inner].
struct KvArgs {
    const void *key, *value;
    int64_t tokens;
};

// Where the K/V of some of the pass's tokens are to be copied.
struct StoreArgs {
    void *key, *value;
    int64_t first, count;
};

constexpr int MOST_STORED = 3;

// What attention reads besides the tokens of the pass, and keeps of them. Rotary rows [tokens, dim] are of all tokens in their
// order: the left neighbour's, those of the pass, the right one's. Of the text keys are as they are read.
struct AroundArgs {
    const float *cosines, *sines;
    KvArgs left, right, text;
    const float *text_bias;  // [text tokens]
    StoreArgs store[MOST_STORED];
    int64_t num_stored, packed_together;  // the latter: keys in a block of attention
};

}  // namespace longvid
