// Whether this compiler can build variants for later x86 processors: it must obey `#pragma GCC target`.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LONGVID_X86_VARIANTS
#endif
