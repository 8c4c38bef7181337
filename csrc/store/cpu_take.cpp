#include <algorithm>
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
bool take(const float* source, int64_t stride, const Pieces<Out>& out, int64_t d, int32_t limit, Convert convert) {
  uint32_t unfit = 0;
  int64_t column = 0;
  for (const auto& [address, numbers] : out) {
    Out* to = address;
    for (int64_t left = numbers; left > 0;) {
      const int64_t here = std::min(left, d - column);
      const float* from = source + column;
      for (int64_t i = 0; i < here; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, sizeof(bits));
        unfit |= static_cast<int32_t>(bits & ~kSign) >= limit ? ~0u : 0u;
        to[i] = convert(bits);
      }
      to += here;
      left -= here;
      column += here;
      if (column == d) {
        column = 0;
        source += stride;
      }
    }
  }
  return unfit == 0;
}

}  // namespace

bool take_fp32(const float* source, int64_t stride, const Pieces<float>& out, int64_t d) {
  return take(source, stride, out, d, kNotFinite, copied);
}

bool take_bf16(const float* source, int64_t stride, const Pieces<uint16_t>& out, int64_t d) {
  return take(source, stride, out, d, kTooLargeForBf16, rounded);
}

float largest_magnitude(const float* source, int64_t stride, int64_t rows, int64_t d) {
  int32_t largest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = source + row * stride;
    for (int64_t i = 0; i < d; ++i) {
      int32_t bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      bits &= static_cast<int32_t>(~kSign);
      largest = bits > largest ? bits : largest;
    }
  }
  return copied(static_cast<uint32_t>(largest));
}

}  // namespace lgk::store
