// Convolutions on the CPU: cuts the image into regions and deals these to threads. A plain C entry point, for ctypes.

#include "conv.h"

#include "isa.h"

namespace longvid {
namespace {

// Of multiplications, below which waking threads costs more than they save.
constexpr int64_t WORTH_A_THREAD = int64_t(1) << 23;
// What a region keeps of its input should stay in a core's second cache, beside the weights.
constexpr int64_t REGION_BYTES = int64_t(5) << 18;
constexpr int MIN_ROWS = 8, MIN_COLUMNS = 32;  // so that little of a region is border

int divide_up(int64_t a, int64_t b) { return int((a + b - 1) / b); }

int64_t multiplications(const ConvArgs &args) {
    const int64_t pixels = int64_t(args.frames) * args.rows * args.columns;
    return pixels * args.taps[0] * args.taps[1] * args.taps[2] * args.channels * args.groups * args.outputs;
}

}  // namespace
}  // namespace longvid

using namespace longvid;

extern "C" {

// 0, or 1 where the matrix units are not there.
int longvid_convolve(const ConvArgs *args) {
#ifdef LONGVID_AMX
    if (!has_amx()) return 1;
    const int64_t useful = multiplications(*args) / WORTH_A_THREAD + 1;
    const int threads = int(useful < args->threads ? useful : args->threads);
    const int64_t bytes = pixel_bytes(*args);
    int across = 1;
    while (divide_up(args->columns, across + 1) >= MIN_COLUMNS &&
           (MIN_ROWS + 2) * bytes * divide_up(args->columns, across) > REGION_BYTES) {
        across++;
    }
    int64_t rows = REGION_BYTES / (bytes * divide_up(args->columns, across)) - 2;
    rows = rows < MIN_ROWS ? MIN_ROWS : rows;
    const int share = divide_up(args->rows, threads);
    const int down = divide_up(args->rows, rows < share ? rows : share);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int i = 0; i < down * across; i++) {
        const int64_t y = i / across, x = i % across;
        const int row = int(args->rows * y / down), column = int(args->columns * x / across);
        const int end = int(args->rows * (y + 1) / down), right = int(args->columns * (x + 1) / across);
        convolve_region(*args, {row, end - row, column, right - column});
    }
    return 0;
#else
    return 1;
#endif
}

}  // extern "C"
