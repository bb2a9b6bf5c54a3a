// Blocks of tokens and layouts of tiles, as the entry points of sparse.cpp and clusters.cpp take them. Not for the files of a variant:
// the linker must not choose a copy that was built for one processor to serve on another.
#pragma once

#include <algorithm>
#include <cstdint>

extern "C" {

// Tokens cut into blocks. Offsets [groups or 1][blocks + 1]; order [groups or 1][tokens] or null. A stride of 0 says 1.
struct BlocksArgs {
    const int32_t *offsets, *order;
    int64_t offsets_stride, order_stride;
    int32_t num_blocks, num_tokens;
};

}  // extern "C"

namespace longvid {

inline const int32_t *offsets_of(const BlocksArgs &blocks, int64_t group) { return blocks.offsets + group * blocks.offsets_stride; }

inline const int32_t *order_of(const BlocksArgs &blocks, int64_t group) {
    return blocks.order ? blocks.order + group * blocks.order_stride : nullptr;
}

// Whether every index stays inside what it indexes.
inline bool is_valid(const BlocksArgs &blocks, int64_t num_groups) {
    for (int64_t g = 0; g < (blocks.offsets_stride ? num_groups : 1); g++) {
        const int32_t *offsets = offsets_of(blocks, g);
        if (offsets[0] != 0 || offsets[blocks.num_blocks] != blocks.num_tokens) return false;
        if (!std::is_sorted(offsets, offsets + blocks.num_blocks + 1)) return false;
    }
    if (!blocks.order) return true;
    const int64_t count = (blocks.order_stride ? num_groups : 1) * blocks.num_tokens;
    return std::all_of(blocks.order, blocks.order + count, [&](int32_t token) { return token >= 0 && token < blocks.num_tokens; });
}

// The same of a layout: blocks of queries and keys, compressed rows of tiles, and the group of each head.
template <typename Args>
bool has_valid_layout(const Args &args) {
    if (!is_valid(args.q_blocks, args.num_groups) || !is_valid(args.k_blocks, args.num_groups)) return false;
    const int rows = args.q_blocks.num_blocks;
    for (int g = 0; g < args.num_groups; g++) {
        const int32_t *row_ptr = args.row_ptr + int64_t(g) * (rows + 1);
        if (row_ptr[0] < 0 || row_ptr[rows] > args.num_col || !std::is_sorted(row_ptr, row_ptr + rows + 1)) return false;
        for (int i = row_ptr[0]; i < row_ptr[rows]; i++)
            if (args.col[i] < 0 || args.col[i] >= args.k_blocks.num_blocks) return false;
    }
    const int groups = args.group_batch ? args.batch * args.heads : args.heads;
    return std::all_of(args.group, args.group + groups, [&](int g) { return g >= -1 && g < args.num_groups; });
}

}  // namespace longvid
