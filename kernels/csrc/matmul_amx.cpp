// Linear layers by the matrix units of x86 (amx.inc). The sums of a block of 32 rows and a panel of 32 columns are in four
// tiles, so each tile that is loaded is multiplied twice. Every sum takes its products in one order, whatever stands around
// it: it begins with the bias, and what a later part of the depth gives is added as a whole.
#include "isa.h"
#ifdef LONGVID_AMX
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define LANES 16
#include "amx.inc"
#include "matmul.h"
#include "vector.inc"

namespace longvid {
namespace {

constexpr int PAIR = 2 * TILE_SIZE;

// What is left of 32, from `first` on.
inline __mmask32 mask_up_to(int64_t left) { return left >= 32 ? ~__mmask32(0) : left <= 0 ? 0 : (__mmask32(1) << left) - 1; }

// The upper halves of 16 numbers beside those of 16 others. All that is split here has its numbers in this order.
inline __m512i join_halves(__m512 even, __m512 odd) {
    const __m512i upper = _mm512_and_si512((__m512i)odd, _mm512_set1_epi32(0xffff0000));
    return _mm512_or_si512(_mm512_srli_epi32((__m512i)even, 16), upper);
}

// Rounds to bf16, a half upwards.
inline __m512 shorten(__m512 x) {
    const __m512i bits = _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000));
    return (__m512)_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000));
}

// Numbers first to first + 32 of a row in parts; zeros past its end. What two parts leave of a float is a bf16 already.
template <int PARTS>
inline void load_parts(const void *row, int64_t first, int64_t depth, __m512i *parts) {
    const __mmask32 mask = mask_up_to(depth - first);
    if constexpr (PARTS == 1) {
        parts[0] = _mm512_maskz_loadu_epi16(mask, static_cast<const Bf16 *>(row) + first);
    } else {
        const float *from = static_cast<const float *>(row) + first;
        __m512 even = _mm512_maskz_loadu_ps(__mmask16(mask), from);
        __m512 odd = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), from + 16);
        for (int p = 0; p < PARTS - 1; p++) {
            const __m512 short_even = shorten(even), short_odd = shorten(odd);
            parts[p] = join_halves(short_even, short_odd);
            even = _mm512_sub_ps(even, short_even);
            odd = _mm512_sub_ps(odd, short_odd);
        }
        parts[PARTS - 1] = join_halves(even, odd);
    }
}

template <int PARTS>
inline const void *row_at(const void *data, int64_t row, int64_t stride) {
    return static_cast<const char *>(data) + row * stride * (PARTS == 1 ? 2 : 4);
}

template <int PARTS>
void pack_panel(const LinearArgs &args, int64_t panel, Bf16 *packed) {
    for (int64_t first = 0; first < args.depth; first += STEP, packed += PARTS * PAIR) {
        for (int half = 0; half < 2; half++) {
            __m512i rows[PARTS][TILE];
            for (int i = 0; i < TILE; i++) {
                const int64_t column = panel * PANEL + half * TILE + i;
                __m512i parts[PARTS] = {};
                if (column < args.columns) {
                    load_parts<PARTS>(row_at<PARTS>(args.weight, column, args.weight_stride), first, args.depth, parts);
                }
                for (int p = 0; p < PARTS; p++) rows[p][i] = parts[p];
            }
            for (int p = 0; p < PARTS; p++) store_columns(rows[p], packed + p * PAIR + half * TILE_SIZE);
        }
    }
}

template <int PARTS>
void split_rows(const LinearArgs &args, int64_t first_row, int num_blocks, int64_t first_step, int num_steps, Bf16 *to) {
    for (int64_t row = first_row; row < first_row + num_blocks * int64_t(PANEL); row += PANEL) {
        const int num_rows = args.rows - row < PANEL ? int(args.rows - row) : PANEL;
        for (int64_t step = first_step; step < first_step + num_steps; step++, to += PARTS * PAIR) {
            for (int i = 0; i < PANEL; i++) {
                __m512i parts[PARTS] = {};
                if (i < num_rows) {
                    load_parts<PARTS>(row_at<PARTS>(args.x, row + i, args.x_stride), step * STEP, args.depth, parts);
                }
                for (int p = 0; p < PARTS; p++) _mm512_store_si512(to + p * PAIR + i * DEPTH, parts[p]);
            }
        }
    }
}

inline void load_left(const Bf16 *pair) {
    load_tile<4>(pair, 64);
    load_tile<5>(pair + TILE_SIZE, 64);
}

inline void load_right(const Bf16 *pair) {
    load_tile<6>(pair, 64);
    load_tile<7>(pair + TILE_SIZE, 64);
}

inline void multiply_pairs() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// From each of the six products to the next, one side stays where it is.
inline void multiply_parts(const Bf16 *left, const Bf16 *right) {
    load_left(left);
    load_right(right + 2 * PAIR);
    multiply_pairs();
    load_right(right + PAIR);
    multiply_pairs();
    load_left(left + PAIR);
    multiply_pairs();
    load_right(right);
    multiply_pairs();
    load_left(left + 2 * PAIR);
    multiply_pairs();
    load_left(left);
    multiply_pairs();
}

// 32 by 32 sums; `stride` is in bytes, between rows of 16.
struct Corner {
    float *at[4];
    int64_t stride;
};

inline Corner corner_of(float *sums) { return {{sums, sums + 256, sums + 512, sums + 768}, 64}; }

// Lines of memory that are asked for step by step: far weights come while near ones are multiplied.
struct Ahead {
    const char *next;
    int lines;

    void ask() {
        for (int i = 0; i < lines; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
};

// Sums that begin with `start`, a row of 32.
template <int PARTS>
inline void multiply_block(const Bf16 *left, const Bf16 *right, int num_steps, const float *start, Ahead &ahead,
                           const Corner &to) {
    load_tile<0>(start, 0);
    load_tile<1>(start + TILE, 0);
    load_tile<2>(start, 0);
    load_tile<3>(start + TILE, 0);
    for (int i = 0; i < num_steps; i++, left += PARTS * PAIR, right += PARTS * PAIR) {
        ahead.ask();
        if constexpr (PARTS == 1) {
            load_left(left);
            load_right(right);
            multiply_pairs();
        } else {
            multiply_parts(left, right);
        }
    }
    store_tile<0>(to.at[0], to.stride);
    store_tile<1>(to.at[1], to.stride);
    store_tile<2>(to.at[2], to.stride);
    store_tile<3>(to.at[3], to.stride);
}

// 1 / x within 2^-23, for x from 1 to 2^126: a division takes as long as all the rest of GELU.
inline Vec inverse(Vec x) {
    const Vec near = (Vec)_mm512_rcp14_ps((__m512)x);
    return near * (2.0f - x * near);
}

// x / (1 + e^-2z), where GELU asks for tanh z.
inline Vec gelu(Vec x) {
    const Vec doubled = x * (1.5957691216057308f + 0.07135481282946405f * x * x);
    Vec power = doubled * -1.44269504088896340736f;
    power = power > fill(126.0f) ? fill(126.0f) : power;
    return x * inverse(1.0f + exp2(power));
}

template <int PARTS>
void finish_block(const LinearArgs &args, int64_t first_row, int64_t first_column, const float *sums) {
    const int num_rows = args.rows - first_row < PANEL ? int(args.rows - first_row) : PANEL;
    const __mmask32 mask = mask_up_to(args.columns - first_column);
    for (int i = 0; i < num_rows; i++) {
        Vec result[2];
        for (int j = 0; j < 2; j++) {
            result[j] = load(sums + (i / TILE * 2 + j) * 256 + i % TILE * TILE);
            if (args.gelu) result[j] = gelu(result[j]);
        }
        const int64_t place = (first_row + i) * args.out_stride + first_column;
        if constexpr (PARTS == 1) {
            const __m512i rounded = round_to_bf16((__m512)result[0], (__m512)result[1]);
            _mm512_mask_storeu_epi16(static_cast<Bf16 *>(args.out) + place, mask, rounded);
        } else {
            float *to = static_cast<float *>(args.out) + place;
            _mm512_mask_storeu_ps(to, __mmask16(mask), (__m512)result[0]);
            _mm512_mask_storeu_ps(to + 16, __mmask16(mask >> 16), (__m512)result[1]);
        }
    }
}

template <int PARTS>
void load_bias(const LinearArgs &args, int64_t first_column, float *bias) {
    const __mmask32 mask = mask_up_to(args.columns - first_column);
    if constexpr (PARTS == 1) {
        const __m512i both = _mm512_maskz_loadu_epi16(mask, static_cast<const Bf16 *>(args.bias) + first_column);
        _mm512_store_ps(bias, widen(_mm512_castsi512_si256(both)));
        _mm512_store_ps(bias + 16, widen(_mm512_extracti64x4_epi64(both, 1)));
    } else {
        const float *from = static_cast<const float *>(args.bias) + first_column;
        _mm512_store_ps(bias, _mm512_maskz_loadu_ps(__mmask16(mask), from));
        _mm512_store_ps(bias + 16, _mm512_maskz_loadu_ps(__mmask16(mask >> 16), from + 16));
    }
}

inline void add(float *sums, const float *more) {
    for (int i = 0; i < PANEL * PANEL; i += LANES) store(sums + i, load(sums + i) + load(more + i));
}

template <int PARTS>
void multiply_panel(const LinearArgs &args, const PanelWork &work) {
    const Tiles tiles;
    alignas(64) float start[PANEL] = {}, room[PANEL * PANEL];
    if (work.is_first && args.bias) load_bias<PARTS>(args, work.first_column, start);
    const bool is_plain = PARTS == NUM_PARTS && work.is_first && work.is_last && !args.gelu;
    const bool is_whole = is_plain && args.columns - work.first_column >= PANEL;
    const Bf16 *left = work.parts;
    Ahead ahead = {reinterpret_cast<const char *>(work.next), (PARTS * PAIR / DEPTH + work.num_blocks - 1) / work.num_blocks};
    for (int i = 0; i < work.num_blocks; i++, left += work.num_steps * PARTS * PAIR) {
        const int64_t row = work.first_row + i * PANEL;
        if (is_whole && args.rows - row >= PANEL) {
            float *to = static_cast<float *>(args.out) + row * args.out_stride + work.first_column;
            float *below = to + TILE * args.out_stride;
            const Corner corner = {{to, to + TILE, below, below + TILE}, args.out_stride * 4};
            multiply_block<PARTS>(left, work.packed, work.num_steps, start, ahead, corner);
            continue;
        }
        float *waiting = work.sums + i * PANEL * PANEL;
        float *sums = work.is_first && !work.is_last ? waiting : room;
        multiply_block<PARTS>(left, work.packed, work.num_steps, start, ahead, corner_of(sums));
        if (!work.is_first) add(sums = waiting, room);
        if (work.is_last) finish_block<PARTS>(args, row, work.first_column, sums);
    }
}

void pack(const LinearArgs &args, int64_t panel, Bf16 *packed) {
    args.dtype == LINEAR_BF16 ? pack_panel<1>(args, panel, packed) : pack_panel<NUM_PARTS>(args, panel, packed);
}

void split(const LinearArgs &args, int64_t first_row, int num_blocks, int64_t first_step, int num_steps, Bf16 *parts) {
    const auto rows = args.dtype == LINEAR_BF16 ? split_rows<1> : split_rows<NUM_PARTS>;
    rows(args, first_row, num_blocks, first_step, num_steps, parts);
}

void multiply(const LinearArgs &args, const PanelWork &work) {
    args.dtype == LINEAR_BF16 ? multiply_panel<1>(args, work) : multiply_panel<NUM_PARTS>(args, work);
}

}  // namespace

extern const LinearVariant linear_amx = {pack, split, multiply};

}  // namespace longvid
#endif
