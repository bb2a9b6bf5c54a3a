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

namespace longvid {
namespace {

constexpr int PANEL = 32;  // keys
constexpr int FULL = 4;  // columns of 16 keys that fill a chunk
constexpr int COLUMNS = FULL + 1;  // in a chunk, at most
template <int N>
struct Constant {
    static constexpr int value = N;
};

// Calls body(Constant<n>), n from 1 to N.
template <int N, typename Body>
inline void with_constant(int n, const Body &body) {
    if constexpr (N > 1) {
        if (n < N) return with_constant<N - 1>(n, body);
    }
    body(Constant<N>{});
}

constexpr int SUMS = TILE * TILE;  // floats of a tile
constexpr int LINE = 64;  // bytes in a line of the cache
constexpr float INFINITY_ = __builtin_inff();
constexpr float LIMIT = 256;  // see Softmax
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr double LN_2 = 0.69314718055994530942;

int count_steps(int dim) { return (dim + DEPTH - 1) / DEPTH; }
int count_dim_tiles(int dim) { return (dim + TILE - 1) / TILE; }

// As many rows in each of an even number of left-hand tiles as hold `count` rows: products of fewer rows take less time.
struct Cut {
    int height, pairs;

    explicit Cut(int count) : pairs((count + 2 * TILE - 1) / (2 * TILE)) { height = (count + 2 * pairs - 1) / (2 * pairs); }
    int rows() const { return 2 * pairs * height; }
    int tile(int row) const { return row / height; }
    int in_tile(int row) const { return row % height; }
};

// Has the calling thread's tiles while it lives: sums (0 to 3) and left-hand tiles (4, 5) of `height` rows, right-hand tiles (6, 7).
class CutTiles {
  public:
    explicit CutTiles(int height) {
        alignas(64) struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {0, 0, 0, 0, 0, 0, 16, 16};
        } config;
        for (int i = 0; i < 6; i++) config.rows[i] = uint8_t(height);
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~CutTiles() { _tile_release(); }
    CutTiles(const CutTiles &) = delete;
};

template <int N>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(N));
}

template <int SUM, int LEFT, int RIGHT>
inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(LEFT), "i"(RIGHT));
}

// Where operands of products lie: two left-hand tiles, and two right-hand ones, or one; the parts of each behind it.
struct Operands {
    const Bf16 *left[2], *right[2];
};

inline void load_left(const Operands &at, int part) {
    load_tile<4>(at.left[0] + part * TILE_SIZE);
    load_tile<5>(at.left[1] + part * TILE_SIZE);
}

template <int C>
inline void load_right(const Operands &at, int part) {
    load_tile<6>(at.right[0] + part * TILE_SIZE);
    if constexpr (C == 2) load_tile<7>(at.right[1] + part * TILE_SIZE);
}

template <int C, typename Turn>
inline void multiply_all(Turn &turn) {
    multiply<0, 4, 6>();
    multiply<2, 5, 6>();
    if constexpr (C == 2) {
        multiply<1, 4, 7>();
        multiply<3, 5, 7>();
    }
    turn();
}

// Adds the products of two left-hand tiles and C right-hand ones to the sums.
template <int PARTS, int C, typename Turn>
inline void add_products(const Operands &at, Turn &turn) {
    load_left(at, 0);
    if constexpr (PARTS == 1) {
        load_right<C>(at, 0);
        multiply_all<C>(turn);
    } else {
        load_right<C>(at, 2);
        multiply_all<C>(turn);
        load_right<C>(at, 1);
        multiply_all<C>(turn);
        load_left(at, 1);
        multiply_all<C>(turn);
        load_right<C>(at, 0);
        multiply_all<C>(turn);
        load_left(at, 2);
        multiply_all<C>(turn);
        load_left(at, 0);
        multiply_all<C>(turn);
    }
}

// The same for the weights and values of one column, of which two parts each stand side by side (store_single, pack_values).
template <int C, typename Turn>
inline void add_single_products(const Operands &at, Turn &turn) {
    load_left(at, 1);
    load_right<C>(at, 2);
    multiply_all<C>(turn);
    load_left(at, 0);
    load_right<C>(at, 1);
    multiply_all<C>(turn);
    load_right<C>(at, 0);
    multiply_all<C>(turn);
}

struct Column {
    const Bf16 *keys;
    const float *bias;
    int block, index;  // the number of the column among all
};

// As many keys as are computed between two updates of the running maximum.
struct Chunk {
    int num_columns, num_panels;
    Column column[COLUMNS];
    const Bf16 *values[COLUMNS];  // of each panel
    unsigned pairs;  // bit c: column c and the one after it are a panel; else a column is one alone
    unsigned wide;  // bit p: panel p has two columns
    bool is_plain;  // all columns are full and no key has a bias
};

// How keys and values are packed.
template <int PARTS>
struct Packing {
    int steps, dim_tiles;

    explicit Packing(int dim) : steps(count_steps(dim)), dim_tiles(count_dim_tiles(dim)) {}
    size_t column() const { return size_t(steps) * PARTS * TILE_SIZE; }
    size_t values() const { return size_t(dim_tiles) * PARTS * TILE_SIZE; }
    Bf16 *keys_at(const Panels &panels, int panel, int column) const {
        return reinterpret_cast<Bf16 *>(panels.k) + (size_t(panel) * 2 + column) * this->column();
    }
    Bf16 *values_at(const Panels &panels, int panel) const {
        return reinterpret_cast<Bf16 *>(panels.v) + size_t(panel) * values();
    }
};

// Walks the panels of a list of blocks; of all blocks where the list is null.
template <int PARTS>
struct Walk {
    const Panels &panels;
    const Packing<PARTS> packing;
    const int32_t *tiles;
    int num_tiles;
    int tile = 0, inner = 0;

    // Empty at the end.
    void next(Chunk &chunk) {
        chunk.num_columns = chunk.num_panels = 0;
        chunk.pairs = chunk.wide = 0;
        chunk.is_plain = !panels.has_bias;
        while (tile < num_tiles) {
            const int block = tiles ? tiles[tile] : tile;
            const int keys = panels.offsets[block + 1] - panels.offsets[block] - inner * PANEL;
            if (keys <= 0) {
                tile++;
                inner = 0;
                continue;
            }
            if (chunk.num_columns >= FULL) return;
            add(chunk, block, panels.starts[block] + inner++, keys);
        }
    }

    // Of the whole walk, about.
    int count_chunks() const {
        int columns = 0;
        for (int i = 0; i < num_tiles; i++) {
            const int block = tiles ? tiles[i] : i;
            columns += (panels.offsets[block + 1] - panels.offsets[block] + TILE - 1) / TILE;
        }
        return (columns + FULL - 1) / FULL;
    }

  private:
    void add(Chunk &chunk, int block, int panel, int keys) const {
        const int columns = keys > TILE ? 2 : 1;
        chunk.is_plain &= keys >= columns * TILE;
        if (columns == 2) {
            chunk.pairs |= 1u << chunk.num_columns;
            chunk.wide |= 1u << chunk.num_panels;
        }
        if (panels.v) chunk.values[chunk.num_panels] = packing.values_at(panels, panel);
        chunk.num_panels++;
        for (int c = 0; c < columns; c++)
            chunk.column[chunk.num_columns++] = {packing.keys_at(panels, panel, c),
                                                 panels.bias + size_t(panel) * PANEL + c * TILE, block, panel * 2 + c};
    }
};

// A thread's next task, of which the first chunks and a share of the queries and results are asked for with each chunk of this one.
template <int PARTS>
struct Following {
    const Task *task;  // or null
    Walk<PARTS> walk;
    int share;
    int token = 0;
};

// Asks for memory ahead of its turn, a few lines at a time: many at once would hold up the loads that are due.
class Ahead {
  public:
    void begin(int num_turns) {
        num_spans_ = span_ = due_ = lines_ = 0;
        price_ = num_turns * LINES;
    }

    template <int PARTS>
    void add(const Chunk &chunk, const Packing<PARTS> &packing, bool has_values) {
        for (int c = 0; c < chunk.num_columns; c++) add(chunk.column[c].keys, packing.column() * sizeof(Bf16));
        for (int p = 0; has_values && p < chunk.num_panels; p++) add(chunk.values[p], packing.values() * sizeof(Bf16));
    }

    template <int PARTS>
    void add(Following<PARTS> &following, size_t token_bytes) {
        const Task &task = *following.task;
        for (int i = 0; i < following.share && following.token < task.queries.count; i++) {
            const int64_t token = task.queries.token(following.token++);
            add(reinterpret_cast<const char *>(task.queries.data) + token * task.queries.stride * (PARTS == 1 ? 2 : 4), token_bytes);
            add(reinterpret_cast<const char *>(task.output.out) + token * task.output.out_stride * (PARTS == 1 ? 2 : 4), token_bytes);
        }
    }

    void ask() {
        for (due_ += lines_; due_ >= price_ && span_ < num_spans_; due_ -= price_) {
            const char *at = at_[span_];
            UNROLL for (int i = 0; i < LINES; i += 2) __builtin_prefetch(at + i * LINE, 0, 2);
            at_[span_] = at + LINES * LINE;
            span_ += at_[span_] >= stop_[span_];
        }
    }

  private:
    static constexpr int LINES = 4;  // at a time
    static constexpr int MAX_SPANS = 2 * (COLUMNS + MAX_QUERIES);

    void add(const void *first, size_t bytes) {
        at_[num_spans_] = static_cast<const char *>(first);
        stop_[num_spans_] = at_[num_spans_] + bytes;
        num_spans_++;
        lines_ += int((bytes + LINES * LINE - 1) / (LINES * LINE) * LINES);
    }

    const char *at_[MAX_SPANS], *stop_[MAX_SPANS];
    int num_spans_ = 0, span_ = 0, due_ = 0, lines_ = 0, price_ = 1;
};

inline __mmask16 first_lanes(int count) { return __mmask16(count >= TILE ? 0xffff : count <= 0 ? 0 : (1u << count) - 1); }
inline __mmask32 first_halves(int count) {
    return __mmask32(count >= DEPTH ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1);
}

// Queries `start` ... of some to rows `at` ... of left-hand tiles [tile][step][part].
template <int PARTS>
void pack_queries(const Queries &queries, int start, int count, const Cut &cut, int at, int dim, Bf16 *packed) {
    const int steps = count_steps(dim);
    for (int i = 0; i < count; i++) {
        const int64_t from = queries.token(start + i) * queries.stride;
        Bf16 *to = packed + (size_t(cut.tile(at + i)) * steps * PARTS * TILE + cut.in_tile(at + i)) * DEPTH;
        for (int d = 0; d < dim; d += DEPTH, to += PARTS * TILE_SIZE) {
            if constexpr (PARTS == 1) {
                const Bf16 *mine = reinterpret_cast<const Bf16 *>(queries.data) + from + d;
                _mm512_store_si512(to, _mm512_maskz_loadu_epi16(first_halves(dim - d), mine));
            } else {
                const float *mine = queries.data + from + d;
                const Parts parts = split(_mm512_maskz_loadu_ps(first_lanes(dim - d), mine),
                                          _mm512_maskz_loadu_ps(first_lanes(dim - d - TILE), mine + TILE));
                for (int p = 0; p < PARTS; p++) _mm512_store_si512(to + p * TILE_SIZE, parts.of[p]);
            }
        }
    }
}

// Rows that no query has.
template <int PARTS>
void clear_queries(int from, const Cut &cut, int dim, Bf16 *packed) {
    const int steps = count_steps(dim);
    for (int row = from; row < cut.rows(); row++) {
        Bf16 *to = packed + (size_t(cut.tile(row)) * steps * PARTS * TILE + cut.in_tile(row)) * DEPTH;
        for (int i = 0; i < steps * PARTS; i++) _mm512_store_si512(to + i * TILE_SIZE, _mm512_setzero_si512());
    }
}

// A number that stays in a register: the compiler would make it anew for every use, in time that arithmetic needs.
inline __attribute__((always_inline)) Vec keep(float x) {
    Vec all = fill(x);
    asm("" : "+v"(all));
    return all;
}

// Cuts numbers off to bf16.
struct Cutter {
    __m512i upper = _mm512_set1_epi32(int(0xffff0000u)), down = _mm512_set1_epi32(0x0f0e0302);
    __mmask64 even = 0x3333333333333333u;

    Cutter() {
        down = _mm512_set_epi8(15, 14, 15, 14, 11, 10, 11, 10, 7, 6, 7, 6, 3, 2, 3, 2, 15, 14, 15, 14, 11, 10, 11, 10, 7, 6, 7, 6, 3, 2, 3, 2, 15, 14, 15, 14, 11, 10, 11, 10, 7, 6, 7, 6, 3, 2, 3, 2, 15, 14, 15, 14, 11, 10, 11, 10, 7, 6, 7, 6, 3, 2, 3, 2);
        asm("" : "+v"(upper), "+v"(down));
        asm("" : "+k"(even));
    }
    // The upper halves of a's numbers, and of b's: as lower and upper halves.
    __m512i join(Vec a, Vec b) const {
        return _mm512_mask_shuffle_epi8(_mm512_castps_si512(b), even, _mm512_castps_si512(a), down);
    }
    // What bf16 leaves of x.
    Vec rest(Vec x) const { return x - Vec(_mm512_and_ps(x, _mm512_castsi512_ps(upper))); }
};

// The column of some keys [keys][dim], wherever each lies. One side of a product may be cut off in place of rounded.
void pack_column(const float *const *from, int keys, int dim, Bf16 *to) {
    const Cutter cutter;
    for (int d = 0; d < dim; d += DEPTH, to += NUM_PARTS * TILE_SIZE) {
        for (int half = 0; half < 2; half++) {
            const __mmask16 mask = first_lanes(dim - d - half * TILE);
            __m512i rows[TILE];
            for (int key = 0; key < TILE; key++)
                rows[key] = key < keys ? _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, from[key] + d + half * TILE))
                                       : _mm512_setzero_si512();
            transpose(rows);
            Bf16 *mine = to + half * TILE_SIZE / 2;
            UNROLL for (int i = 0; i < TILE; i += 2, mine += DEPTH) {
                Vec a = _mm512_castsi512_ps(rows[i]), b = _mm512_castsi512_ps(rows[i + 1]);
                _mm512_store_si512(mine, cutter.join(a, b));
                a = cutter.rest(a), b = cutter.rest(b);
                _mm512_store_si512(mine + TILE_SIZE, cutter.join(a, b));
                _mm512_store_si512(mine + 2 * TILE_SIZE, cutter.join(cutter.rest(a), cutter.rest(b)));
            }
        }
    }
}

void pack_column(const Bf16 *const *from, int keys, int dim, Bf16 *to) {
    for (int d = 0; d < dim; d += DEPTH, to += TILE_SIZE) {
        __m512i rows[TILE];
        for (int key = 0; key < TILE; key++)
            rows[key] = key < keys ? _mm512_maskz_loadu_epi16(first_halves(dim - d), from[key] + d) : _mm512_setzero_si512();
        store_columns(rows, to);
    }
}

inline __m256i lower(__m512i x) { return _mm512_castsi512_si256(x); }

// The values of a panel: rows r and 16 + r as a pair. Of one column, a pair is parts of the same row: see store_single.
void pack_values(const float *const *from, int keys, int dim, Bf16 *to) {
    alignas(64) Bf16 order[DEPTH];
    for (int i = 0; i < DEPTH; i++) order[i] = Bf16(i / 2 + i % 2 * TILE);
    const __m512i pairs = _mm512_load_si512(order);
    for (int d = 0; d < dim; d += TILE, to += NUM_PARTS * TILE_SIZE) {
        const __mmask16 mask = first_lanes(dim - d);
        for (int r = 0; r < TILE; r++) {
            const __m512 first = r < keys ? _mm512_maskz_loadu_ps(mask, from[r] + d) : _mm512_setzero_ps();
            const __m512 second = r + TILE < keys ? _mm512_maskz_loadu_ps(mask, from[r + TILE] + d) : _mm512_setzero_ps();
            const Parts parts = split(first, second);
            if (keys > TILE) {
                for (int p = 0; p < NUM_PARTS; p++)
                    _mm512_store_si512(to + p * TILE_SIZE + r * DEPTH, _mm512_permutexvar_epi16(pairs, parts.of[p]));
            } else {
                store_pair(lower(parts.of[0]), lower(parts.of[0]), to, r);
                store_pair(lower(parts.of[1]), lower(parts.of[1]), to + TILE_SIZE, r);
                store_pair(lower(parts.of[2]), lower(parts.of[0]), to + 2 * TILE_SIZE, r);
            }
        }
    }
}

void pack_values(const Bf16 *const *from, int keys, int dim, Bf16 *to) {
    for (int d = 0; d < dim; d += TILE, to += TILE_SIZE) {
        const __mmask16 mask = first_lanes(dim - d);
        const auto row = [&](int r) { return r < keys ? _mm256_maskz_loadu_epi16(mask, from[r] + d) : _mm256_setzero_si256(); };
        for (int r = 0; r < TILE; r++) store_pair(row(r), row(r + TILE), to, r);
    }
}

// Asks for the keys and values ahead of their turn, up to those at the place `end`.
template <int PARTS, typename Number>
void pack_block(const Source &source, const Panels &panels, int dim, int block, int end) {
    const Packing<PARTS> packing(dim);
    const int stop = panels.offsets[block + 1];
    for (int panel = panels.starts[block], place = panels.offsets[block]; place < stop; panel++, place += PANEL) {
        const int keys = stop - place < PANEL ? stop - place : PANEL;
        float *bias = panels.bias + size_t(panel) * PANEL;
        const Number *k[PANEL], *v[PANEL];
        for (int key = 0; key < keys; key++) {
            if (place + key + PANEL < end) {
                const int64_t later = source.order ? source.order[place + key + PANEL] : place + key + PANEL;
                for (int d = 0; d < dim; d += LINE / int(sizeof(Number))) {
                    __builtin_prefetch(reinterpret_cast<const Number *>(source.k) + later * source.k_stride + d, 0, 2);
                    if (panels.v) __builtin_prefetch(reinterpret_cast<const Number *>(source.v) + later * source.v_stride + d, 0, 2);
                }
            }
            const int64_t token = source.order ? source.order[place + key] : place + key;
            k[key] = reinterpret_cast<const Number *>(source.k) + token * source.k_stride;
            if (panels.v) v[key] = reinterpret_cast<const Number *>(source.v) + token * source.v_stride;
            bias[key] = source.bias ? source.bias[token] * LOG2_E : 0;
        }
        for (int key = keys; key < PANEL; key++) bias[key] = -INFINITY_;
        pack_column(k, keys < TILE ? keys : TILE, dim, packing.keys_at(panels, panel, 0));
        if (keys > TILE) pack_column(k + TILE, keys - TILE, dim, packing.keys_at(panels, panel, 1));
        if (panels.v) pack_values(v, keys, dim, packing.values_at(panels, panel));
    }
}

void pack(const Source &source, const Panels &panels, int dim, int first, int stop) {
    const auto pack_one = source.is_bf16 ? pack_block<1, Bf16> : pack_block<NUM_PARTS, float>;
    for (int block = first; block < stop; block++) pack_one(source, panels, dim, block, panels.offsets[stop]);
}

// Two tiles of queries and a chunk. Its scores are [tile][COLUMNS][row][key].
struct Unit {
    const Chunk *chunk;
    int pair;
};

constexpr int UNIT_SCORES = 2 * COLUMNS * SUMS;

template <int PARTS, typename Turn>
void score(const Bf16 *left, const Chunk &chunk, int steps, float *scores, Turn &turn) {
    const size_t tile = size_t(steps) * PARTS * TILE_SIZE;
    const auto sum = [&](auto two, int c) {
        constexpr int C = decltype(two)::value;
        clear_tile<0>();
        clear_tile<2>();
        if constexpr (C == 2) {
            clear_tile<1>();
            clear_tile<3>();
        }
        Operands at{{left, left + tile}, {chunk.column[c].keys, C == 2 ? chunk.column[c + 1].keys : nullptr}};
        for (int step = 0; step < steps; step++) {
            add_products<PARTS, C>(at, turn);
            for (int i = 0; i < 2; i++) at.left[i] += PARTS * TILE_SIZE;
            for (int i = 0; i < C; i++) at.right[i] += PARTS * TILE_SIZE;
        }
        float *to = scores + c * SUMS;
        store_tile<0>(to);
        store_tile<2>(to + COLUMNS * SUMS);
        if constexpr (C == 2) {
            store_tile<1>(to + SUMS);
            store_tile<3>(to + (COLUMNS + 1) * SUMS);
        }
    };
    int c = 0;
    for (; c + 1 < chunk.num_columns; c += 2) sum(Constant<2>{}, c);
    if (c < chunk.num_columns) sum(Constant<1>{}, c);
}

// How often `score` and `add_values` call their turn.
template <int PARTS>
int count_score_turns(const Chunk &chunk, int steps) {
    return (chunk.num_columns + 1) / 2 * steps * (PARTS == 1 ? 1 : 6);
}

template <int PARTS>
int count_value_turns(const Chunk &chunk, int dim_tiles) {
    const int wide = __builtin_popcount(chunk.wide), narrow = chunk.num_panels - wide;
    return (dim_tiles + 1) / 2 * (PARTS == 1 ? chunk.num_panels : 6 * wide + 3 * narrow);
}

constexpr int unit_weights(int parts) { return 2 * COLUMNS * parts * TILE_SIZE; }  // bf16

// out[tile][dim tile] += weights[tile][COLUMNS panels][part] values.
template <int PARTS, typename Turn>
void add_values(const Bf16 *weights, const Chunk &chunk, int dim_tiles, float *out, Turn &turn) {
    float *second = out + size_t(dim_tiles) * SUMS;
    const auto add = [&](auto two, int d) {
        constexpr int C = decltype(two)::value;
        load_tile<0>(out + d * SUMS);
        load_tile<2>(second + d * SUMS);
        if constexpr (C == 2) {
            load_tile<1>(out + (d + 1) * SUMS);
            load_tile<3>(second + (d + 1) * SUMS);
        }
        for (int p = 0; p < chunk.num_panels; p++) {
            const Bf16 *left = weights + p * PARTS * TILE_SIZE, *right = chunk.values[p] + d * PARTS * TILE_SIZE;
            const Operands at{{left, left + unit_weights(PARTS) / 2}, {right, right + PARTS * TILE_SIZE}};
            if (PARTS == 1 || chunk.wide >> p & 1)
                add_products<PARTS, C>(at, turn);
            else
                add_single_products<C>(at, turn);
        }
        store_tile<0>(out + d * SUMS);
        store_tile<2>(second + d * SUMS);
        if constexpr (C == 2) {
            store_tile<1>(out + (d + 1) * SUMS);
            store_tile<3>(second + (d + 1) * SUMS);
        }
    };
    int d = 0;
    for (; d + 1 < dim_tiles; d += 2) add(Constant<2>{}, d);
    if (d < dim_tiles) add(Constant<1>{}, d);
}

// Calls work.row(i) for rows [0, rows), spread over so many turns.
template <typename Work>
class Spread {
  public:
    Spread(Work &work, Ahead &ahead, int rows, int turns) : work_(work), ahead_(ahead), rows_(rows), turns_(turns) {}

    void operator()() {
        ahead_.ask();
        for (debt_ += rows_; debt_ >= turns_ && row_ < rows_; debt_ -= turns_) work_.row(row_++);
    }
    void finish() {
        while (row_ < rows_) work_.row(row_++);
    }

  private:
    Work &work_;
    Ahead &ahead_;
    int rows_, turns_, row_ = 0, debt_ = 0;
};

struct Nothing {
    void operator()() {}
};

// Computes the scores of all units, and gives each to work.begin(unit, scores) and, while later ones are computed, its rows to
// work.row(i). work.count_turns() and work.add(turn) are the products of the unit before that.
template <int PARTS, typename Work>
void for_units(const Bf16 *q, const Cut &cut, int count, Walk<PARTS> walk, Following<PARTS> following, int dim, float *scores,
               Work &work) {
    const int steps = count_steps(dim);
    const size_t q_pair = size_t(2) * steps * PARTS * TILE_SIZE;
    const bool has_values = walk.panels.v != nullptr;
    Chunk chunks[4];  // of the units before, now and next, and one that is asked for
    walk.next(chunks[0]);
    walk.next(chunks[1]);
    Nothing nothing;
    Ahead ahead;
    if (chunks[0].num_columns == 0) return;
    score<PARTS>(q, chunks[0], steps, scores, nothing);
    for (int i = 0, parity = 0; chunks[i % 4].num_columns > 0; i++) {
        const Chunk &chunk = chunks[i % 4], &after = chunks[(i + 1) % 4];
        Chunk &later = chunks[(i + 2) % 4];
        walk.next(later);
        const int turns = count_score_turns<PARTS>(chunk, steps) + count_value_turns<PARTS>(chunk, walk.packing.dim_tiles);
        ahead.begin(cut.pairs * turns);
        ahead.add(later, walk.packing, has_values);
        if (following.task) {
            if (later.num_columns == 0) {
                Chunk first;
                following.walk.next(first);
                ahead.add(first, walk.packing, has_values);
            }
            ahead.add(following, dim * (PARTS == 1 ? sizeof(Bf16) : sizeof(float)));
        }
        for (int pair = 0; pair < cut.pairs; pair++, parity ^= 1) {
            const Unit next = pair + 1 < cut.pairs ? Unit{&chunk, pair + 1} : Unit{&after, 0};
            const int first = pair * 2 * cut.height, rows = count - first < 2 * cut.height ? count - first : 2 * cut.height;
            work.begin(Unit{&chunk, pair}, scores + parity * UNIT_SCORES);
            Spread<Work> turn(work, ahead, rows, count_score_turns<PARTS>(*next.chunk, steps) + work.count_turns());
            score<PARTS>(q + next.pair * q_pair, *next.chunk, steps, scores + (parity ^ 1) * UNIT_SCORES, turn);
            work.add(turn);
            turn.finish();
        }
    }
}

// What is kept of each query while its keys pass by: the largest score, the sum of weights in each lane, and the output.
struct State {
    float *top;  // [queries]
    float *sum;  // [queries][lane]
    float *out;  // [tile][dim tile][row][element]
};

// Weights of two columns, as a left-hand tile's row.
template <int PARTS>
inline void store_both(const Cutter &cutter, Vec a, Vec b, Bf16 *to) {
    if constexpr (PARTS == 1) {
        const auto round = [](Vec x) { return Vec(Ints(x) + 0x8000); };
        _mm512_store_si512(to, cutter.join(round(a), round(b)));
    } else {
        _mm512_store_si512(to, cutter.join(a, b));
        a = cutter.rest(a), b = cutter.rest(b);
        _mm512_store_si512(to + TILE_SIZE, cutter.join(a, b));
        _mm512_store_si512(to + 2 * TILE_SIZE, cutter.join(cutter.rest(a), cutter.rest(b)));
    }
}

// Weights of one column. Three products give all six: (high, middle) (high, high), (high, middle) (middle, middle) and
// (high, low) (low, high).
template <int PARTS>
inline void store_single(const Cutter &cutter, Vec a, Bf16 *to) {
    if constexpr (PARTS == 1) {
        store_both<1>(cutter, a, Vec{}, to);
    } else {
        const Vec middle = cutter.rest(a);
        _mm512_store_si512(to, cutter.join(a, middle));
        _mm512_store_si512(to + TILE_SIZE, cutter.join(a, cutter.rest(middle)));
    }
}

// 2^(x - 1/2), within 1.8e-7; 0 below 2^-100: far smaller numbers would be denormal, which take a hundred times as long.
struct Exp2 {
    const Vec least = keep(-100.0f), c5 = keep(0.0013276472454890609f), c4 = keep(0.006356423255056143f),
              c3 = keep(0.03947516903281212f), c2 = keep(0.16981424391269684f), c1 = keep(0.49013322591781616f),
              c0 = keep(0.7071067094802856f);

    Exp2() {}  // the compiler's own would be for a lesser processor, and not inlined

    Vec operator()(Vec x) const {
        const Vec part = Vec(_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
        const Vec power = ((((part * c5 + c4) * part + c3) * part + c2) * part + c1) * part + c0;
        return Vec(_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), power, x));
    }
};

inline bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

// Softmax of units, and their values. A unit's weights are relative to `top`, which is moved to the largest score only when weights
// are far above 1: they may be as large as LIMIT, which changes no result. What was added before is scaled when it moves.
template <int PARTS>
class Softmax {
  public:
    Softmax(const State &state, const Cut &cut, int dim, float scale, Bf16 *weights)
        : state_(state), cut_(cut), dim_tiles_(count_dim_tiles(dim)), scale_(scale), weights_(weights) {}

    void begin(const Unit &unit, const float *scores) {
        before_ = now_;
        now_.unit = unit;
        now_.parity ^= 1;
        now_.has_moved = false;
        scores_ = scores;
        for (int i = 0; i < 2 * TILE; i++) decay_[now_.parity][i] = 1;
    }

    void row(int i) {
        const Chunk &chunk = *now_.unit.chunk;
        with_constant<COLUMNS>(chunk.num_columns, [&](auto columns) {
            if (chunk.is_plain)
                weigh<columns.value, true>(i);
            else
                weigh<columns.value, false>(i);
        });
    }

    int count_turns() const { return before_.unit.chunk ? count_value_turns<PARTS>(*before_.unit.chunk, dim_tiles_) : 0; }

    template <typename Turn>
    void add(Turn &turn) {
        if (before_.unit.chunk) add(before_, turn);
    }

    void finish() {
        Nothing nothing;
        if (now_.unit.chunk) add(now_, nothing);
    }

  private:
    struct Weighed {
        Unit unit{nullptr, 0};
        int parity = 0;
        bool has_moved = false;
    };

    template <typename Turn>
    void add(const Weighed &weighed, Turn &turn) {
        float *out = state_.out + size_t(weighed.unit.pair) * 2 * dim_tiles_ * SUMS;
        if (weighed.has_moved) {
            for (int i = 0; i < 2 * cut_.height; i++) {
                float *row = out + size_t(i / cut_.height) * dim_tiles_ * SUMS + i % cut_.height * TILE;
                const float decay = decay_[weighed.parity][i];
                for (int d = 0; d < dim_tiles_; d++) store(row + d * SUMS, load(row + d * SUMS) * decay);
            }
        }
        add_values<PARTS>(weights_ + weighed.parity * unit_weights(PARTS), *weighed.unit.chunk, dim_tiles_, out, turn);
    }

    const float *scores_of(int i) const {
        const int tile = i >= cut_.height;
        return scores_ + tile * COLUMNS * SUMS + (i - tile * cut_.height) * TILE;
    }

    Bf16 *weights_of(int i) const {
        const int tile = i >= cut_.height;
        return weights_ + now_.parity * unit_weights(PARTS) + tile * (unit_weights(PARTS) / 2) + (i - tile * cut_.height) * DEPTH;
    }

    // Makes the largest score of this row the one that weights are relative to.
    ALONE void move(int i) {
        const Chunk &chunk = *now_.unit.chunk;
        const float *scores = scores_of(i);
        float &top = state_.top[query(i)], *total = state_.sum + query(i) * LANES;
        Vec tops = fill(top);
        for (int c = 0; c < chunk.num_columns; c++)
            tops = Vec(_mm512_max_ps(load(scores + c * SUMS) * scale_ + load(chunk.column[c].bias), tops));  // tops where NaN
        const float before = top;
        top = _mm512_reduce_max_ps(tops);
        if (before == -INFINITY_) return;  // there is nothing yet
        const float decay = exp2(fill(before - top))[0];
        decay_[now_.parity][i] = decay;
        now_.has_moved = true;
        store(total, load(total) * decay);
    }

    int query(int i) const { return now_.unit.pair * 2 * cut_.height + i; }

    template <int N, bool PLAIN>
    ALONE void weigh(int i) {
        const Cutter cutter;
        const Exp2 exp;
        const Chunk &chunk = *now_.unit.chunk;
        const float *scores = scores_of(i);
        const Vec scale = keep(scale_), limit = keep(LIMIT);
        float *sum = state_.sum + query(i) * LANES;
        const float &top = state_.top[query(i)];
        Vec weights[N], total;
        if (__builtin_expect(top == -INFINITY_, 0)) move(i);
        for (bool has_moved = false;; has_moved = true) {
            const Vec shift = keep(top == -INFINITY_ ? 0.5f : 0.5f - top);  // (-inf) - (-inf) would be NaN
            UNROLL for (int c = 0; c < N; c++) {
                const Vec score = load(scores + c * SUMS);
                weights[c] = exp(PLAIN ? score * scale + shift : score * scale + load(chunk.column[c].bias) + shift);
            }
            total = weights[0];
            UNROLL for (int c = 1; c < N; c++) total += weights[c];
            if (__builtin_expect(!any_above(total, limit), 1) || has_moved) break;
            move(i);
        }
        store(sum, load(sum) + total);
        Bf16 *to = weights_of(i);
        unsigned done = 0;
        UNROLL for (int c = 0; c < N; c++) {
            if (done >> c & 1) continue;
            if (c + 1 < N && (chunk.pairs >> c & 1)) {
                store_both<PARTS>(cutter, weights[c], weights[c + 1 < N ? c + 1 : c], to);
                done |= 2u << c;
            } else {
                store_single<PARTS>(cutter, weights[c], to);
            }
            to += PARTS * TILE_SIZE;
        }
    }

    const State state_;
    const Cut cut_;
    const int dim_tiles_;
    const float scale_;
    Bf16 *weights_;  // [2][tile][COLUMNS panels][part]
    Weighed now_, before_;
    const float *scores_ = nullptr;
    float decay_[2][2 * TILE];
};

template <int PARTS>
void finish(const Queries &queries, const State &state, const Cut &cut, int dim, const Output &output) {
    const int dim_tiles = count_dim_tiles(dim);
    for (int row = 0; row < queries.count; row++) {
        const int64_t token = queries.token(row);
        const float *from = state.out + size_t(cut.tile(row)) * dim_tiles * SUMS + cut.in_tile(row) * TILE;
        const float total = sum(load(state.sum + row * LANES));
        const float factor = total == 0 ? 0 : 1 / total;
        for (int d = 0; d < dim; d += TILE, from += SUMS) {
            const Vec x = load(from) * factor;
            float *to = output.out + token * output.out_stride + d;
            if constexpr (PARTS == 1) {
                Bf16 *half = reinterpret_cast<Bf16 *>(output.out) + token * output.out_stride + d;
                _mm256_mask_storeu_epi16(half, first_lanes(dim - d), (__m256i)_mm512_cvtneps_pbh(x));
            } else {
                _mm512_mask_storeu_ps(to, first_lanes(dim - d), x);
            }
        }
        output.lse[token * output.lse_stride] = float((state.top[row] + __builtin_log2(total)) * LN_2);
    }
}

// Hands out scratch memory in pieces aligned to a line.
class Pieces {
  public:
    explicit Pieces(float *memory) : at_(memory) {}
    float *floats(size_t count) {
        float *found = at_;
        at_ += (count + 15) / 16 * 16;
        return found;
    }
    Bf16 *halves(size_t count) { return reinterpret_cast<Bf16 *>(floats(count / 2)); }

  private:
    float *at_;
};

constexpr int MAX_ROWS = MAX_QUERIES + 2 * TILE;  // of packed queries, those of no query among them

size_t packed_queries(int dim, int parts) { return size_t(MAX_ROWS) / TILE * count_steps(dim) * parts * TILE_SIZE; }

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

// Work on scores alone.
class ScoreWork {
  public:
    ScoreWork(const Cut &cut, float scale) : cut_(cut), scale_(scale) {}

    void begin(const Unit &unit, const float *scores) {
        unit_ = unit;
        scores_ = scores;
    }
    int count_turns() const { return 0; }
    template <typename Turn>
    void add(Turn &) {}

  protected:
    int query(int i) const { return unit_.pair * 2 * cut_.height + i; }
    Vec score_of(int i, int c) const {
        const int tile = i >= cut_.height;
        const float *from = scores_ + (tile * COLUMNS + c) * SUMS + (i - tile * cut_.height) * TILE;
        return load(from) * scale_ + load(unit_.chunk->column[c].bias);
    }

    const Cut cut_;
    const float scale_;
    Unit unit_{nullptr, 0};
    const float *scores_ = nullptr;
};

// sums[piece][block][lane] += exp2(score - lse).
class MassWork : public ScoreWork {
  public:
    MassWork(const Cut &cut, float scale, const float *lse, float *const *sums) : ScoreWork(cut, scale), lse_(lse), sums_(sums) {}

    ALONE void row(int i) {
        const Exp2 exp;
        const Vec lse = keep(lse_[query(i)] - 0.5f);
        float *sums = sums_[query(i)];
        const Chunk &chunk = *unit_.chunk;
        int block = chunk.column[0].block;
        Vec total = load(sums + size_t(block) * LANES);
        for (int c = 0; c < chunk.num_columns; c++) {
            if (chunk.column[c].block != block) {
                store(sums + size_t(block) * LANES, total);
                block = chunk.column[c].block;
                total = load(sums + size_t(block) * LANES);
            }
            total += exp(score_of(i, c) - lse);
        }
        store(sums + size_t(block) * LANES, total);
    }

  private:
    const float *lse_;
    float *const *sums_;  // of each query's piece
};

// Queries of one row that stand in the packed ones from `at` on.
struct Piece {
    int row, at, start, count;
};

// Rows of few queries pass the keys together, so that the keys are read once for all of them.
template <int PARTS>
void mass_as(const Queries *rows, int num_rows, const Panels &panels, int dim, float scale, const float *lse, int64_t lse_stride,
             const float *factors, float *mass, float *scratch) {
    const int per_piece = panels.num_blocks * LANES;
    Pieces memory(scratch);
    Bf16 *q = memory.halves(packed_queries(dim, PARTS));
    float *scores = memory.floats(2 * UNIT_SCORES), *lse_2 = memory.floats(MAX_ROWS);
    float *sums = memory.floats(size_t(MAX_PIECES) * per_piece), *sums_of[MAX_QUERIES];
    for (int i = 0; i < num_rows * panels.num_blocks; i++) mass[i] = 0;
    for (int row = 0, done = 0; row < num_rows;) {
        Piece pieces[MAX_PIECES];
        int num_pieces = 0, packed = 0;
        while (row < num_rows && num_pieces < MAX_PIECES && packed < MAX_QUERIES) {
            const int left = rows[row].count - done, room = MAX_QUERIES - packed;
            const Piece piece{row, packed, done, left < room ? left : room};
            for (int i = 0; i < piece.count; i++) {
                const float found = lse[rows[row].token(done + i) * lse_stride] * LOG2_E;
                lse_2[packed + i] = found == -INFINITY_ ? INFINITY_ : found;  // saw no key: pays nothing
                sums_of[packed + i] = sums + size_t(num_pieces) * per_piece;
            }
            pieces[num_pieces++] = piece;
            packed += piece.count;
            done = piece.count == left ? 0 : done + piece.count;
            row += piece.count == left;
        }
        if (packed == 0) continue;
        const Cut cut(packed);
        for (int p = 0; p < num_pieces; p++)
            pack_queries<PARTS>(rows[pieces[p].row], pieces[p].start, pieces[p].count, cut, pieces[p].at, dim, q);
        clear_queries<PARTS>(packed, cut, dim, q);
        for (int i = 0; i < num_pieces * per_piece; i++) sums[i] = 0;
        const CutTiles leave(cut.height);
        MassWork work(cut, scale * LOG2_E, lse_2, sums_of);
        const Walk<PARTS> walk{panels, Packing<PARTS>(dim), nullptr, panels.num_blocks};
        for_units<PARTS>(q, cut, packed, walk, {nullptr, walk, 0}, dim, scores, work);
        for (int p = 0; p < num_pieces; p++) {
            float *to = mass + size_t(pieces[p].row) * panels.num_blocks;
            for (int block = 0; block < panels.num_blocks; block++)
                to[block] += sum(load(sums + size_t(p) * per_piece + block * LANES)) * factors[pieces[p].row];
        }
    }
}

void mass(const Queries *rows, int num_rows, const Panels &panels, int dim, float scale, const float *lse, int64_t lse_stride,
          const float *factors, float *mass, float *scratch) {
    const auto as = rows[0].is_bf16 ? mass_as<1> : mass_as<NUM_PARTS>;
    as(rows, num_rows, panels, dim, scale, lse, lse_stride, factors, mass, scratch);
}

PanelSize panel_size(int dim, bool is_bf16) {
    const size_t tile = size_t(is_bf16 ? 1 : NUM_PARTS) * TILE_SIZE / 2;
    return {2 * count_steps(dim) * tile, count_dim_tiles(dim) * tile};
}

}  // namespace

const Variant amx{PANEL, panel_size, scratch, pack, attend, mass};

}  // namespace longvid
#endif
