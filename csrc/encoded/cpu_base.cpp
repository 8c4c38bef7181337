// Any CPU the compiler targets; vectors as narrow as x86-64 and AArch64 have them.
#include <cstdint>
#include <utility>

#include "common/kernels.h"
#include "encoded/kernels.h"

#define LGK_VECTOR_BYTES 16
#define LGK_TABLE kEncodedBase
#include "encoded/kernels.inc"
