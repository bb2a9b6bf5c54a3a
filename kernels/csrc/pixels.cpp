// What a decoder makes of an image, as bytes. Plain C entry point, for ctypes.

#include <cstdint>
#include <cstring>

#include "rows.h"

namespace longvid {

// A row of the input has `columns` cells of COLORS x patch x patch numbers (color, column, row): these become `patch`
// rows of pixels.
struct PixelArgs {
    const void *x;
    uint8_t *out;
    int64_t rows;
    int32_t columns, patch, dtype, threads;
};

namespace {

constexpr int COLORS = 3;
constexpr int64_t WORTH_A_THREAD = int64_t(1) << 20;  // numbers, below which waking threads costs more than they save
constexpr int AT_ONCE = 256;

inline float widen(const float *x) { return *x; }
inline float widen(const uint16_t *x) {
    const uint32_t bits = uint32_t(*x) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// [-1, 1] to 0 up to 255, rounded to even between two. A float near 1.5 * 2^23 has its integer part in its last bits.
template <typename T>
void round_to_bytes(const T *x, int count, uint8_t *out) {
    for (int i = 0; i < count; i++) {
        const float value = widen(x + i), above = value < -1.0f ? -1.0f : value, held = above > 1.0f ? 1.0f : above;
        const float rounded = (held + 1.0f) * 127.5f + 12582912.0f;
        uint32_t bits;
        memcpy(&bits, &rounded, sizeof bits);
        out[i] = uint8_t(bits);
    }
}

template <typename T>
void convert_row(const PixelArgs &args, int64_t row) {
    const int patch = args.patch, cell = COLORS * patch * patch, cells = AT_ONCE / cell > 0 ? AT_ONCE / cell : 1;
    const int64_t line = int64_t(args.columns) * patch * COLORS;
    uint8_t bytes[AT_ONCE];
    for (int column = 0; column < args.columns; column += cells) {
        const int some = args.columns - column < cells ? args.columns - column : cells;
        round_to_bytes(static_cast<const T *>(args.x) + (row * args.columns + column) * cell, some * cell, bytes);
        for (int y = 0; y < patch; y++) {
            uint8_t *out = args.out + (row * patch + y) * line + int64_t(column) * patch * COLORS;
            for (int i = 0; i < some; i++) {
                for (int x = 0; x < patch; x++) {
                    for (int color = 0; color < COLORS; color++) {
                        *out++ = bytes[((i * COLORS + color) * patch + x) * patch + y];
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace longvid

using namespace longvid;

extern "C" {

void longvid_pixels(const PixelArgs *args) {
    const int64_t count = args->rows * args->columns * COLORS * args->patch * args->patch;
    const int64_t useful = count / WORTH_A_THREAD + 1;
    const int threads = int(useful < args->threads ? useful : args->threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < args->rows; row++) {
        args->dtype == BF16 ? convert_row<uint16_t>(*args, row) : convert_row<float>(*args, row);
    }
}

}  // extern "C"
