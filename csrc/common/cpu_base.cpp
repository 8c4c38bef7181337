// The floor: SSE2 on x86-64, whatever the compiler targets elsewhere.
#include <cstdint>
#include <utility>

#include "common/kernels.h"

#define LGK_VECTOR_BYTES 16
#define LGK_ROWS 4
#define LGK_ROW_STEP 2
#define LGK_VECTORS 2
#define LGK_SUMS 8
#define LGK_DOT_SUMS 8
#define LGK_TABLE kKernelsBase
#include "common/kernels.inc"
