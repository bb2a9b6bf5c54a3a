// Block-sparse attention and block mass on the CPU: plans the work, deals it to threads, and calls the kernels of a variant.
// Plain C entry points, for ctypes. Every result is computed by one thread in one order, so it does not depend on how many
// threads there are.

#include "sparse.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention.h"
#include "isa.h"
#include "kept.h"

namespace longvid {
namespace {

// About as many keys a thread packs at a time.
constexpr int KEYS_AT_ONCE = 256;

// Of keys and values that are held packed at once, or one head's.
constexpr size_t PACKED_BYTES = size_t(16) << 20;

const Variant *find(int isa) {
#ifdef LONGVID_AMX
    if (isa == 3) return &amx;
#endif
#ifdef LONGVID_X86_VARIANTS
    if (isa == 2) return &avx512;
    if (isa == 1) return &avx2;
#endif
    return isa == 0 ? &portable : nullptr;
}

// Floats that the calling thread keeps from call to call, unless they are many.
template <typename Owner>
class Floats {
  public:
    explicit Floats(size_t count) : memory_(count * sizeof(float)) {
        if (count && !memory_.get()) throw std::bad_alloc();
    }
    float *get() const { return reinterpret_cast<float *>(memory_.get()); }

  private:
    Kept<Owner, PACKED_BYTES> memory_;
};

// The first panel of each block of keys, and past the last.
std::vector<int32_t> panel_starts(const BlocksArgs &blocks, int group, int lanes) {
    const int32_t *offsets = offsets_of(blocks, group);
    std::vector<int32_t> starts(blocks.num_blocks + 1);
    for (int c = 0; c < blocks.num_blocks; c++)
        starts[c + 1] = starts[c] + (offsets[c + 1] - offsets[c] + lanes - 1) / lanes;
    return starts;
}

struct Head {
    int batch, head, group;
};

// Memory for the packed keys of some heads, and values where panels have any.
class Packed {
  public:
    Packed(int lanes, PanelSize size, int max_panels, int num_heads)
        : per_head_(floats(lanes, size, max_panels)), size_(size), max_panels_(max_panels),
          memory_(per_head_ * num_heads), first_(memory_.get()) {}

    static size_t floats(int lanes, PanelSize size, int max_panels) {
        return ((size.k + size.v + lanes) * max_panels + 15) / 16 * 16;
    }

    Panels of(int slot, const BlocksArgs &blocks, int group, const std::vector<int32_t> &starts,
              bool has_bias) const {
        float *k = first_ + per_head_ * slot, *v = k + size_.k * max_panels_, *bias = v + size_.v * max_panels_;
        return {k, size_.v ? v : nullptr, bias, starts.data(), offsets_of(blocks, group), blocks.num_blocks,
                has_bias};
    }

  private:
    size_t per_head_;
    PanelSize size_;
    int max_panels_;
    Floats<Packed> memory_;
    float *first_;  // other threads have memory of their own
};

// Scratch memory of every thread.
class Scratch {
  public:
    Scratch(size_t floats, int threads) : each_((floats + 31) / 16 * 16), memory_(each_ * threads), first_(memory_.get()) {}
    float *of(int thread) const { return first_ + each_ * thread; }

  private:
    size_t each_;
    Floats<Scratch> memory_;
    float *first_;
};

int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Calls work(i, scratch) for i in [0, count): whichever thread is free takes the next.
template <typename Work>
void deal(int64_t count, int threads, const Scratch &scratch, const Work &work) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; i++) work(i, scratch.of(thread_index()));
}

// Calls work(i, next, scratch) for i in [0, count), too, where `next` is what the thread will do next, or -1. The last ones are not
// spoken for: a thread that is free must find them.
template <typename Work>
void deal_ahead(int64_t count, int threads, const Scratch &scratch, const Work &work) {
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads)
    {
        float *mine = scratch.of(thread_index());
        for (int64_t i = taken++; i < count;) {
            const int64_t next = i + 2 * threads < count ? taken++ : -1;
            work(i, next < count ? next : -1, mine);
            i = next < 0 ? taken++ : next;
        }
    }
}

float *at(const TensorArgs &x, const Head &head, bool is_bf16 = false) {
    const int64_t elements = head.batch * x.batch + head.head * x.head;
    return is_bf16 ? reinterpret_cast<float *>(reinterpret_cast<uint16_t *>(x.data) + elements) : x.data + elements;
}

// Calls pack(slot, first, stop) for the blocks [first, stop) of each slot, a number of keys at a time. Heads of the same tokens
// behind each other: they share pages.
template <typename Pack>
void deal_blocks(const BlocksArgs &blocks, int slots, int threads, const Scratch &scratch, const Pack &pack) {
    const int64_t wanted = int64_t(blocks.num_blocks) * KEYS_AT_ONCE / std::max(blocks.num_tokens, 1);
    const int size = int(std::max<int64_t>(wanted, 1)), spans = (blocks.num_blocks + size - 1) / size;
    deal(int64_t(slots) * spans, threads, scratch, [&](int64_t i, float *) {
        const int first = int(i / slots) * size;
        pack(int(i % slots), first, std::min(first + size, blocks.num_blocks));
    });
}

// Queries of one row of tiles of one head, and about how many scores they cost.
struct Item {
    int slot, row, first, count;
    int64_t cost;
};

int64_t count_keys(const AttentionArgs &args, int group, int row) {
    const int32_t *offsets = offsets_of(args.k_blocks, group);
    const int32_t *tiles = args.row_ptr + int64_t(group) * (args.q_blocks.num_blocks + 1) + row;
    int64_t keys = 0;
    for (int i = tiles[0]; i < tiles[1]; i++) keys += offsets[args.col[i] + 1] - offsets[args.col[i]];
    return keys;
}

// The rows of some heads, cut where they are long; the dearest first, so that no thread is left with a long one at the end.
// Heads of the same row behind each other: they share pages.
std::vector<Item> list_items(const AttentionArgs &args, const Head *heads, int num_heads) {
    std::vector<Item> items;
    for (int row = 0; row < args.q_blocks.num_blocks; row++) {
        for (int slot = 0; slot < num_heads; slot++) {
            const int32_t *offsets = offsets_of(args.q_blocks, heads[slot].group);
            const int64_t keys = count_keys(args, heads[slot].group, row) + 1;
            int first = offsets[row];
            const int length = offsets[row + 1] - first;
            for (int parts = (length + MAX_QUERIES - 1) / MAX_QUERIES; parts > 0; parts--) {
                const int count = (offsets[row + 1] - first) / parts;
                items.push_back({slot, row, first, count, keys * count});
                first += count;
            }
        }
    }
    std::stable_sort(items.begin(), items.end(), [](const Item &a, const Item &b) { return a.cost > b.cost; });
    return items;
}

// A skipped head has output 0 and LSE -inf.
void skip(const AttentionArgs &args, const Head &head) {
    const size_t size = args.is_bf16 ? sizeof(uint16_t) : sizeof(float);
    for (int64_t token = 0; token < args.q_blocks.num_tokens; token++) {
        char *out = reinterpret_cast<char *>(at(args.out, head, args.is_bf16));
        std::memset(out + token * args.out.token * size, 0, args.dim * size);
        at(args.lse, head)[token * args.lse.token] = -std::numeric_limits<float>::infinity();
    }
}

int heads_at_once(size_t floats_per_head, size_t num_heads) {
    return int(std::clamp<size_t>(PACKED_BYTES / sizeof(float) / floats_per_head, 1, std::max<size_t>(num_heads, 1)));
}

void attend_all(const AttentionArgs &args, const Variant &variant) {
    std::vector<Head> heads;
    for (int b = 0; b < args.batch; b++) {
        for (int h = 0; h < args.heads; h++) {
            const Head head{b, h, args.group[b * args.group_batch + h]};
            if (head.group < 0)
                skip(args, head);
            else
                heads.push_back(head);
        }
    }
    std::vector<std::vector<int32_t>> starts;
    int max_panels = 0;
    for (int g = 0; g < args.num_groups; g++) {
        starts.push_back(panel_starts(args.k_blocks, g, variant.lanes));
        max_panels = std::max(max_panels, starts.back().back());
    }
    const PanelSize size = variant.panel_size(args.dim, args.is_bf16);
    const int wave = heads_at_once(Packed::floats(variant.lanes, size, max_panels) + 1, heads.size());
    const Packed packed(variant.lanes, size, max_panels, wave);
    const Scratch scratch(variant.scratch(args.dim, 0), args.threads);

    for (size_t begin = 0; begin < heads.size(); begin += wave) {
        const Head *now = heads.data() + begin;
        const int count = int(std::min<size_t>(wave, heads.size() - begin));
        const auto panels = [&](int slot) {
            return packed.of(slot, args.k_blocks, now[slot].group, starts[now[slot].group], args.bias);
        };
        deal_blocks(args.k_blocks, count, args.threads, scratch, [&](int slot, int first, int stop) {
            const Head &head = now[slot];
            const float *bias = args.bias ? args.bias + head.batch * args.bias_batch + head.head * args.bias_head : nullptr;
            const bool is_bf16 = args.is_bf16;
            const Source source{at(args.k, head, is_bf16), at(args.v, head, is_bf16),              bias,   args.k.token,
                                args.v.token,              order_of(args.k_blocks, head.group), is_bf16};
            variant.pack(source, panels(slot), args.dim, first, stop);
        });
        const std::vector<Item> items = list_items(args, now, count);
        const auto task = [&](const Item &item) {
            const Head &head = now[item.slot];
            const int32_t *tiles = args.row_ptr + int64_t(head.group) * (args.q_blocks.num_blocks + 1) + item.row;
            const bool is_bf16 = args.is_bf16;
            const Queries queries{at(args.q, head, is_bf16), args.q.token, order_of(args.q_blocks, head.group), item.first, 1,
                                  item.count,                is_bf16};
            const Output output{at(args.out, head, is_bf16), at(args.lse, head), args.out.token, args.lse.token};
            return Task{queries, panels(item.slot), args.col + tiles[0], tiles[1] - tiles[0], output};
        };
        deal_ahead(int64_t(items.size()), args.threads, scratch, [&](int64_t i, int64_t next, float *memory) {
            const Task mine = task(items[i]), then = task(items[next < 0 ? i : next]);
            variant.attend(mine, next < 0 ? nullptr : &then, args.dim, args.scale, memory);
        });
    }
}

// Queries of a row that stand for all of them.
int num_sampled(const MassArgs &args, int row) {
    const int32_t *offsets = offsets_of(args.q_blocks, 0);
    return (offsets[row + 1] - offsets[row] + args.sample_every - 1) / args.sample_every;
}

// Rows that follow each other, and how many queries they have.
struct Rows {
    int first, stop, count;
};

// Rows in groups that fill the packed queries; the longest first.
std::vector<Rows> group_rows(const MassArgs &args) {
    std::vector<Rows> groups;
    for (int row = 0; row < args.q_blocks.num_blocks; row++) {
        const int count = num_sampled(args, row);
        const bool fits = !groups.empty() && groups.back().count + count <= MAX_QUERIES &&
                          row - groups.back().first < MAX_PIECES;
        if (fits)
            groups.back() = {groups.back().first, row + 1, groups.back().count + count};
        else
            groups.push_back({row, row + 1, count});
    }
    std::stable_sort(groups.begin(), groups.end(), [](const Rows &a, const Rows &b) { return a.count > b.count; });
    return groups;
}

void sum_mass(const MassArgs &args, const Variant &variant) {
    const std::vector<int32_t> starts = panel_starts(args.k_blocks, 0, variant.lanes);
    const int rows = args.q_blocks.num_blocks, cols = args.k_blocks.num_blocks, num_heads = args.batch * args.heads;
    const PanelSize size{variant.panel_size(args.dim, args.is_bf16).k, 0};
    const int wave = heads_at_once(Packed::floats(variant.lanes, size, starts.back()) + 1, num_heads);
    const Packed packed(variant.lanes, size, starts.back(), wave);
    const Scratch scratch(variant.scratch(args.dim, cols), args.threads);
    const bool is_bf16 = args.is_bf16;
    const int32_t *offsets = offsets_of(args.q_blocks, 0);
    const std::vector<Rows> groups = group_rows(args);
    std::vector<float> factors(rows);
    for (int row = 0; row < rows; row++) {
        const int sampled = num_sampled(args, row);
        factors[row] = sampled ? float(offsets[row + 1] - offsets[row]) / float(sampled) : 0.0f;
    }

    for (int begin = 0; begin < num_heads; begin += wave) {
        const int count = std::min(wave, num_heads - begin);
        const auto head = [&](int slot) { return Head{(begin + slot) / args.heads, (begin + slot) % args.heads, 0}; };
        deal_blocks(args.k_blocks, count, args.threads, scratch, [&](int slot, int first, int stop) {
            const float *k = at(args.k, head(slot), is_bf16);
            const Source source{k, nullptr, nullptr, args.k.token, 0, order_of(args.k_blocks, 0), is_bf16};
            variant.pack(source, packed.of(slot, args.k_blocks, 0, starts, false), args.dim, first, stop);
        });
        deal(int64_t(count) * groups.size(), args.threads, scratch, [&](int64_t i, float *memory) {
            const Rows &group = groups[i / count];
            const int slot = int(i % count);
            std::vector<Queries> queries;
            for (int row = group.first; row < group.stop; row++) {
                const int first = offsets[row], sampled = num_sampled(args, row);
                queries.push_back({at(args.q, head(slot), is_bf16), args.q.token, order_of(args.q_blocks, 0), first,
                                   args.sample_every, sampled, is_bf16});
            }
            const Panels panels = packed.of(slot, args.k_blocks, 0, starts, false);
            variant.mass(queries.data(), group.stop - group.first, panels, args.dim, args.scale, at(args.lse, head(slot)),
                         args.lse.token, factors.data() + group.first,
                         args.mass + (int64_t(begin + slot) * rows + group.first) * cols, memory);
        });
    }
}

}  // namespace
}  // namespace longvid

extern "C" {

using namespace longvid;

// The best variant for this processor: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with matrix units.
int longvid_best_isa() {
#ifdef LONGVID_X86_VARIANTS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return has_amx() ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

int longvid_attention(const AttentionArgs *args) {
    const Variant *variant = find(args->isa);
    if (!variant || args->dim > MAX_DIM) return UNSUPPORTED;
    if (!has_valid_layout(*args)) return BAD_LAYOUT;
    try {
        attend_all(*args, *variant);
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    return DONE;
}

int longvid_block_mass(const MassArgs *args) {
    const Variant *variant = find(args->isa);
    if (!variant || args->dim > MAX_DIM) return UNSUPPORTED;
    if (!is_valid(args->q_blocks, 1) || !is_valid(args->k_blocks, 1)) return BAD_LAYOUT;
    try {
        sum_mass(*args, *variant);
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    return DONE;
}

}  // extern "C"
