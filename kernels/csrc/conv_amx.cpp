// Convolutions by the matrix units of x86.
//
// A frame of a region lies in memory as rows of pixels with a border, and each pixel as its parts (amx.inc), each of
// all channels. So 16 pixels that follow each other are a left-hand tile, wherever they begin, and a tap of the kernel
// is no more than another beginning. A sum goes over the border between two rows; what comes out there is not stored.
// Where the region is as wide as the image, a row's right border is the next row's left one.
//
// Frames are written (through norm and SiLU) into a ring as deep as the kernel, each once, right before they are
// needed.
//
// The order of a sum is: taps by frame and row, chunks of channels, taps by column, parts. It is the same for every
// pixel, however many are at hand. Frames before the first are left out, which gives the bits of adding zeros: no sum
// is ever -0.

#include "isa.h"

#ifdef LONGVID_AMX
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#include <cstdlib>
#include <cstring>

#include "amx.inc"
#include "conv.h"

namespace longvid {
namespace {

constexpr int BLOCK = 4 * TILE;  // pixels or outputs at most that are multiplied at once
// Weights that are gone through before the next pixels' turn, so that they come from the second cache.
constexpr int64_t WEIGHT_BYTES = int64_t(1) << 19;

// A thread's memory, kept from call to call: fresh memory costs more than what is written to it.
class Scratch {
  public:
    ~Scratch() { free(at); }
    Scratch() = default;
    Scratch(const Scratch &) = delete;

    char *of_bytes(size_t bytes) {
        if (bytes > size) {
            free(at);
            size = (bytes + 4095) / 4096 * 4096;
            at = static_cast<char *>(aligned_alloc(4096, size));
            if (!at) abort();
        }
        return at;
    }

  private:
    char *at = nullptr;
    size_t size = 0;
};

thread_local Scratch scratch;

template <typename T>
constexpr int parts_of = sizeof(T) == 4 ? NUM_PARTS : 1;

inline int padded(int channels) { return (channels + DEPTH - 1) / DEPTH * DEPTH; }

inline __mmask16 up_to(int count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

inline __m512 load(const float *from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline __m512 load(const Bf16 *from, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, from)); }

inline void store(float *to, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, x); }
inline void store(Bf16 *to, __m512 x, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

// 1 / x for x from 1 on, within 1.2e-7.
inline __m512 inverse(__m512 x) {
    const __m512 near = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(near, _mm512_fnmadd_ps(x, near, _mm512_set1_ps(1.0f)), near);
}

// 2^x for x up to 126, within 2e-7.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 power = _mm512_set1_ps(0.001326472731307149f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.009671512991189957f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.05550733581185341f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.24022242426872253f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.6931470036506653f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
}

// x / (1 + e^-x)
inline __m512 silu(__m512 x) {
    const __m512 limit = _mm512_set1_ps(126.0f), power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896340736f));
    return _mm512_mul_ps(x, inverse(_mm512_add_ps(_mm512_set1_ps(1.0f), exp2(_mm512_min_ps(limit, power)))));
}

// 16 channels from `at` on; zeros behind the last.
template <bool FULL, typename T>
inline __m512 channels_from(const T *pixel, int at, int channels) {
    return load(pixel + at, FULL ? up_to(16) : up_to(channels - at));
}

template <bool FULL, typename T>
inline float inverse_norm(const T *pixel, int channels) {
    __m512 first = _mm512_setzero_ps(), second = first;
    for (int d = 0; d < channels; d += DEPTH) {
        const __m512 low = channels_from<FULL>(pixel, d, channels), high = channels_from<FULL>(pixel, d + 16, channels);
        first = _mm512_fmadd_ps(low, low, first);
        second = _mm512_fmadd_ps(high, high, second);
    }
    const float size = __builtin_sqrtf(_mm512_reduce_add_ps(_mm512_add_ps(first, second)));
    return 1.0f / (size < 1e-12f ? 1e-12f : size);
}

// Writes pixels as the kernel reads them, and there as well where `kept` is not null. FULL: the channels are a multiple
// of 32.
template <typename T, bool NORMED, bool FULL>
void write_pixels(const T *x, int count, int channels, const float *gain, Bf16 *to, T *kept) {
    constexpr int PARTS = parts_of<T>;
    const int width = padded(channels);
    for (int i = 0; i < count; i++, x += channels, to += PARTS * width) {
        const __m512 scale = _mm512_set1_ps(NORMED ? inverse_norm<FULL>(x, channels) : 1.0f);
        for (int d = 0; d < width; d += DEPTH) {
            __m512 values[2];
            for (int half = 0; half < 2; half++) {
                const int at = d + 16 * half;
                values[half] = channels_from<FULL>(x, at, channels);
                if (NORMED) {
                    values[half] = _mm512_mul_ps(_mm512_mul_ps(values[half], scale), _mm512_loadu_ps(gain + at));
                    values[half] = silu(values[half]);
                }
                if (kept) store(kept + at, values[half], FULL ? up_to(16) : up_to(channels - at));
            }
            if (PARTS == 1) {
                _mm512_store_si512(to + d, round_to_bf16(values[0], values[1]));
            } else {
                const Parts parts = split(values[0], values[1]);
                for (int p = 0; p < PARTS; p++) _mm512_store_si512(to + p * width + d, parts.of[p]);
            }
        }
        if (kept) kept += channels;
    }
}

// A region's sizes in memory: rows of `pitch` pixels of `pixel` numbers.
template <typename T>
struct Canvas {
    int edge_rows, edge_columns, pitch, pixel, slot;  // `slot`: numbers of a frame

    Canvas(const ConvArgs &args, const Region &region) {
        edge_rows = args.taps[1] > 1, edge_columns = args.taps[2] > 1;
        const bool whole = region.columns == args.columns;
        pitch = region.columns + edge_columns * (whole ? 1 : 2);
        pixel = parts_of<T> * padded(args.channels);
        slot = ((region.rows + 2 * edge_rows) * pitch + edge_columns) * pixel;
    }
};

template <typename T>
class RegionConvolution {
  public:
    RegionConvolution(const ConvArgs &args, const Region &region)
        : args(args),
          region(region),
          canvas(args, region),
          depth(args.taps[0] - 1),
          chunks(padded(args.channels) / DEPTH),
          pixels(region.rows * canvas.pitch - (canvas.pitch - region.columns)),
          steps(args.taps[0] * args.taps[1] * args.taps[2] * chunks),
          steps_at_once(int(WEIGHT_BYTES / (2 * PARTS * TILE_SIZE * sizeof(Bf16)))) {
        // The last tiles reach over the end by less than a block and the largest offset of a tap.
        const int64_t beyond = int64_t(BLOCK + 2 * canvas.pitch + 2) * canvas.pixel;
        const size_t ring_bytes = ((depth + 1) * int64_t(canvas.slot) + beyond) * sizeof(Bf16);
        const int blocks = steps > steps_at_once ? (pixels + 2 * TILE - 1) / (2 * TILE) + 1 : 2;
        const size_t sums_bytes = blocks * SUMS * sizeof(float);
        char *memory = scratch.of_bytes(ring_bytes + sums_bytes + steps * sizeof(Bf16 *));
        ring = reinterpret_cast<Bf16 *>(memory);
        sums = reinterpret_cast<float *>(memory + ring_bytes);
        lefts = reinterpret_cast<const Bf16 **>(memory + ring_bytes + sums_bytes);
    }

    void run() {
        const Tiles tiles;
        if (!args.past) keep_zeros();
        int written = args.past ? 0 : depth;
        for (int frame = 0; frame < args.frames; frame++) {
            for (; written <= frame + depth; written++) write_frame(written);
            for (int group = 0; group < args.groups; group++) multiply(frame, group);
        }
    }

  private:
    static constexpr int PARTS = parts_of<T>;
    static constexpr int SUMS = 2 * TILE * 2 * TILE;  // of a block, wide or narrow

    const T *source(int frame, int row) const {
        const int64_t line = int64_t(args.columns) * args.channels;
        row += args.top;
        if (row < 0 || row >= args.source_rows) {
            const T *around = static_cast<const T *>(row < 0 ? args.above : args.below);
            return around ? around + frame * line : nullptr;
        }
        const T *from = static_cast<const T *>(frame < depth ? args.past : args.x);
        return from + ((frame < depth ? frame : frame - depth) * int64_t(args.source_rows) + row) * line;
    }

    // Where a row of a frame is to be kept; null where it is not.
    T *keeping(int frame, int row) const {
        if (!args.kept || frame < args.frames || row < 0 || row >= region.rows) return nullptr;
        const int64_t at = (int64_t(frame - args.frames) * args.rows + region.row + row) * args.columns + region.column;
        return static_cast<T *>(args.kept) + at * args.channels;
    }

    // The frames before the first are not written, but kept.
    void keep_zeros() {
        for (int frame = args.frames; frame < depth; frame++) {
            for (int row = 0; row < region.rows; row++) {
                T *to = keeping(frame, row);
                if (to) memset(to, 0, sizeof(T) * region.columns * args.channels);
            }
        }
    }

    // Into its place in the ring, with its border.
    void write_frame(int frame) {
        Bf16 *to = ring + frame % (depth + 1) * int64_t(canvas.slot);
        for (int row = -canvas.edge_rows; row < region.rows + canvas.edge_rows; row++) {
            const T *from = source(frame, region.row + row);
            if (from) {
                write_row(from, to, frame, keeping(frame, row));
            } else {
                memset(to, 0, sizeof(Bf16) * canvas.pitch * canvas.pixel);
            }
            to += canvas.pitch * canvas.pixel;
        }
        memset(to, 0, sizeof(Bf16) * canvas.edge_columns * canvas.pixel);
    }

    void write_row(const T *from, Bf16 *to, int frame, T *kept) {
        const int before = region.column ? canvas.edge_columns : 0;
        const bool at_end = region.column + region.columns == args.columns;
        const int behind = at_end ? 0 : canvas.edge_columns;
        from += int64_t(region.column) * args.channels;
        if (canvas.edge_columns && !before) memset(to, 0, sizeof(Bf16) * canvas.pixel);
        to += canvas.edge_columns * canvas.pixel;
        if (before) write(from - args.channels, 1, to - canvas.pixel, frame, nullptr);
        write(from, region.columns, to, frame, kept);
        to += region.columns * canvas.pixel;
        if (behind) write(from + int64_t(region.columns) * args.channels, 1, to, frame, nullptr);
        if (at_end && canvas.pitch > region.columns + 1) memset(to, 0, sizeof(Bf16) * canvas.pixel);
    }

    void write(const T *from, int count, Bf16 *to, int frame, T *kept) {
        const bool normed = args.gain && frame >= depth, full = args.channels % DEPTH == 0;
        const auto write = normed ? (full ? write_pixels<T, true, true> : write_pixels<T, true, false>)
                                  : (full ? write_pixels<T, false, true> : write_pixels<T, false, false>);
        write(from, count, args.channels, args.gain, to, kept);
    }

    void multiply(int frame, int group) {
        find_lefts(frame, group);
        const int skipped = args.past || frame >= depth ? 0 : (depth - frame) * (steps / args.taps[0]);
        const int sixteens = (args.outputs + TILE - 1) / TILE;
        const int64_t column = int64_t(steps) * PARTS * TILE_SIZE;  // of weights, those of 16 outputs
        for (int first = 0; first < sixteens; first += 2) {
            const bool wide = first + 1 < sixteens;
            const int block = wide ? 2 * TILE : 4 * TILE;
            const Bf16 *weight = args.weight + (int64_t(group) * sixteens + first) * column;
            const bool at_once = steps - skipped <= steps_at_once;
            for (int from = skipped; from < steps; from += steps_at_once) {
                const int to = from + steps_at_once < steps ? from + steps_at_once : steps;
                float *sum = sums;
                for (int pixel = 0; pixel < pixels; pixel += block, sum += at_once ? 0 : SUMS) {
                    const int64_t offset = int64_t(pixel) * canvas.pixel;
                    if (wide) {
                        multiply_wide(offset, weight, weight + column, from, to, sum, from > skipped);
                    } else {
                        multiply_narrow(offset, weight, from, to, sum, from > skipped);
                    }
                    if (to == steps) finish(frame, group, first * TILE, pixel, block, sum);
                }
            }
        }
    }

    // Where the left-hand tile of the region's first pixel is, for each tap and chunk of channels.
    void find_lefts(int frame, int group) {
        const Bf16 **left = lefts;
        for (int t = 0; t < args.taps[0]; t++) {
            const Bf16 *slot = ring + (frame + t) % (depth + 1) * int64_t(canvas.slot);
            for (int h = 0; h < args.taps[1]; h++) {
                const int row = canvas.edge_rows + args.first_row[group] + h;
                const int column = canvas.edge_columns + args.first_column[group];
                const Bf16 *at = slot + (row * canvas.pitch + column) * int64_t(canvas.pixel);
                for (int chunk = 0; chunk < chunks; chunk++) {
                    for (int w = 0; w < args.taps[2]; w++) *left++ = at + chunk * DEPTH + w * canvas.pixel;
                }
            }
        }
    }

#define LOAD_LEFT(part)                                             \
    load_tile<4>(left + (part) * width, stride);                  \
    load_tile<5>(left + (part) * width + TILE * canvas.pixel, stride);
#define LOAD_RIGHT(part)                                            \
    load_tile<6>(right + (part) * TILE_SIZE, 64);                 \
    load_tile<7>(right + beside + (part) * TILE_SIZE, 64);
#define MULTIPLY                                                    \
    _tile_dpbf16ps(0, 4, 6);                                        \
    _tile_dpbf16ps(1, 4, 7);                                        \
    _tile_dpbf16ps(2, 5, 6);                                        \
    _tile_dpbf16ps(3, 5, 7);

    // 32 pixels by 32 outputs, some of the steps.
    __attribute__((noinline)) void multiply_wide(int64_t offset, const Bf16 *weight, const Bf16 *second, int from,
                                                 int to, float *sum, bool goes_on) {
        const int64_t stride = canvas.pixel * int64_t(sizeof(Bf16)), width = chunks * DEPTH, beside = second - weight;
        if (goes_on) {
            load_tile<0>(sum, 128);
            load_tile<1>(sum + TILE, 128);
            load_tile<2>(sum + TILE * 32, 128);
            load_tile<3>(sum + TILE * 32 + TILE, 128);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        __asm__ volatile("" ::: "memory");
        for (int step = from; step < to; step++) {
            const Bf16 *left = lefts[step] + offset, *right = weight + step * int64_t(PARTS * TILE_SIZE);
            LOAD_LEFT(0)
            LOAD_RIGHT(0)
            MULTIPLY
            if (PARTS > 1) {
                LOAD_RIGHT(1)
                MULTIPLY
                LOAD_LEFT(1)
                MULTIPLY
                LOAD_RIGHT(0)
                MULTIPLY
                LOAD_LEFT(2)
                MULTIPLY
                LOAD_LEFT(0)
                LOAD_RIGHT(2)
                MULTIPLY
            }
        }
        store_tile<0>(sum, 128);
        store_tile<1>(sum + TILE, 128);
        store_tile<2>(sum + TILE * 32, 128);
        store_tile<3>(sum + TILE * 32 + TILE, 128);
    }

#undef LOAD_RIGHT
#undef MULTIPLY
#define LOAD_RIGHT(part) load_tile<7>(right + (part) * TILE_SIZE, 64);
#define MULTIPLY(part)                                                      \
    load_tile<4>(left + (part) * width, stride);                          \
    _tile_dpbf16ps(0, 4, 7);                                                \
    load_tile<5>(left + (part) * width + TILE * canvas.pixel, stride);    \
    _tile_dpbf16ps(1, 5, 7);                                                \
    load_tile<6>(left + (part) * width + 2 * TILE * canvas.pixel, stride);\
    _tile_dpbf16ps(2, 6, 7);                                                \
    load_tile<4>(left + (part) * width + 3 * TILE * canvas.pixel, stride);\
    _tile_dpbf16ps(3, 4, 7);

    // 64 pixels by 16 outputs, in the same order.
    __attribute__((noinline)) void multiply_narrow(int64_t offset, const Bf16 *weight, int from, int to, float *sum,
                                                   bool goes_on) {
        const int64_t stride = canvas.pixel * int64_t(sizeof(Bf16)), width = chunks * DEPTH;
        if (goes_on) {
            load_tile<0>(sum, 64);
            load_tile<1>(sum + TILE_SUMS, 64);
            load_tile<2>(sum + 2 * TILE_SUMS, 64);
            load_tile<3>(sum + 3 * TILE_SUMS, 64);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        __asm__ volatile("" ::: "memory");
        for (int step = from; step < to; step++) {
            const Bf16 *left = lefts[step] + offset, *right = weight + step * int64_t(PARTS * TILE_SIZE);
            LOAD_RIGHT(0)
            MULTIPLY(0)
            if (PARTS > 1) {
                LOAD_RIGHT(1)
                MULTIPLY(0)
                MULTIPLY(1)
                LOAD_RIGHT(0)
                MULTIPLY(1)
                MULTIPLY(2)
                LOAD_RIGHT(2)
                MULTIPLY(0)
            }
        }
        store_tile<0>(sum, 64);
        store_tile<1>(sum + TILE_SUMS, 64);
        store_tile<2>(sum + 2 * TILE_SUMS, 64);
        store_tile<3>(sum + 3 * TILE_SUMS, 64);
    }

    // Adds bias and residual to a block's sums and stores those of the region's pixels.
    void finish(int frame, int group, int output, int pixel, int count, const float *sum) {
        const int left = args.outputs - output, width = count == 2 * TILE ? 2 * TILE : TILE;
        const __mmask16 first = up_to(left), second = width > TILE ? up_to(left - 16) : 0;
        const float *bias = args.bias + (int64_t(group) * ((args.outputs + TILE - 1) / TILE)) * TILE + output;
        const __m512 biases[2] = {_mm512_loadu_ps(bias), _mm512_maskz_loadu_ps(width > TILE ? 0xffff : 0, bias + TILE)};
        T *out = static_cast<T *>(args.out) + args.out_group[group] + frame * args.out_frame + output;
        const T *residual = static_cast<const T *>(args.residual);
        int row = pixel / canvas.pitch, column = pixel % canvas.pitch;
        for (int i = 0; i < count && row < region.rows; i += canvas.pitch - column, column = 0, row++) {
            const int64_t y = region.row + row, x = region.column + column;
            const int end = column + count - i < region.columns ? column + count - i : region.columns;
            const int64_t line = residual ? int64_t(frame / args.residual_times) * args.rows + y : 0;
            const T *added = residual + (residual ? (line * args.columns + x) * args.outputs + output : 0);
            T *to = out + y * args.out_row + x * args.out_pixel;
            const float *from = sum + i * width;
            for (int j = column; j < end; j++, from += width, to += args.out_pixel) {
                __m512 low = _mm512_add_ps(_mm512_load_ps(from), biases[0]), high = biases[1];
                if (width > TILE) high = _mm512_add_ps(_mm512_load_ps(from + TILE), high);
                if (residual) {
                    low = _mm512_add_ps(low, load(added, first));
                    high = _mm512_add_ps(high, load(added + TILE, second));
                    added += args.outputs;
                }
                store(to, low, first);
                if (width > TILE) store(to + TILE, high, second);
            }
        }
    }

    static constexpr int TILE_SUMS = TILE * TILE;

    const ConvArgs &args;
    const Region region;
    const Canvas<T> canvas;
    const int depth, chunks, pixels, steps, steps_at_once;
    Bf16 *ring;
    float *sums;
    const Bf16 **lefts;
};

}  // namespace

void convolve_region(const ConvArgs &args, const Region &region) {
    if (args.dtype == BF16) {
        RegionConvolution<Bf16>(args, region).run();
    } else {
        RegionConvolution<float>(args, region).run();
    }
}

int64_t pixel_bytes(const ConvArgs &args) {
    const int parts = args.dtype == BF16 ? parts_of<Bf16> : parts_of<float>;
    return int64_t(args.taps[0]) * parts * padded(args.channels) * sizeof(Bf16);
}

}  // namespace longvid
#endif
