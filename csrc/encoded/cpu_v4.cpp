// x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "common/kernels.h"
#include "encoded/kernels.h"

#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")

#define LGK_VECTOR_BYTES 64
#define LGK_F16C
#define LGK_TABLE kEncodedV4
#include "encoded/kernels.inc"
#endif
