#include <cstring>

#include "store/take.h"

namespace lgk::store {
namespace {

constexpr uint32_t kSign = 0x80000000u;
// The magnitudes from which on fp32 is infinite or NaN, and bf16 rounds to infinity.
constexpr int32_t kNotFinite = 0x7f800000;
constexpr int32_t kTooLargeForBf16 = 0x7f7f8000;

inline float copied(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

inline uint16_t rounded(uint32_t bits) { return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16); }

// Magnitudes of floats compare as integers do. A flag that only gains bits keeps the loop free of instructions that the
// oldest x86-64 lacks.
template <typename Out, typename Convert>
bool take(const float* source, int64_t stride, Out* out, int64_t rows, int64_t d, int32_t limit, Convert convert) {
  uint32_t unfit = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = source + row * stride;
    Out* to = out + row * d;
    for (int64_t i = 0; i < d; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      unfit |= static_cast<int32_t>(bits & ~kSign) >= limit ? ~0u : 0u;
      to[i] = convert(bits);
    }
  }
  return unfit == 0;
}

}  // namespace

bool take_fp32(const float* source, int64_t stride, float* out, int64_t rows, int64_t d) {
  return take(source, stride, out, rows, d, kNotFinite, copied);
}

bool take_bf16(const float* source, int64_t stride, uint16_t* out, int64_t rows, int64_t d) {
  return take(source, stride, out, rows, d, kTooLargeForBf16, rounded);
}

}  // namespace lgk::store
