// A layer with modulation, cross-attention and a feed-forward, but for its attentions: three calls in place of a dozen and
// more. Each runs the kernels of rows.cpp and matmul.cpp one after the other, so it gives their bits. Plain C entry points,
// for ctypes.

#include "layer.h"

#include "matmul.h"
#include "rows.h"

namespace longvid {
namespace {

// In the order of the layer's table.
enum Modulation { SHIFT, GAIN, GATE, FEED_SHIFT, FEED_GAIN, FEED_GATE };

// A layer at work on the tokens of a pass. After a failure nothing more is done.
class Work {
  public:
    Work(const LayerArgs &layer, const PassArgs &pass)
        : layer_(layer), pass_(pass), size_(layer.dtype == FP32 ? 4 : 2), free_(static_cast<char *>(pass.scratch)) {}

    int status() const { return status_; }

    // Memory for tokens of some numbers each.
    void *take(int64_t width) { return take_bytes(pass_.tokens * width * size_); }

    // What one of the layer's modulations is at each noise level of the pass.
    const float *modulation(Modulation which) {
        const int64_t width = layer_.width;
        const float *own = layer_.table + which * width, *levels = pass_.modulation + which * pass_.num_kinds * width;
        float *found = static_cast<float *>(take_bytes(pass_.num_kinds * width * int64_t(sizeof(float))));
        for (int64_t kind = 0; kind < pass_.num_kinds; kind++) {
            for (int64_t d = 0; d < width; d++) found[kind * width + d] = own[d] + levels[kind * width + d];
        }
        return found;
    }

    void modulated_norm(const void *x, Modulation gain, Modulation shift, void *out) {
        norm(x, layer_.width, layer_.width, out, modulation(gain), modulation(shift), pass_.kinds, LAYER);
    }

    void plain_norm(const void *x, const float *gain, const float *shift, void *out) {
        norm(x, layer_.width, layer_.width, out, gain, shift, nullptr, LAYER);
    }

    // In place.
    void rms_norm(void *x, int64_t stride, const float *gain) {
        norm(x, layer_.inner, stride, x, gain, nullptr, nullptr, RMS);
    }

    void linear(const void *x, int64_t depth, const LayerLinear &linear, bool gelu, void *out) {
        const LinearArgs args{x,     nullptr, linear.packed,  linear.bias,   out,   pass_.tokens, linear.columns, depth, depth,
                              depth, linear.columns, layer_.dtype, gelu, pass_.threads};
        if (!status_) status_ = longvid_linear(&args);
    }

    // x + y * gate, where gate may be null.
    void add(const void *x, const void *y, const float *gate, void *out) {
        const GateArgs args{x, y, out, gate, pass_.kinds, pass_.tokens, int32_t(layer_.width), layer_.dtype, pass_.threads, layer_.isa};
        if (!status_) status_ = longvid_gate(&args);
    }

    void *at(void *x, int64_t number) const { return static_cast<char *>(x) + number * size_; }

  private:
    void *take_bytes(int64_t bytes) {
        char *taken = free_;
        free_ += (bytes + 63) / 64 * 64;
        return taken;
    }

    void norm(const void *x, int64_t width, int64_t stride, void *out, const float *gain, const float *shift,
              const int32_t *kinds, Norm how) {
        const NormArgs args{x,           out, gain, shift,         kinds,      pass_.tokens, stride, stride, int32_t(width),
                            layer_.dtype, how, 0,    pass_.threads, layer_.isa, layer_.eps};
        if (!status_) status_ = longvid_norm(&args);
    }

    const LayerArgs &layer_;
    const PassArgs &pass_;
    const int64_t size_;
    char *free_;
    int status_ = 0;
};

}  // namespace
}  // namespace longvid

using namespace longvid;

extern "C" {

// All three: 0, 1 where this processor lacks what they need, or 2 where memory is lacking.

// Hidden states to queries, keys and values [tokens, 3, inner] of self-attention, the first two normed: `out`.
int longvid_layer_begin(const LayerArgs *layer, const PassArgs *pass) {
    Work work(*layer, *pass);
    void *normed = work.take(layer->width);
    work.modulated_norm(pass->hidden, GAIN, SHIFT, normed);
    work.linear(normed, layer->width, layer->qkv, false, pass->out);
    work.rms_norm(pass->out, 3 * layer->inner, layer->query_gain);
    work.rms_norm(work.at(pass->out, layer->inner), 3 * layer->inner, layer->key_gain);
    return work.status();
}

// Hidden states and what self-attention gave to hidden states, `out`, and queries of the text [tokens, inner], `query`.
int longvid_layer_middle(const LayerArgs *layer, const PassArgs *pass) {
    Work work(*layer, *pass);
    void *room = work.take(layer->width);
    work.linear(pass->attended, layer->inner, layer->self_out, false, room);
    work.add(pass->hidden, room, work.modulation(GATE), pass->out);
    const void *asking = pass->out;
    if (layer->text_gain) {
        work.plain_norm(pass->out, layer->text_gain, layer->text_shift, room);
        asking = room;
    }
    work.linear(asking, layer->width, layer->text_query, false, pass->query);
    work.rms_norm(pass->query, layer->inner, layer->text_query_gain);
    return work.status();
}

// Hidden states and what attention to the text gave to hidden states, `out`, which may be where they are.
int longvid_layer_end(const LayerArgs *layer, const PassArgs *pass) {
    Work work(*layer, *pass);
    void *room = work.take(layer->width), *wide = work.take(layer->up.columns);
    work.linear(pass->attended, layer->inner, layer->text_out, false, room);
    work.add(pass->hidden, room, nullptr, pass->out);
    work.modulated_norm(pass->out, FEED_GAIN, FEED_SHIFT, room);
    work.linear(room, layer->width, layer->up, true, wide);
    work.linear(wide, layer->up.columns, layer->down, false, room);
    work.add(pass->out, room, work.modulation(FEED_GATE), pass->out);
    return work.status();
}

}  // extern "C"
