// Which variants for later x86 processors this compiler can build: it must obey `#pragma GCC target`.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LONGVID_X86_VARIANTS
#if __GNUC__ >= 11 && defined(__linux__)
#define LONGVID_AMX
#endif
#endif

namespace longvid {

// Whether this processor has matrix units for bf16 and this process may use them; asks for that the first time.
bool has_amx();

}  // namespace longvid
