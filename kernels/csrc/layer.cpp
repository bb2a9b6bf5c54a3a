// A layer with modulation, cross-attention and a feed-forward: in one call with dense attention, or in three between the
// attentions. Each runs the kernels of rows.cpp, matmul.cpp and sparse.cpp one after the other, so it gives their bits. Plain C
// entry points, for ctypes.

#include "layer.h"

#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "attention.h"
#include "kept.h"
#include "matmul.h"
#include "rows.h"

namespace longvid {
namespace {

constexpr size_t KEPT_BYTES = size_t(64) << 20;
constexpr int64_t LINE = 64;  // bytes, at which memory begins

// In the order of the layer's table.
enum Modulation { SHIFT, GAIN, GATE, FEED_SHIFT, FEED_GAIN, FEED_GATE };

enum LayerStatus { LAYER_DONE = 0, LAYER_UNSUPPORTED = 1, LAYER_NO_MEMORY = 2 };

// A layer at work on the tokens of a pass. After a failure nothing more is done.
class Work {
  public:
    // `keys` are those of self-attention, where that is done here.
    Work(const LayerArgs &layer, const PassArgs &pass, int64_t keys = 0)
        : layer_(layer),
          pass_(pass),
          size_(layer.dtype == FP32 ? 4 : 2),
          stride_(3 * layer.inner),
          memory_(bytes(layer, pass, keys)),
          free_(memory_.get()),
          status_(free_ ? LAYER_DONE : LAYER_NO_MEMORY) {}

    int status() const { return status_; }

    // Memory for some tokens of `width` numbers each, until the room that was made last goes.
    void *take(int64_t tokens, int64_t width) { return take_bytes(tokens * width * size_); }

    // Hidden states to queries, keys and values [tokens, 3, inner] of self-attention, the first two normed.
    void begin(void *qkv) {
        const Room room(*this);
        void *normed = take(pass_.tokens, layer_.width);
        modulated_norm(pass_.hidden, GAIN, SHIFT, normed);
        linear(normed, layer_.width, layer_.qkv, false, qkv);
        rms_norm(qkv, stride_, layer_.query_gain);
        rms_norm(at(qkv, layer_.inner), stride_, layer_.key_gain);
    }

    // Hidden states and what self-attention gave to hidden states, `out`, and queries of the text, normed.
    void middle(const void *attended, void *query) {
        const Room room(*this);
        void *some = take(pass_.tokens, layer_.width);
        linear(attended, layer_.inner, layer_.self_out, false, some);
        add(pass_.hidden, some, modulation(GATE));
        const void *asking = pass_.out;
        if (layer_.text_gain) {
            norm(pass_.out, layer_.width, layer_.width, some, layer_.text_gain, layer_.text_shift, nullptr, LAYER);
            asking = some;
        }
        linear(asking, layer_.width, layer_.text_query, false, query);
        rms_norm(query, layer_.inner, layer_.text_query_gain);
    }

    // Hidden states and what attention to the text gave to hidden states, `out`.
    void end(const void *hidden, const void *attended) {
        const Room room(*this);
        void *some = take(pass_.tokens, layer_.width), *wide = take(pass_.tokens, layer_.up.columns);
        linear(attended, layer_.inner, layer_.text_out, false, some);
        add(hidden, some, nullptr);
        modulated_norm(pass_.out, FEED_GAIN, FEED_SHIFT, some);
        linear(some, layer_.width, layer_.up, true, wide);
        linear(wide, layer_.up.columns, layer_.down, false, some);
        add(pass_.out, some, modulation(FEED_GATE));
    }

    // Copies the K/V that are to be stored.
    void store(const AroundArgs &around, const void *qkv) const {
        for (int64_t i = 0; i < around.num_stored; i++) {
            const StoreArgs &to = around.store[i];
            copy(at(qkv, layer_.inner + to.first * stride_), stride_, to.count, to.key);
            copy(at(qkv, 2 * layer_.inner + to.first * stride_), stride_, to.count, to.value);
        }
    }

    // Self-attention to all tokens: rotates the queries where they are.
    void attend_around(const AroundArgs &around, void *qkv, void *attended) {
        const Room room(*this);
        const int64_t inner = layer_.inner, keys = around.left.tokens + pass_.tokens + around.right.tokens;
        void *key = take(keys, inner), *value = take(keys, inner);
        int64_t place = 0;
        const auto join = [&](const KvArgs &part, int64_t stride) {
            rotate(around, part.key, stride, part.tokens, place, at(key, place * inner), inner);
            copy(part.value, stride, part.tokens, at(value, place * inner));
            place += part.tokens;
        };
        join(around.left, inner);
        join({at(qkv, inner), at(qkv, 2 * inner), pass_.tokens}, stride_);
        join(around.right, inner);
        rotate(around, qkv, stride_, pass_.tokens, around.left.tokens, qkv, stride_);
        attend(qkv, stride_, {key, value, keys}, nullptr, around.packed_together, attended);
    }

    // Dense attention of the pass's tokens, with a bias for each key if that is not null.
    void attend(void *query, int64_t stride, const KvArgs &keys, const float *bias, int64_t packed_together, void *attended) {
        const Room room(*this);
        const int64_t inner = layer_.inner, heads = layer_.heads, dim = inner / heads;
        const int32_t tokens = int32_t(pass_.tokens), num_keys = int32_t(keys.tokens);
        const int32_t blocks = int32_t((keys.tokens + packed_together - 1) / packed_together);
        std::vector<int32_t> offsets(blocks + 1), columns(blocks), groups(heads, 0);
        for (int32_t i = 0; i < blocks; i++) offsets[i] = int32_t(i * packed_together);
        offsets[blocks] = num_keys;
        std::iota(columns.begin(), columns.end(), 0);
        const int32_t all_tokens[] = {0, tokens}, all_blocks[] = {0, blocks};
        AttentionArgs args{};
        args.q = {static_cast<float *>(query), 0, stride, dim};
        args.k = {const_cast<float *>(static_cast<const float *>(keys.key)), 0, inner, dim};
        args.v = {const_cast<float *>(static_cast<const float *>(keys.value)), 0, inner, dim};
        args.out = {static_cast<float *>(attended), 0, inner, dim};
        args.lse = {static_cast<float *>(take_bytes(tokens * heads * int64_t(sizeof(float)))), 0, heads, 1};
        args.bias = bias;
        args.q_blocks = {all_tokens, nullptr, 0, 0, 1, tokens};
        args.k_blocks = {offsets.data(), nullptr, 0, 0, blocks, num_keys};
        args.row_ptr = all_blocks, args.col = columns.data(), args.group = groups.data();
        args.num_col = blocks, args.num_groups = 1, args.batch = 1, args.heads = int32_t(heads), args.dim = int32_t(dim);
        args.threads = pass_.threads, args.isa = layer_.isa, args.is_bf16 = layer_.dtype == BF16;
        args.scale = float(1 / std::sqrt(double(dim)));
        if (status_) return;
        const int found = longvid_attention(&args);
        status_ = found == NO_MEMORY ? LAYER_NO_MEMORY : found == DONE ? LAYER_DONE : LAYER_UNSUPPORTED;
    }

  private:
    // What is taken while it lives is given back.
    class Room {
      public:
        explicit Room(Work &work) : work_(work), free_(work.free_) {}
        ~Room() { work_.free_ = free_; }
        Room(const Room &) = delete;

      private:
        Work &work_;
        uint8_t *const free_;
    };

    // Memory for all that is taken in one call.
    static size_t bytes(const LayerArgs &layer, const PassArgs &pass, int64_t keys) {
        const int64_t size = layer.dtype == FP32 ? 4 : 2, tables = 3 * pass.num_kinds * layer.width * int64_t(sizeof(float));
        const int64_t between = layer.width + layer.up.columns, attention = keys ? 5 * layer.inner + 2 * layer.heads : 0;
        return size_t((pass.tokens * (between + attention) + 2 * keys * layer.inner) * size + tables + 16 * LINE);
    }

    void *take_bytes(int64_t count) {
        uint8_t *taken = free_;
        free_ += (count + LINE - 1) / LINE * LINE;
        return taken;
    }

    const void *at(const void *x, int64_t number) const { return static_cast<const char *>(x) + number * size_; }
    void *at(void *x, int64_t number) const { return static_cast<char *>(x) + number * size_; }

    // What one of the layer's modulations is at each noise level of the pass.
    const float *modulation(Modulation which) {
        const int64_t width = layer_.width;
        const float *own = layer_.table + which * width, *levels = pass_.modulation + which * pass_.num_kinds * width;
        float *found = static_cast<float *>(take_bytes(pass_.num_kinds * width * int64_t(sizeof(float))));
        if (status_) return found;
        for (int64_t kind = 0; kind < pass_.num_kinds; kind++) {
            for (int64_t d = 0; d < width; d++) found[kind * width + d] = own[d] + levels[kind * width + d];
        }
        return found;
    }

    void modulated_norm(const void *x, Modulation gain, Modulation shift, void *out) {
        norm(x, layer_.width, layer_.width, out, modulation(gain), modulation(shift), pass_.kinds, LAYER);
    }

    // In place.
    void rms_norm(void *x, int64_t stride, const float *gain) { norm(x, layer_.inner, stride, x, gain, nullptr, nullptr, RMS); }

    void norm(const void *x, int64_t width, int64_t stride, void *out, const float *gain, const float *shift,
              const int32_t *kinds, Norm how) {
        const NormArgs args{x,           out, gain, shift,         kinds,      pass_.tokens, stride, stride, int32_t(width),
                            layer_.dtype, how, 0,    pass_.threads, layer_.isa, layer_.eps};
        if (!status_) status_ = longvid_norm(&args);
    }

    void linear(const void *x, int64_t depth, const LayerLinear &linear, bool gelu, void *out) {
        const LinearArgs args{x,     nullptr,        linear.packed, linear.bias, out, pass_.tokens, linear.columns, depth, depth,
                              depth, linear.columns, layer_.dtype,  gelu,        pass_.threads};
        if (!status_) status_ = longvid_linear(&args);
    }

    // x + y * gate to `out`, where gate may be null.
    void add(const void *x, const void *y, const float *gate) {
        const GateArgs args{x,          y, pass_.out, gate, pass_.kinds, pass_.tokens, int32_t(layer_.width), layer_.dtype,
                            pass_.threads, layer_.isa};
        if (!status_) status_ = longvid_gate(&args);
    }

    // Turns tokens, of which the first stands at `place`.
    void rotate(const AroundArgs &around, const void *x, int64_t stride, int64_t tokens, int64_t place, void *out, int64_t out_stride) {
        const int64_t dim = layer_.inner / layer_.heads;
        const RopeArgs args{x,      out,          around.cosines + place * dim, around.sines + place * dim, stride, dim, out_stride, dim, dim,
                            tokens, layer_.heads, int32_t(dim), layer_.dtype,  pass_.threads, layer_.isa};
        if (!status_) status_ = longvid_rope(&args);
    }

    // Rows of all heads, to rows that lie behind each other.
    void copy(const void *from, int64_t stride, int64_t tokens, void *to) const {
        if (status_) return;
        for (int64_t i = 0; i < tokens; i++) std::memcpy(at(to, i * layer_.inner), at(from, i * stride), layer_.inner * size_);
    }

    const LayerArgs &layer_;
    const PassArgs &pass_;
    const int64_t size_, stride_;
    const Kept<LayerArgs, KEPT_BYTES> memory_;
    uint8_t *free_;
    int status_;
};

}  // namespace
}  // namespace longvid

using namespace longvid;

extern "C" {

// All: 0, 1 where this processor lacks what they need, or 2 where memory is lacking.

// Hidden states to queries, keys and values [tokens, 3, inner] of self-attention, the first two normed: `out`.
int longvid_layer_begin(const LayerArgs *layer, const PassArgs *pass) {
    Work work(*layer, *pass);
    work.begin(pass->out);
    return work.status();
}

// Hidden states and what self-attention gave to hidden states, `out`, and queries of the text [tokens, inner], `query`.
int longvid_layer_middle(const LayerArgs *layer, const PassArgs *pass) {
    Work work(*layer, *pass);
    work.middle(pass->attended, pass->query);
    return work.status();
}

// Hidden states and what attention to the text gave to hidden states, `out`, which may be where they are.
int longvid_layer_end(const LayerArgs *layer, const PassArgs *pass) {
    Work work(*layer, *pass);
    work.end(pass->hidden, pass->attended);
    return work.status();
}

// Hidden states to hidden states, `out`, with dense attention.
int longvid_layer(const LayerArgs *layer, const PassArgs *pass, const AroundArgs *around) try {
    Work work(*layer, *pass, around->left.tokens + pass->tokens + around->right.tokens);
    void *qkv = work.take(pass->tokens, 3 * layer->inner), *attended = work.take(pass->tokens, layer->inner);
    work.begin(qkv);
    work.store(*around, qkv);
    work.attend_around(*around, qkv, attended);
    void *query = qkv;  // which is done with
    work.middle(attended, query);
    work.attend(query, layer->inner, around->text, around->text_bias, around->packed_together, attended);
    work.end(pass->out, attended);
    return work.status();
} catch (const std::bad_alloc &) {
    return LAYER_NO_MEMORY;
}

}  // extern "C"
