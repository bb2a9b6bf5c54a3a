// Leave to use the matrix units: Linux gives it to processes that ask.

#include "isa.h"

#ifdef LONGVID_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace longvid {
namespace {

bool ask() {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AVX512_BF16 = 1u << 5;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

bool has_amx() {
    static const bool has = ask();
    return has;
}

}  // namespace longvid
#else
bool longvid::has_amx() { return false; }
#endif
