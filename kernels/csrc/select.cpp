// Which columns of each row are chosen by score, on the CPU. Plain C entry points, for ctypes. Of equal scores the smaller
// column counts as the larger; NaN counts as the largest. Rows choose on their own, each by one thread.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

namespace longvid {
namespace {

// Of scores, below which waking threads costs more than they save.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

// A score and its column as one number that is the larger, the earlier the column is chosen.
uint64_t key_of(float score, int column) {
    score += 0.0f;  // -0 equals 0
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    bits = score != score ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t(bits) << 32 | (0xffffffffu - uint32_t(column));
}

int column_of(uint64_t key) { return int(0xffffffffu - uint32_t(key)); }

}  // namespace

extern "C" {

// Scores and mask [rows][columns]; what else there is of a row, or of each column, lies behind each other too.
struct TopKArgs {
    const float *scores;
    const int64_t *counts;  // [rows]
    bool *mask;
    int64_t rows;
    int32_t columns, threads;
};

struct TopPArgs {
    const float *weights;
    bool *mask;
    int64_t rows;
    int32_t columns, min_keep, max_keep, threads;
    float p;
};

struct GreedyArgs {
    const float *scores;
    const double *area;    // [rows][columns]
    const double *budget;  // [rows]
    bool *mask;
    int64_t rows;
    int32_t columns, threads;
};

}  // extern "C"

namespace {

// Calls choose(row, keys), which puts the keys of chosen columns first and gives their number.
template <typename Choose>
int choose_rows(const float *scores, bool *mask, int64_t rows, int columns, int threads, const Choose &choose) {
    const int64_t useful = std::min<int64_t>(threads, rows * columns / WORTH_A_THREAD + 1);
    bool has_failed = false;
#pragma omp parallel num_threads(int(useful)) reduction(|| : has_failed)
    {
        std::vector<uint64_t> keys;
        try {
            keys.resize(columns);
        } catch (const std::bad_alloc &) {
            has_failed = true;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (has_failed) continue;
            for (int c = 0; c < columns; c++) keys[c] = key_of(scores[row * columns + c], c);
            const int count = choose(row, keys.data());
            std::fill_n(mask + row * columns, columns, false);
            for (int i = 0; i < count; i++) mask[row * columns + column_of(keys[i])] = true;
        }
    }
    return has_failed;
}

void sort_falling(uint64_t *keys, int count) { std::sort(keys, keys + count, std::greater<uint64_t>()); }

int within(int64_t count, int columns) { return int(std::clamp<int64_t>(count, std::min(1, columns), columns)); }

}  // namespace
}  // namespace longvid

using namespace longvid;

extern "C" {

// 0, or 1 where there is no memory.
int longvid_top_k(const TopKArgs *args) {
    const int columns = args->columns;
    return choose_rows(args->scores, args->mask, args->rows, columns, args->threads, [&](int64_t row, uint64_t *keys) {
        const int count = within(args->counts[row], columns);
        if (count < columns) std::nth_element(keys, keys + count, keys + columns, std::greater<uint64_t>());
        return count;
    });
}

// The fewest columns that hold p of a row's weight. Sums are in fp64, kept in fp32.
int longvid_top_p(const TopPArgs *args) {
    const int columns = args->columns;
    return choose_rows(args->weights, args->mask, args->rows, columns, args->threads, [&](int64_t row, uint64_t *keys) {
        const float *weights = args->weights + row * columns;
        sort_falling(keys, columns);
        double whole = 0, held = 0;
        for (int i = 0; i < columns; i++) whole += weights[column_of(keys[i])];
        int count = 0;
        while (count < columns && float(held) < args->p * float(whole)) held += weights[column_of(keys[count++])];
        return within(std::min(std::max(count, args->min_keep), args->max_keep), columns);
    });
}

// Columns by falling score, up to the first with which their area exceeds the budget.
int longvid_greedy_area(const GreedyArgs *args) {
    const int columns = args->columns;
    return choose_rows(args->scores, args->mask, args->rows, columns, args->threads, [&](int64_t row, uint64_t *keys) {
        const double *area = args->area + row * columns;
        sort_falling(keys, columns);
        double used = 0;
        int count = 0;
        for (; count < columns; count++) {
            used += area[column_of(keys[count])];
            if (!(used <= args->budget[row])) break;
        }
        return within(count, columns);
    });
}

}  // extern "C"
