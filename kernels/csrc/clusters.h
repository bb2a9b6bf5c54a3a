// What the entry points (clusters.cpp) and the variants of the kernels (clusters.inc) share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longvid {

constexpr int MAX_ROWS = 32;  // tokens that a kernel takes at a time

// The right-hand side of a product: `count` columns of `depth` numbers, packed as the variant wants them.
struct Columns {
    const float *packed;
    int count, depth;
};

// Attention that some queries have paid already. Its output becomes that of attention to the means, too.
struct Merge {
    float *out[MAX_ROWS];
    float lse[MAX_ROWS];
};

// The kernels for one instruction set. Memory is in floats and aligned to 64 bytes.
struct ClusterVariant {
    // How many numbers a row of products has: the columns, and some that mean nothing.
    int (*stride)(int columns);
    size_t (*packed_size)(int columns, int depth);
    size_t (*scratch)(int dim, int columns);
    // Rows [count][depth] as columns, times scale.
    void (*pack_columns)(const float *from, float scale, int count, int depth, float *packed);
    // Rows [depth][count], each with a number of every column.
    void (*pack_rows)(const float *from, int depth, int count, float *packed);
    // to = -|row|^2 / 2 of each row [count][dim]; -inf from there to `stride`.
    void (*half_squares)(const float *from, int count, int dim, int stride, float *to);
    // labels[i] = the column of the largest product with the i-th token + bias, the first of equal ones; 0 for NaN.
    void (*nearest)(const float *const *tokens, int count, const Columns &columns, const float *bias, int64_t *labels,
                    float *scratch);
    // to[dim] += from[dim].
    void (*add)(const float *from, int dim, float *to);
    // sums[column] += e^d (e^d |v|^2 - 2 v v_mean) over some tokens, with d = min(column (k - k_mean), limit) in units of log2.
    void (*add_errors)(const float *const *k, const float *const *v, int count, const float *k_mean, const float *v_mean,
                       const Columns &columns, float limit, float *sums, float *scratch);
    // Attention of some queries to the columns, as far as their bias is above -inf, merged with what they have. Products may be
    // of 16 bits.
    void (*attend)(const float *const *q, int count, const Columns &keys, const Columns &values, const float *bias,
                   const Merge &merge, float *scratch);
};

extern const ClusterVariant clusters_portable;
extern const ClusterVariant clusters_avx2;
extern const ClusterVariant clusters_avx512;
extern const ClusterVariant clusters_amx;

}  // namespace longvid
