// Whether the wider instruction sets are built: they need GCC's target pragma, which Clang ignores.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LGK_HAS_X86_SETS 1
#else
#define LGK_HAS_X86_SETS 0
#endif

// Tiles came with GCC 11, and how a process asks for them is the kernel's.
#if LGK_HAS_X86_SETS && defined(__linux__) && __GNUC__ >= 11
#define LGK_HAS_AMX 1
#else
#define LGK_HAS_AMX 0
#endif
