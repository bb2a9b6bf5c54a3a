// Norms, gates, GELU and rotary embedding on the CPU: deals rows to threads. Plain C entry points, for ctypes. Each row is
// computed by one thread, so a result does not depend on how many there are.

#include "rows.h"

#include "isa.h"

namespace longvid {
namespace {

// Of elements, below which waking threads costs more than they save.
constexpr int64_t WORTH_A_THREAD = int64_t(1) << 18;

const RowVariant *find(int isa) {
#ifdef LONGVID_X86_VARIANTS
    if (isa >= 2) return &rows_avx512;  // the matrix units have no part in it
    if (isa == 1) return &rows_avx2;
#endif
    return isa == 0 ? &rows_portable : nullptr;
}

// Calls kernel(args, first, last) for shares of `count` rows of `width` elements.
template <typename Args>
int deal(void (*kernel)(const Args &, int64_t, int64_t), const Args &args, int64_t count, int64_t width) {
    const int64_t useful = count * width / WORTH_A_THREAD + 1;
    const int threads = int(useful < args.threads ? useful : args.threads);
    if (threads == 1) {
        kernel(args, 0, count);
        return 0;
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int i = 0; i < threads; i++) kernel(args, count * i / threads, count * (i + 1) / threads);
    return 0;
}

}  // namespace
}  // namespace longvid

using namespace longvid;

extern "C" {

int longvid_norm(const NormArgs *args) {
    const RowVariant *variant = find(args->isa);
    return variant ? deal(variant->norm, *args, args->count, args->width) : 1;
}

int longvid_gate(const GateArgs *args) {
    const RowVariant *variant = find(args->isa);
    return variant ? deal(variant->gate, *args, args->count, args->width) : 1;
}

int longvid_gelu(const GeluArgs *args) {
    const RowVariant *variant = find(args->isa);
    return variant ? deal(variant->gelu, *args, args->count, 1) : 1;
}

int longvid_rope(const RopeArgs *args) {
    const RowVariant *variant = find(args->isa);
    return variant ? deal(variant->rope, *args, args->tokens, int64_t(args->heads) * args->dim) : 1;
}

}  // extern "C"
