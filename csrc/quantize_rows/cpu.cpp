#include "quantize_rows/cpu.h"

#include <omp.h>

#include <algorithm>
#include <limits>

#include "common/buffer.h"
#include "common/kernels.h"
#include "common/threads.h"
#include "encoded/kernels.h"

namespace lgk::quantize_rows {
namespace {

constexpr int64_t kPadding = 64;  // what pack_rows may write beyond a row
constexpr int64_t kAhead = 2048;  // numbers that are fetched before their turn: the processor itself stops at each page

// What lies kAhead after n numbers; there may be nothing.
void fetch(const float* from, int64_t n) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(from) + kAhead * sizeof(float);
  for (uintptr_t at = first; at < first + n * sizeof(float); at += 64) __builtin_prefetch(reinterpret_cast<void*>(at));
}

uint32_t mix(uint64_t x) {
  uint32_t h = static_cast<uint32_t>(x ^ (x >> 32));
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

struct Encoder {
  const EncodedKernels& kernels;
  const Products<float>& pack;
  const Rows& g;
  const Encoding& encoding;
  const Chance& chance;
  uint8_t* codes;
  void* scales;
  Shape shape;

  int64_t widest() const { return std::min(encoding.block, round_up(shape.d, kChunk)); }
  // The block's numbers, and what the sum of their magnitudes needs.
  int64_t scratch_size() const {
    return round_up(pack.row_tile * widest() + 2 * encoding.block + kPadding, kCacheLine);
  }

  // The rounded scale, kept at i of the scales.
  float keep(float scale, int64_t i) const {
    if (encoding.half_scales) scale = float_of_half(half_of(scale));
    if (scale < std::numeric_limits<float>::min()) scale = 0;
    if (scale > std::numeric_limits<float>::max()) scale = std::numeric_limits<float>::quiet_NaN();
    if (encoding.half_scales) {
      static_cast<uint16_t*>(scales)[i] = half_of(scale);
    } else {
      static_cast<float*>(scales)[i] = scale;
    }
    return scale;
  }

  // A row's numbers from `column` on where they lie, if they are fp32 side by side.
  const float* in_place(int64_t row, int64_t column) const {
    const bool plain = g.number() == Dtype::kF32 && g.column_stride == 1;
    return plain ? static_cast<const float*>(g.data) + g.offset(row) + column : nullptr;
  }

  // Whether every block has a scale.
  bool encode(int64_t row, float* scratch) const {
    const int64_t blocks = ceil_div(shape.d, encoding.block);
    const bool mean = encoding.code == Code::kSign && !chance.stochastic;
    const Rounding rounding = {chance.stochastic, mix(static_cast<uint64_t>(chance.first_row + row) ^
                                                      mix(static_cast<uint64_t>(chance.seed)))};
    float* sums = scratch + pack.row_tile * widest() + kPadding;
    bool fits = true;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = b * encoding.block, n = std::min(encoding.block, shape.d - start);
      const float* numbers = in_place(row, start);
      if (numbers != nullptr) fetch(numbers, n);
      if (numbers == nullptr) {
        pack.pack_rows(g, row, 1, start, n, scratch, widest());
        numbers = scratch;
      }
      const float scale = keep(kernels.scale_of(numbers, n, encoding, mean, sums), row * blocks + b);
      const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
      fits &= scale == scale;
      for (int64_t i = 0; i < n; i += kChunk) {
        kernels.encode(numbers + i, std::min(kChunk, n - i), inverse, encoding, rounding, start + i,
                       codes + row * encoding.bytes(shape.d) + encoding.bytes(start + i));
      }
    }
    return fits;
  }
};

}  // namespace

bool quantize_rows(const Rows& g, const Encoding& encoding, const Chance& chance, uint8_t* codes, void* scales,
                   Shape shape, int n_threads) {
  if (shape.rows == 0 || shape.d == 0) return true;
  n_threads = threads_for(double(shape.rows) * shape.d, n_threads);
  const Encoder encoder = {encoded_kernels(), lgk::kernels<float>(), g, encoding, chance, codes, scales, shape};
  const int64_t size = encoder.scratch_size();
  const Buffer<float> scratch(size * n_threads);
  bool fits = true;
#pragma omp parallel for schedule(static) num_threads(n_threads) reduction(&& : fits)
  for (int64_t row = 0; row < shape.rows; ++row) {
    fits = encoder.encode(row, scratch.data() + size * omp_get_thread_num()) && fits;
  }
  return fits;
}

}  // namespace lgk::quantize_rows
