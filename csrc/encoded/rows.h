// Rows whose numbers are codes with a scale for each block of neighbours: number = scale * code. Nothing here owns
// memory. The layout of each format is that of logra_kernels/ops/_format.py.
#pragma once
#include <cstdint>

namespace lgk {

enum class Code : int { kF8 = 3, kI8 = 4, kI4 = 5, kI2 = 6, kSign = 7 };

constexpr int code_bits(Code code) {
  return code == Code::kI4 ? 4 : code == Code::kI2 ? 2 : code == Code::kSign ? 1 : 8;
}

struct Encoding {
  Code code;
  bool half_scales;  // fp16, otherwise fp32
  int64_t block;     // numbers that share a scale: a power of 2 from 32 on

  int64_t bits() const { return code_bits(code); }
  // Of the first `numbers` numbers of a row; a multiple of 8, or all.
  int64_t bytes(int64_t numbers) const { return (numbers * bits() + 7) / 8; }
};

struct EncodedRows {
  Encoding encoding;
  const uint8_t* codes;
  const void* scales;
  int64_t code_stride, scale_stride;  // of rows: bytes, and scales

  EncodedRows from(int64_t rows) const {
    EncodedRows rest = *this;
    rest.codes += rows * code_stride;
    rest.scales = static_cast<const char*>(scales) + rows * scale_stride * (encoding.half_scales ? 2 : 4);
    return rest;
  }
};

}  // namespace lgk
