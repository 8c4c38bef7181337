// Encoded rows as a binding takes them.
#pragma once
#include "arguments.h"
#include "encoded/rows.h"

namespace lgk {

// (codes, scales, format code, fp16 scales, block, bytes between rows, scales between rows)
using Encoded = std::tuple<Address, Address, int, bool, int64_t, int64_t, int64_t>;

inline Encoding encoding_of(const char* op, int code, bool half_scales, int64_t block) {
  LGK_CHECK(code >= 3 && code <= 7, std::string(op) + ": format code " + std::to_string(code) + " has no scales");
  LGK_CHECK(block >= 32 && (block & (block - 1)) == 0,
            std::string(op) + ": block " + std::to_string(block) + " must be a power of two from 32 on");
  return {static_cast<Code>(code), half_scales, block};
}

inline EncodedRows encoded_of(const char* op, const Encoded& rows) {
  const auto& [codes, scales, code, half_scales, block, code_stride, scale_stride] = rows;
  return {encoding_of(op, code, half_scales, block), reinterpret_cast<const uint8_t*>(codes),
          reinterpret_cast<const void*>(scales), code_stride, scale_stride};
}

inline void check_digits(const char* op, int digits) {
  LGK_CHECK(digits >= 0 && digits <= 2, std::string(op) + ": " + std::to_string(digits) + " digits; 0 to 2 are known");
}

}  // namespace lgk
