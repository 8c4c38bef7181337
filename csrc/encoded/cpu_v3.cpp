// x86-64-v3: AVX2, FMA, F16C.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "common/kernels.h"
#include "encoded/kernels.h"

#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

#define LGK_VECTOR_BYTES 32
#define LGK_F16C
#define LGK_TABLE kEncodedV3
#include "encoded/kernels.inc"
#endif
