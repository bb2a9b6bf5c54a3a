// Clusters of tokens on the CPU: k-means, what a cluster's mean misses, and attention to means. Plans the work, deals it to
// threads, and calls the kernels of a variant. Plain C entry points, for ctypes. Every result is computed by one thread in one
// order, so it does not depend on how many threads there are.

#include "clusters.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "blocks.h"
#include "isa.h"

namespace longvid {
namespace {

const ClusterVariant *find(int isa) {
#ifdef LONGVID_AMX
    if (isa == 3) return &clusters_amx;
#endif
#ifdef LONGVID_X86_VARIANTS
    if (isa >= 2) return &clusters_avx512;
    if (isa == 1) return &clusters_avx2;
#endif
    return isa == 0 ? &clusters_portable : nullptr;
}

constexpr float LOG2_E = 1.44269504088896340736f;

// Tokens of one head that a thread takes at a time, at least, and for each cluster.
constexpr int SPAN = 256, PART_TOKENS = 8;

// Tokens from the one that is at work to the one that is asked for.
constexpr int AHEAD = 16;

// Of memory that is kept from call to call.
constexpr size_t KEPT_BYTES = size_t(16) << 20;

size_t aligned(size_t floats) { return (floats + 15) / 16 * 16; }

struct Free {
    void operator()(float *memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

// Memory that the calling thread keeps from call to call, unless it is much: to touch new pages takes time.
class Workspace {
  public:
    explicit Workspace(size_t count) {
        if (count > size_) {
            size_ = 0;
            memory_ = nullptr;
            memory_.reset(new (std::align_val_t(64)) float[count]);
            size_ = count;
        }
    }
    ~Workspace() {
        if (size_ * sizeof(float) <= KEPT_BYTES) return;
        memory_ = nullptr;
        size_ = 0;
    }
    Workspace(const Workspace &) = delete;
    // The next part; parts follow each other.
    float *take(size_t count) {
        float *part = memory_.get() + taken_;
        taken_ += aligned(count);
        return part;
    }

  private:
    size_t taken_ = 0;
    static thread_local std::unique_ptr<float[], Free> memory_;
    static thread_local size_t size_;
};

thread_local std::unique_ptr<float[], Free> Workspace::memory_;
thread_local size_t Workspace::size_ = 0;

// Asks for a token's numbers ahead of their turn: tokens lie apart, each in a page that the processor must look up first.
void ask(const float *token, int dim) {
    for (int d = 0; d < dim; d += 16) __builtin_prefetch(token + d);
}

// Calls work(i, thread) for i in [0, count): whichever thread is free takes the next.
template <typename Work>
void deal(int64_t count, int threads, const Work &work) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
#ifdef _OPENMP
        work(i, omp_get_thread_num());
#else
        work(i, 0);
#endif
    }
}

}  // namespace

extern "C" {

// Floats with strides between batch entries, tokens and heads; the elements of a head lie side by side.
struct TokensArgs {
    float *data;
    int64_t batch, token, head;
};

struct KmeansArgs {
    TokensArgs x;
    float *centroids;  // [batch][heads][clusters][dim]: those to begin with, and then the means of their tokens
    int64_t *labels;   // [batch][heads][tokens]
    int32_t batch, heads, tokens, clusters, dim, iterations, threads, isa;
};

struct SortArgs {
    const int64_t *labels;  // [groups][tokens]
    int32_t *offsets;       // [groups][clusters + 1]
    int32_t *order;         // [groups][tokens]
    int32_t groups, tokens, clusters, threads;
};

struct MeansArgs {
    TokensArgs x;
    BlocksArgs blocks;  // a group for each head of each batch entry, or one for all
    float *means;       // [batch][heads][blocks][dim]
    int32_t batch, heads, dim, threads, isa;
};

struct ErrorArgs {
    TokensArgs k, v;
    const int32_t *offsets, *order;  // [batch][heads][clusters + 1], [batch][heads][tokens]
    const float *queries;            // [batch][heads][rows][dim]
    const float *k_mean, *v_mean;    // [batch][heads][clusters][dim]
    float *sums;                     // [batch][heads][clusters][rows]
    int32_t batch, heads, tokens, clusters, rows, dim, sample_every, threads, isa;
    float limit;
};

struct SkippedArgs {
    TokensArgs q, out, lse;  // out is merged with attention to means
    const float *k_mean, *v_mean;  // [batch][heads][blocks of keys][dim]
    BlocksArgs q_blocks, k_blocks;
    const int32_t *row_ptr, *col, *group;
    int64_t group_batch, num_col;
    int32_t num_groups, batch, heads, dim, threads, isa;
    float scale;
};

enum ClusterStatus { CLUSTERED = 0, UNKNOWN_ISA = 1, BAD_CLUSTERS = 2, NO_ROOM = 3 };

}  // extern "C"

namespace {

float *at(const TokensArgs &x, int64_t head, int heads) { return x.data + head / heads * x.batch + head % heads * x.head; }

struct Group {
    const int32_t *offsets, *order;
    int64_t token(int place) const { return order ? order[place] : place; }
};

Group group_of(const BlocksArgs &blocks, int64_t group) { return {offsets_of(blocks, group), order_of(blocks, group)}; }

// Tokens of one head whose sums one thread keeps: many beside the clusters, so that adding the sums up is little work.
int tokens_of_part(const KmeansArgs &args) {
    return (std::max(SPAN, PART_TOKENS * args.clusters) + MAX_ROWS - 1) / MAX_ROWS * MAX_ROWS;
}

// What the tokens of a part add up to, by cluster.
struct Sums {
    float *sums;  // [clusters][dim]
    float *sizes;  // [clusters]
};

// Labels of the tokens from `begin` on, and their sums while they are near. Whether a label is another than before.
bool label_part(const KmeansArgs &args, const ClusterVariant &variant, int64_t head, int begin, const Columns &columns,
                const float *bias, const Sums &sums, float *scratch) {
    const float *x = at(args.x, head, args.heads);
    int64_t *labels = args.labels + head * args.tokens;
    const int stop = std::min(begin + tokens_of_part(args), args.tokens);
    std::fill_n(sums.sums, size_t(args.clusters) * args.dim, 0.0f);
    std::fill_n(sums.sizes, args.clusters, 0.0f);
    bool has_changed = false;
    for (int first = begin; first < stop; first += MAX_ROWS) {
        const float *tokens[MAX_ROWS];
        int64_t found[MAX_ROWS];
        const int count = std::min(MAX_ROWS, stop - first);
        for (int row = 0; row < count; row++) {
            tokens[row] = x + (first + row) * args.x.token;
            if (first + row + MAX_ROWS < stop) ask(tokens[row] + MAX_ROWS * args.x.token, args.dim);
        }
        variant.nearest(tokens, count, columns, bias, found, scratch);
        has_changed |= !std::equal(found, found + count, labels + first);
        std::copy_n(found, count, labels + first);
        for (int row = 0; row < count && args.iterations; row++) {
            sums.sizes[found[row]]++;
            variant.add(tokens[row], args.dim, sums.sums + found[row] * args.dim);
        }
    }
    return has_changed;
}

// Tokens to their nearest centroids, and centroids to the means of their tokens, again and again; empty ones stay. A head
// whose labels no longer change is done. Without iterations tokens go to the centroids as they are.
void cluster(const KmeansArgs &args, const ClusterVariant &variant) {
    const int64_t num_heads = int64_t(args.batch) * args.heads;
    const int stride = variant.stride(args.clusters), part = tokens_of_part(args), parts = (args.tokens + part - 1) / part;
    const size_t packed_size = aligned(variant.packed_size(args.clusters, args.dim)), bias_size = aligned(stride);
    const size_t per_head = size_t(args.clusters) * args.dim, sums_size = aligned(per_head), sizes_size = aligned(args.clusters);
    const size_t scratch_size = aligned(variant.scratch(args.dim, args.clusters));
    Workspace workspace((packed_size + bias_size + parts * (sums_size + sizes_size)) * num_heads + scratch_size * args.threads);
    float *const packed = workspace.take(packed_size * num_heads), *const bias = workspace.take(bias_size * num_heads);
    float *const sums = workspace.take(sums_size * num_heads * parts), *const sizes = workspace.take(sizes_size * num_heads * parts);
    float *const scratch = workspace.take(scratch_size * args.threads);
    const auto sums_of = [&](int64_t head, int i) {
        return Sums{sums + (head * parts + i) * sums_size, sizes + (head * parts + i) * sizes_size};
    };
    const auto move = [&](int64_t head) {
        const Sums all = sums_of(head, 0);
        for (int i = 1; i < parts; i++) {
            variant.add(sums_of(head, i).sums, int(per_head), all.sums);
            variant.add(sums_of(head, i).sizes, args.clusters, all.sizes);
        }
        for (int c = 0; c < args.clusters; c++)
            for (int d = 0; d < args.dim && all.sizes[c] > 0; d++)
                args.centroids[head * per_head + c * args.dim + d] = all.sums[c * args.dim + d] / all.sizes[c];
    };
    const auto pack = [&](int64_t head) {
        const float *centroids = args.centroids + head * per_head;
        variant.pack_columns(centroids, 1, args.clusters, args.dim, packed + head * packed_size);
        // The nearest centroid has the largest x c - |c|^2 / 2.
        variant.half_squares(centroids, args.clusters, args.dim, stride, bias + head * bias_size);
    };

    std::fill_n(args.labels, num_heads * args.tokens, int64_t(-1));
    std::vector<char> has_changed(num_heads * parts, true);  // of each part of each head
    const auto is_done = [&](int64_t head) {
        return std::none_of(&has_changed[head * parts], &has_changed[head * parts] + parts, [](char changed) { return changed; });
    };
    deal(num_heads, args.threads, [&](int64_t head, int) { pack(head); });
    for (int iteration = 0; iteration < std::max(1, args.iterations); iteration++) {
        std::vector<char> done(num_heads);
        for (int64_t head = 0; head < num_heads; head++) done[head] = is_done(head);
        deal(num_heads * parts, args.threads, [&](int64_t i, int thread) {
            const int64_t head = i % num_heads;  // heads of the same tokens behind each other: they share pages
            if (done[head]) return;
            const Columns columns{packed + head * packed_size, args.clusters, args.dim};
            has_changed[head * parts + i / num_heads] =
                label_part(args, variant, head, int(i / num_heads) * part, columns, bias + head * bias_size,
                           sums_of(head, int(i / num_heads)), scratch + thread * scratch_size);
        });
        if (!args.iterations) return;
        deal(num_heads, args.threads, [&](int64_t head, int) {
            if (done[head]) return;
            move(head);
            if (iteration + 1 < args.iterations) pack(head);
        });
    }
}

// Tokens of each label in their order, and where each label's begin.
bool sort(const SortArgs &args) {
    const int64_t count = int64_t(args.groups) * args.tokens;
    if (!std::all_of(args.labels, args.labels + count, [&](int64_t label) { return label >= 0 && label < args.clusters; }))
        return false;
    deal(args.groups, args.threads, [&](int64_t group, int) {
        const int64_t *labels = args.labels + group * args.tokens;
        int32_t *offsets = args.offsets + group * (args.clusters + 1), *order = args.order + group * args.tokens;
        std::fill_n(offsets, args.clusters + 1, 0);
        for (int i = 0; i < args.tokens; i++) offsets[labels[i] + 1]++;
        for (int c = 0; c < args.clusters; c++) offsets[c + 1] += offsets[c];
        std::vector<int32_t> next(offsets, offsets + args.clusters);
        for (int i = 0; i < args.tokens; i++) order[next[labels[i]]++] = i;
    });
    return true;
}

// The mean of a block's tokens, 0 of none.
void mean(const ClusterVariant &variant, const float *x, int64_t stride, const Group &group, int block, int dim, float *to) {
    const int first = group.offsets[block], stop = group.offsets[block + 1];
    std::fill_n(to, dim, 0.0f);
    for (int place = first; place < stop; place++) {
        if (place + AHEAD < stop) ask(x + group.token(place + AHEAD) * stride, dim);
        variant.add(x + group.token(place) * stride, dim, to);
    }
    for (int d = 0; d < dim && stop > first; d++) to[d] /= float(stop - first);
}

void mean_all(const MeansArgs &args, const ClusterVariant &variant) {
    const int blocks = args.blocks.num_blocks;
    deal(int64_t(args.batch) * args.heads * blocks, args.threads, [&](int64_t i, int) {
        const int64_t head = i / blocks;
        mean(variant, at(args.x, head, args.heads), args.x.token, group_of(args.blocks, head), int(i % blocks), args.dim,
             args.means + i * args.dim);
    });
}

void sum_errors(const ErrorArgs &args, const ClusterVariant &variant) {
    const int64_t num_heads = int64_t(args.batch) * args.heads;
    const int stride = variant.stride(args.rows);
    const size_t packed_size = aligned(variant.packed_size(args.rows, args.dim)), sums_size = aligned(stride);
    const size_t scratch_size = aligned(variant.scratch(args.dim, args.rows)) + sums_size;
    Workspace workspace(packed_size * num_heads + scratch_size * args.threads);
    float *const packed = workspace.take(packed_size * num_heads), *const scratch = workspace.take(scratch_size * args.threads);
    deal(num_heads, args.threads, [&](int64_t head, int) {
        const float *queries = args.queries + head * args.rows * args.dim;
        variant.pack_columns(queries, LOG2_E, args.rows, args.dim, packed + head * packed_size);
    });
    deal(num_heads * args.clusters, args.threads, [&](int64_t i, int thread) {
        const int64_t head = i / args.clusters;
        const Group group{args.offsets + head * (args.clusters + 1), args.order + head * args.tokens};
        const int cluster = int(i % args.clusters), begin = group.offsets[cluster], size = group.offsets[cluster + 1] - begin;
        const int sampled = (size + args.sample_every - 1) / args.sample_every;
        const float *k = at(args.k, head, args.heads), *v = at(args.v, head, args.heads);
        const Columns columns{packed + head * packed_size, args.rows, args.dim};
        float *sums = scratch + thread * scratch_size, *memory = sums + sums_size;
        std::fill_n(sums, stride, 0.0f);
        for (int first = 0; first < sampled; first += MAX_ROWS) {
            const float *keys[MAX_ROWS], *values[MAX_ROWS];
            const int count = std::min(MAX_ROWS, sampled - first);
            for (int row = 0; row < count; row++) {
                const int64_t token = group.token(begin + (first + row) * args.sample_every);
                keys[row] = k + token * args.k.token;
                values[row] = v + token * args.v.token;
                ask(keys[row], args.dim);
                ask(values[row], args.dim);
            }
            variant.add_errors(keys, values, count, args.k_mean + i * args.dim, args.v_mean + i * args.dim, columns,
                               args.limit * LOG2_E, sums, memory);
        }
        const float factor = sampled ? float(size) / float(sampled) : 0;
        for (int row = 0; row < args.rows; row++) sums[row] *= factor;
        std::copy_n(sums, args.rows, args.sums + i * args.rows);
    });
}

// Packed means of each head.
struct PackedMeans {
    float *keys, *values;
    size_t keys_size, values_size;
};

// Blocks up to the last that has a token in some group.
int count_used(const BlocksArgs &blocks, int num_groups) {
    int used = 1;
    for (int g = 0; g < num_groups; g++) {
        const int32_t *offsets = group_of(blocks, g).offsets;
        for (int block = blocks.num_blocks; block > used; block--)
            if (offsets[block] > offsets[block - 1]) used = block;
    }
    return used;
}

void attend_skipped(const SkippedArgs &args, const ClusterVariant &variant) {
    const int64_t num_heads = int64_t(args.batch) * args.heads;
    const int rows = args.q_blocks.num_blocks, cols = args.k_blocks.num_blocks, used = count_used(args.k_blocks, args.num_groups);
    PackedMeans packed{nullptr, nullptr, aligned(variant.packed_size(used, args.dim)), aligned(variant.packed_size(args.dim, used))};
    const size_t bias_size = aligned(std::max(variant.stride(used), cols));
    const size_t scratch_size = aligned(variant.scratch(args.dim, used)) + bias_size;
    Workspace workspace((packed.keys_size + packed.values_size) * num_heads + bias_size * args.num_groups +
                        scratch_size * args.threads);
    packed.keys = workspace.take(packed.keys_size * num_heads);
    packed.values = workspace.take(packed.values_size * num_heads);
    float *const logs = workspace.take(bias_size * args.num_groups), *const scratch = workspace.take(scratch_size * args.threads);
    for (int g = 0; g < args.num_groups; g++) {
        const int32_t *offsets = group_of(args.k_blocks, g).offsets;
        float *mine = logs + g * bias_size;
        std::fill_n(mine, bias_size, -std::numeric_limits<float>::infinity());
        for (int c = 0; c < cols; c++) mine[c] = std::log2(float(offsets[c + 1] - offsets[c]));
    }
    deal(num_heads, args.threads, [&](int64_t head, int) {
        const size_t first = size_t(head) * cols * args.dim;
        variant.pack_columns(args.k_mean + first, args.scale * LOG2_E, used, args.dim, packed.keys + head * packed.keys_size);
        variant.pack_rows(args.v_mean + first, used, args.dim, packed.values + head * packed.values_size);
    });
    deal(num_heads * rows, args.threads, [&](int64_t i, int thread) {
        const int64_t head = i / rows;
        const int row = int(i % rows), g = args.group[head / args.heads * args.group_batch + head % args.heads];
        if (g < 0) return;
        const Group group = group_of(args.q_blocks, g);
        const int32_t *tiles = args.row_ptr + int64_t(g) * (rows + 1) + row;
        float *bias = scratch + thread * scratch_size, *memory = bias + bias_size;
        std::copy_n(logs + g * bias_size, bias_size, bias);
        for (int tile = tiles[0]; tile < tiles[1]; tile++) bias[args.col[tile]] = -std::numeric_limits<float>::infinity();
        const float *q = at(args.q, head, args.heads), *lse = at(args.lse, head, args.heads);
        float *out = at(args.out, head, args.heads);
        const Columns keys{packed.keys + head * packed.keys_size, used, args.dim};
        const Columns values{packed.values + head * packed.values_size, args.dim, used};
        for (int first = group.offsets[row]; first < group.offsets[row + 1]; first += MAX_ROWS) {
            const int count = std::min(MAX_ROWS, group.offsets[row + 1] - first);
            const float *queries[MAX_ROWS];
            Merge merge = {};
            for (int j = 0; j < count; j++) {
                const int64_t token = group.token(first + j);
                if (first + j + MAX_ROWS < group.offsets[row + 1]) {
                    const int64_t later = group.token(first + j + MAX_ROWS);
                    ask(q + later * args.q.token, args.dim);
                    ask(out + later * args.out.token, args.dim);
                }
                queries[j] = q + token * args.q.token;
                merge.out[j] = out + token * args.out.token;
                merge.lse[j] = lse[token * args.lse.token];
            }
            variant.attend(queries, count, keys, values, bias, merge, memory);
        }
    });
}

// Calls the work with the variant, and says how it went.
template <typename Args>
int run(void (*work)(const Args &, const ClusterVariant &), const Args &args) {
    const ClusterVariant *variant = find(args.isa);
    if (!variant) return UNKNOWN_ISA;
    try {
        work(args, *variant);
    } catch (const std::bad_alloc &) {
        return NO_ROOM;
    }
    return CLUSTERED;
}

}  // namespace
}  // namespace longvid

extern "C" {

using namespace longvid;

int longvid_kmeans(const KmeansArgs *args) { return run(cluster, *args); }

int longvid_sort(const SortArgs *args) { return sort(*args) ? CLUSTERED : BAD_CLUSTERS; }

int longvid_block_means(const MeansArgs *args) {
    return is_valid(args->blocks, int64_t(args->batch) * args->heads) ? run(mean_all, *args) : BAD_CLUSTERS;
}

int longvid_errors(const ErrorArgs *args) {
    const BlocksArgs blocks{args->offsets, args->order, args->clusters + 1, args->tokens, args->clusters, args->tokens};
    return is_valid(blocks, int64_t(args->batch) * args->heads) ? run(sum_errors, *args) : BAD_CLUSTERS;
}

int longvid_attend_skipped(const SkippedArgs *args) { return has_valid_layout(*args) ? run(attend_skipped, *args) : BAD_CLUSTERS; }

}  // extern "C"
