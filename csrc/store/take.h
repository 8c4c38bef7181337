// fp32 rows on their way into a store: copied or rounded to bf16, and checked, in one pass of one thread.
#pragma once
#include <cstdint>

namespace lgk::store {

// out [rows, d] = source [rows, d], its rows `stride` apart. False if a number is NaN or infinite, or becomes so.
bool take_fp32(const float* source, int64_t stride, float* out, int64_t rows, int64_t d);
// Rounded to nearest, ties to even.
bool take_bf16(const float* source, int64_t stride, uint16_t* out, int64_t rows, int64_t d);

}  // namespace lgk::store
