// What the entry points of a layer between its attentions (layer.cpp) take.
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
    int32_t dtype, isa;
    float eps;
};

// The tokens of a pass. Rows lie behind each other.
struct PassArgs {
    const float *modulation;  // [6, kinds of tokens, width], added to the layer's table
    const int32_t *kinds;  // [tokens]; null: all are of kind 0
    const void *hidden, *attended;
    void *out, *query, *scratch;
    int64_t tokens, num_kinds;
    int32_t threads;
};

}  // namespace longvid
