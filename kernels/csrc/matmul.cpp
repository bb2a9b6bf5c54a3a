// Linear layers on the CPU: cuts rows and columns into blocks and deals them to threads. Plain C entry points, for ctypes.

#include "matmul.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "isa.h"
#include "kept.h"

namespace longvid {
namespace {

constexpr int64_t MOST_ROWS = 256;  // of x in parts, which stay in the second cache while weights pass by

// Of the depth, as much at a time; by dtype. The order in which a sum is added up hangs on it, and on nothing else.
constexpr int64_t MOST_STEPS[] = {24, 48};

constexpr int64_t FEW_BLOCKS = 4;  // of rows, for which alone no panel is read

// Panels that are at work at once: of their sums, and of weights that are packed in the call.
constexpr int64_t MOST_PANELS = 32;
constexpr int64_t PACKED_BYTES = int64_t(32) << 20;

// Products of bf16, below which waking threads costs more than they save.
constexpr int64_t WORTH_WAKING = int64_t(1) << 26;

// Above this, memory does not stay with the thread from call to call.
constexpr size_t KEPT_BYTES = size_t(128) << 20;

constexpr int64_t PAIR_BYTES = 2048;  // of two tiles
constexpr int64_t SUMS = PANEL * PANEL;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t parts_of(int32_t dtype) { return dtype == LINEAR_BF16 ? 1 : 3; }

int64_t panel_bytes(int64_t depth, int32_t dtype) { return ceil_div(depth, STEP) * parts_of(dtype) * PAIR_BYTES; }

// How one product is cut: items are some rows by some columns of a group of panels, along the whole depth.
struct Cut {
    int64_t parts, steps, panels;
    int64_t steps_at_once;  // of the depth, between which sums wait in memory
    int64_t panels_in_group, blocks_in_item, row_items, column_items;
    int threads;

    explicit Cut(const LinearArgs &args) {
        parts = parts_of(args.dtype), steps = ceil_div(args.depth, STEP), panels = ceil_div(args.columns, PANEL);
        const int64_t work = args.rows * args.columns * args.depth * (parts == 1 ? 1 : 6);
        threads = work >= 2 * WORTH_WAKING ? std::max(args.threads, 1) : 1;
        steps_at_once = ceil_div(steps, ceil_div(steps, MOST_STEPS[args.dtype]));
        panels_in_group = std::clamp<int64_t>(PACKED_BYTES / panel_bytes(args.depth, args.dtype), 1, MOST_PANELS);
        panels_in_group = std::min(panels_in_group, panels);
        const int64_t blocks = ceil_div(args.rows, PANEL), rounds = ceil_div(args.rows, MOST_ROWS * threads);
        // With few rows it is columns that are dealt out.
        blocks_in_item = std::max(ceil_div(blocks, rounds * threads), std::min(blocks, FEW_BLOCKS));
        row_items = ceil_div(blocks, blocks_in_item);
        column_items = std::clamp<int64_t>(threads / row_items, 1, panels_in_group);
    }

    bool waits() const { return steps_at_once < steps; }
    int64_t parts_bytes() const { return blocks_in_item * steps_at_once * parts * PAIR_BYTES; }
    int64_t sums_bytes() const { return waits() ? blocks_in_item * panels_in_group * SUMS * int64_t(sizeof(float)) : 0; }
    int64_t scratch() const { return parts_bytes() + sums_bytes(); }
    int64_t group_bytes() const { return panels_in_group * steps * parts * PAIR_BYTES; }
};

// One item of a group of panels, whose packed weights begin at `packed`.
void run_item(const LinearVariant &variant, const LinearArgs &args, const Cut &cut, int64_t group, int64_t item,
              const uint16_t *packed, uint8_t *scratch) {
    const int64_t count = std::min(cut.panels_in_group, cut.panels - group);
    const int64_t row_item = item / cut.column_items, column_item = item % cut.column_items;
    const int64_t first = count * column_item / cut.column_items, last = count * (column_item + 1) / cut.column_items;
    const int64_t block = row_item * cut.blocks_in_item, row = block * PANEL;
    const int num_blocks = int(std::min(cut.blocks_in_item, ceil_div(args.rows, PANEL) - block));
    const int64_t size = cut.parts * PAIR_BYTES / int64_t(sizeof(uint16_t));  // of a step
    uint16_t *parts = reinterpret_cast<uint16_t *>(scratch);
    float *sums = reinterpret_cast<float *>(scratch + cut.parts_bytes());
    for (int64_t step = 0; step < cut.steps; step += cut.steps_at_once) {
        const int num_steps = int(std::min(cut.steps_at_once, cut.steps - step));
        variant.split(args, row, num_blocks, step, num_steps, parts);
        for (int64_t panel = first; panel < last; panel++) {
            const uint16_t *right = packed + (panel * cut.steps + step) * size;
            float *waiting = sums + (panel - first) * num_blocks * SUMS;
            const bool is_last = step + num_steps == cut.steps;
            const int64_t column = (group + panel) * PANEL;
            const uint16_t *next = right + cut.steps * size;
            variant.multiply(args, {parts, right, next, waiting, row, column, num_blocks, num_steps, step == 0, is_last});
        }
    }
}

// Calls work(i, thread) for all i below count.
template <typename Work>
void deal(int threads, int64_t count, const Work &work) {
    if (threads == 1) {
        for (int64_t i = 0; i < count; i++) work(i, 0);
        return;
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
#ifdef _OPENMP
        work(i, omp_get_thread_num());
#else
        work(i, 0);
#endif
    }
}

enum LinearStatus { LINEAR_DONE = 0, LINEAR_UNSUPPORTED = 1, LINEAR_NO_MEMORY = 2 };

int run(const LinearVariant &variant, const LinearArgs &args) {
    const Cut cut(args);
    const int64_t packed_bytes = args.packed ? 0 : cut.group_bytes();
    const Kept<LinearArgs, KEPT_BYTES> memory(packed_bytes + cut.threads * cut.scratch());
    if (!memory.get()) return LINEAR_NO_MEMORY;
    uint16_t *room = reinterpret_cast<uint16_t *>(memory.get());
    uint8_t *scratch = memory.get() + packed_bytes;
    const int64_t panel_size = cut.steps * cut.parts * PAIR_BYTES / 2, items = cut.row_items * cut.column_items;
    const uint16_t *given = static_cast<const uint16_t *>(args.packed);
    for (int64_t group = 0; group < cut.panels; group += cut.panels_in_group) {
        const int64_t count = std::min(cut.panels_in_group, cut.panels - group);
        const uint16_t *packed = given ? given + group * panel_size : room;
        deal(cut.threads, given ? 0 : count, [&](int64_t i, int) {
            variant.pack(args, group + i, room + i * panel_size);
        });
        deal(cut.threads, items, [&](int64_t item, int thread) {
            run_item(variant, args, cut, group, item, packed, scratch + thread * cut.scratch());
        });
    }
    return LINEAR_DONE;
}

}  // namespace
}  // namespace longvid

using namespace longvid;

extern "C" {

// Bytes of a weight [columns, depth] when it is packed.
int64_t longvid_packed_bytes(int64_t columns, int64_t depth, int32_t dtype) {
    return ceil_div(columns, PANEL) * panel_bytes(depth, dtype);
}

#ifdef LONGVID_AMX
// Both: 0, 1 where this processor has no matrix units, or 2 where memory is lacking. Packed weights begin at 64 bytes.

int longvid_pack(const LinearArgs *args, void *packed) {
    if (!has_amx()) return LINEAR_UNSUPPORTED;
    const int64_t panels = ceil_div(args->columns, PANEL), size = panel_bytes(args->depth, args->dtype) / 2;
    for (int64_t i = 0; i < panels; i++) linear_amx.pack(*args, i, static_cast<uint16_t *>(packed) + i * size);
    return LINEAR_DONE;
}

int longvid_linear(const LinearArgs *args) { return has_amx() ? run(linear_amx, *args) : LINEAR_UNSUPPORTED; }
#else
int longvid_pack(const LinearArgs *, void *) { return LINEAR_UNSUPPORTED; }

int longvid_linear(const LinearArgs *) { return LINEAR_UNSUPPORTED; }
#endif

}  // extern "C"
