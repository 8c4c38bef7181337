// fp32 rows on their way into a store: copied or rounded to bf16, and checked, in one pass of one thread.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace lgk::store {

// (address, numbers), one after the other; memory of whole numbers.
template <typename Out>
using Pieces = std::vector<std::pair<Out*, int64_t>>;

// out [rows, d] = source [rows, d], its rows `stride` apart, as far as `out` reaches. False if a number is NaN or
// infinite, or becomes so.
bool take_fp32(const float* source, int64_t stride, const Pieces<float>& out, int64_t d);
// Rounded to nearest, ties to even.
bool take_bf16(const float* source, int64_t stride, const Pieces<uint16_t>& out, int64_t d);

// The largest magnitude of source [rows, d], or NaN if there is one. One pass of one thread.
float largest_magnitude(const float* source, int64_t stride, int64_t rows, int64_t d);

}  // namespace lgk::store
