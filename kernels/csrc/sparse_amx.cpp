// The kernels for AMX: products by the matrix units, everything else by AVX-512.
//
// Floats are three bf16 each (amx.inc), bf16 stay as they are: PARTS is 3 or 1. Keys are right-hand tiles of 16 keys (a column),
// values of 32 (a panel). Two left-hand tiles of queries pass two right-hand ones at a time: four sums. While the matrix units
// compute the scores of one unit (two tiles of queries by a chunk of keys) and add the values of another, AVX-512 turns the
// scores of a third into weights, a row after every fourth product. Scores are in units of log2.
#include "isa.h"
#ifdef LONGVID_AMX
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define LANES 16

#include "amx.inc"
#include "sparse.h"
#include "vector.inc"

#include "sparse_amx_pack.inc"
#include "sparse_amx_walk.inc"
#include "sparse_amx_products.inc"
#include "sparse_amx_softmax.inc"
#include "sparse_amx_mass.inc"

namespace longvid {
namespace {

size_t scratch(int dim, int num_blocks) {
    const size_t common = packed_queries(dim, NUM_PARTS) / 2 + 2 * UNIT_SCORES + MAX_ROWS;
    const size_t attend = unit_weights(NUM_PARTS) + size_t(MAX_ROWS) * (LANES + count_dim_tiles(dim) * TILE);
    const size_t mass = size_t(MAX_PIECES) * num_blocks * LANES;
    return common + (attend > mass ? attend : mass);
}

template <int PARTS>
void attend_as(const Task &task, const Task *next, int dim, float scale, float *scratch) {
    const Queries &queries = task.queries;
    const int count = queries.count, dim_tiles = count_dim_tiles(dim);
    const Cut cut(count);
    Pieces memory(scratch);
    Bf16 *q = memory.halves(packed_queries(dim, PARTS));
    float *scores = memory.floats(2 * UNIT_SCORES);
    Bf16 *weights = memory.halves(2 * unit_weights(PARTS));
    const size_t out_size = size_t(2) * cut.pairs * dim_tiles * SUMS;
    const State state{memory.floats(MAX_ROWS), memory.floats(size_t(MAX_ROWS) * LANES), memory.floats(out_size)};
    for (int i = 0; i < count; i++) state.top[i] = -INFINITY_;
    for (int i = 0; i < count * LANES; i++) state.sum[i] = 0;
    for (size_t i = 0; i < out_size; i++) state.out[i] = 0;
    pack_queries<PARTS>(queries, 0, count, cut, 0, dim, q);
    clear_queries<PARTS>(count, cut, dim, q);
    const CutTiles leave(cut.height);
    Softmax<PARTS> softmax(state, cut, dim, scale * LOG2_E, weights);
    const Packing<PARTS> packing(dim);
    const Walk<PARTS> walk{task.panels, packing, task.tiles, task.num_tiles};
    const Task &then = next ? *next : task;
    const Walk<PARTS> then_walk{then.panels, packing, then.tiles, then.num_tiles};
    const int chunks = walk.count_chunks();
    const Following<PARTS> following{next, then_walk, chunks ? (then.queries.count + chunks - 1) / chunks : 0};
    for_units<PARTS>(q, cut, count, walk, following, dim, scores, softmax);
    softmax.finish();
    finish<PARTS>(queries, state, cut, dim, task.output);
}

void attend(const Task &task, const Task *next, int dim, float scale, float *scratch) {
    const auto as = task.queries.is_bf16 ? attend_as<1> : attend_as<NUM_PARTS>;
    as(task, next, dim, scale, scratch);
}

PanelSize panel_size(int dim, bool is_bf16) {
    const size_t tile = size_t(is_bf16 ? 1 : NUM_PARTS) * TILE_SIZE / 2;
    return {2 * count_steps(dim) * tile, count_dim_tiles(dim) * tile};
}

}  // namespace

const Variant amx{PANEL, panel_size, scratch, pack, attend, mass};

}  // namespace longvid
#endif
