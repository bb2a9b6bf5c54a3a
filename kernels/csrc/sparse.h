// What the entry points (sparse.cpp) and the variants of the kernels (variant.inc) share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longvid {

constexpr int MAX_QUERIES = 128;  // of one work item
constexpr int MAX_PIECES = 16;  // of rows whose masses are summed together
constexpr int MAX_DIM = 256;  // of a head

// Some queries of one head: the places first, first + step, ... of an order.
struct Queries {
    const float *data;  // bf16 where is_bf16 says so, which the variant amx alone takes
    int64_t stride;  // between tokens; the elements of one lie side by side
    const int32_t *order;  // the token at each place; null: its own
    int first, step, count;
    bool is_bf16;

    int64_t token(int i) const {
        const int place = first + i * step;
        return order ? order[place] : place;
    }
};

// The keys and values of one head, gathered into panels of as many keys as a vector has lanes. Each block of keys begins
// with a panel of its own. How keys and values lie is said for the variants of variant.inc; amx has tiles of bf16.
struct Panels {
    float *k;     // [panel][dim][lane]; 0 past the end of a block
    float *v;     // [panel][span of the padded dim][lane][element of the span]; null where values are not needed
    float *bias;  // [panel][lane], in units of log2; -inf past the end of a block
    const int32_t *starts;   // [blocks + 1]: the first panel of each block
    const int32_t *offsets;  // [blocks + 1]: the first place of each block
    int num_blocks;
    bool has_bias;  // else all are 0 but past the end of a block
};

// The keys, values and bias of one head as they came.
struct Source {
    const float *k, *v, *bias;  // v and bias may be null; k and v are bf16 where is_bf16 says so
    int64_t k_stride, v_stride;
    const int32_t *order;
    bool is_bf16;
};

struct Output {
    float *out, *lse;  // out is bf16 where the queries are
    int64_t out_stride, lse_stride;
};

// Queries of a row of tiles, the keys and values that they see, and where their results go.
struct Task {
    Queries queries;
    Panels panels;
    const int32_t *tiles;  // the blocks of keys
    int num_tiles;
    Output output;
};

// Floats of the keys and of the values of one panel.
struct PanelSize {
    size_t k, v;
};

// The kernels for one instruction set.
struct Variant {
    int lanes;  // keys of a panel
    PanelSize (*panel_size)(int dim, bool is_bf16);
    // Floats that a thread needs as scratch memory, aligned to 64 bytes.
    size_t (*scratch)(int dim, int num_blocks);
    // The blocks [first, stop).
    void (*pack)(const Source &source, const Panels &panels, int dim, int first, int stop);
    // At most MAX_QUERIES queries. What the thread's next task will read is asked for meanwhile; there may be none.
    void (*attend)(const Task &task, const Task *next, int dim, float scale, float *scratch);
    // mass[row][block] = factors[row] * sum over the row's queries and the block's keys of exp(score - lse).
    void (*mass)(const Queries *rows, int num_rows, const Panels &panels, int dim, float scale, const float *lse,
                 int64_t lse_stride, const float *factors, float *mass, float *scratch);
};

inline int padded(int dim, int lanes) { return (dim + lanes - 1) / lanes * lanes; }

extern const Variant portable;
extern const Variant avx2;
extern const Variant avx512;
extern const Variant amx;

}  // namespace longvid
