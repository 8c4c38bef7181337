// x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "common/kernels.h"

#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")

#define LGK_VECTOR_BYTES 64
#define LGK_ROWS 12
#define LGK_ROW_STEP 2
#define LGK_VECTORS 4
#define LGK_SUMS 24
#define LGK_DOT_SUMS 16
#define LGK_F16C
#define LGK_TABLE kKernelsV4
#include "common/kernels.inc"
#endif
