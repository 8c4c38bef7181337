// The table that belongs to the instruction set chosen in common/cpu_isa.cpp, and what every set shares.
#include <cstring>

#include "common/isa.h"
#include "common/kernels.h"
#include "encoded/f8.h"
#include "encoded/integers.h"
#include "encoded/kernels.h"
#include "encoded/signs.h"

namespace lgk {

extern const EncodedKernels kEncodedBase;
#if LGK_HAS_X86_SETS
extern const EncodedKernels kEncodedV3, kEncodedV4;
extern const IntegerKernels kIntegersV3, kIntegersV4Vnni;
extern const SignKernels kSignsV3, kSignsV4Vbmi;
extern const F8Kernels kF8V4;
extern const decltype(EncodedKernels::few_f8) kFewF8V4Vbmi;
#endif
#if LGK_HAS_AMX
extern const IntegerTiles kTilesV4Amx;
extern const F8Kernels kF8TilesV4Amx;
#endif

namespace {

#if LGK_HAS_X86_SETS
bool beyond_v4() {
  const std::string isa = isa_name();
  return isa == "v4vnni" || isa == "v4bf16" || isa == "v4amx";
}

bool multiplies_bytes() { return beyond_v4() && __builtin_cpu_supports("avx512vnni"); }

bool in_tiles() { return isa_name() == std::string("v4amx"); }

IntegerKernels with_tiles(IntegerKernels kernels) {
#if LGK_HAS_AMX
  if (in_tiles()) kernels.many = kTilesV4Amx;
#endif
  return kernels;
}

F8Kernels with_tiles(const F8Kernels& kernels) {
#if LGK_HAS_AMX
  if (in_tiles()) {
    F8Kernels tiles = kF8TilesV4Amx;
    tiles.expand = kernels.expand;
    tiles.split = kernels.split;
    tiles.part = kernels.part;
    tiles.few = kernels.few;
    return tiles;
  }
#endif
  return kernels;
}
#endif

EncodedKernels choose() {
  const std::string isa = isa_name();
#if LGK_HAS_X86_SETS
  EncodedKernels wide = kEncodedV4;
  if (beyond_v4() && __builtin_cpu_supports("avx512vbmi")) wide.few_f8 = kFewF8V4Vbmi;
  if (isa == "v3") return kEncodedV3;
  if (isa != "base") return wide;
#endif
  return kEncodedBase;
}

}  // namespace

const EncodedKernels& encoded_kernels() {
  static const EncodedKernels chosen = choose();
  return chosen;
}

const IntegerKernels* integer_kernels() {
#if LGK_HAS_X86_SETS
  static const bool have = isa_name() != std::string("base"), vnni = multiplies_bytes();
  static const IntegerKernels chosen = vnni ? with_tiles(kIntegersV4Vnni) : kIntegersV3;
  return have ? &chosen : nullptr;
#else
  return nullptr;
#endif
}

const SignKernels* sign_kernels() {
#if LGK_HAS_X86_SETS
  static const bool wide = __builtin_cpu_supports("avx512vbmi") && multiplies_bytes();
  static const bool narrow = isa_name() == std::string("v3");
  return wide ? &kSignsV4Vbmi : narrow ? &kSignsV3 : nullptr;
#else
  return nullptr;
#endif
}

const F8Kernels* f8_kernels() {
#if LGK_HAS_X86_SETS
  static const bool have =
      __builtin_cpu_supports("avx512vbmi") && multiplies_bytes() && (isa_name() == std::string("v4bf16") || in_tiles());
  static const F8Kernels chosen = with_tiles(kF8V4);
  return have ? &chosen : nullptr;
#else
  return nullptr;
#endif
}

// Round to nearest even, through integers alone: independent of the thread's flush-to-zero mode.
uint16_t half_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (size >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  const int exponent = static_cast<int>(size >> 23) - 127;
  const uint32_t mantissa = (size & 0x7fffffu) | 0x800000u;
  const int dropped = exponent < -14 ? -1 - exponent : 13;  // of the mantissa's 24 bits
  if (dropped > 24) return static_cast<uint16_t>(sign);
  const uint32_t kept = mantissa >> dropped, rest = mantissa & ((1u << dropped) - 1), half = 1u << (dropped - 1);
  const uint32_t up = rest > half || (rest == half && (kept & 1)) ? 1 : 0;
  const uint32_t biased = exponent < -14 ? 0 : static_cast<uint32_t>(exponent + 14) << 10;
  return static_cast<uint16_t>(sign | (biased + kept + up));
}

float float_of_half(uint16_t bits) {
  const uint32_t size = bits & 0x7fffu, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const float scaled = static_cast<float>(size) * 0x1p-24f;
  uint32_t wide = (size << 13) + ((size >= 0x7c00u ? 2u : 1u) * (112u << 23));
  if (size < 0x400u) std::memcpy(&wide, &scaled, sizeof(wide));
  wide |= sign;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

}  // namespace lgk
