// Numbers of rows on their way from memory into tiles of shared memory, a 16-byte chunk of the tile at a time: as bf16
// parts of 8 bits, which hold a code of any format exactly, or as int8.
#pragma once
#include "common/cuda_tile.cuh"
#include "common/rows.h"
#include "encoded/rows.h"

namespace lgk {

struct __align__(16) Chunk {
  uint32_t words[4];
};

// How numbers lie in memory. kParts: bf16 parts that keep all of a number; kRun: numbers of a chunk of the tile.
struct F32 {
  static constexpr int kParts = 3, kBytes = 4, kRun = 8;
  static constexpr bool kEncoded = false;
  __device__ static float widen(const uint32_t* words, int i) { return bits_float(words[i]); }
};
struct BF16 {
  static constexpr int kParts = 1, kBytes = 2, kRun = 8;
  static constexpr bool kEncoded = false;
  __device__ static float widen(const uint32_t* words, int i) { return bits_float(words[i / 2] >> i % 2 * 16 << 16); }
};
struct F16 {
  static constexpr int kParts = 2, kBytes = 2, kRun = 8;
  static constexpr bool kEncoded = false;
  __device__ static float widen(const uint32_t* words, int i) {
    return f16_to_float(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16));
  }
};
// Codes of any format, as bf16.
struct Codes {
  static constexpr int kParts = 1, kBytes = 1, kRun = 8;
  static constexpr bool kEncoded = true;
};
// Codes of any format but fp8, as int8.
struct Integers {
  static constexpr int kParts = 1, kBytes = 1, kRun = 16;
  static constexpr bool kEncoded = true;
};

// Number d of a row.
template <class N>
__device__ inline float number_at(const Rows& numbers, int64_t row, int64_t d) {
  const int64_t at = row * numbers.row_stride + d * numbers.column_stride;
  uint32_t word;
  if constexpr (N::kBytes == 4)
    word = static_cast<const uint32_t*>(numbers.data)[at];
  else
    word = static_cast<const uint16_t*>(numbers.data)[at];
  return N::widen(&word, 0);
}

// A chunk's numbers as they were read.
template <class N>
struct Run {
  static constexpr int kWords = N::kRun * N::kBytes / 4;
  uint32_t words[kWords];
};

// Numbers d .. d + 7 of a row of `end`; zeros beyond it.
template <class N>
__device__ inline void read_numbers(Run<N>& run, const char* row, int64_t d, int64_t end, int64_t stride) {
  constexpr int kWords = Run<N>::kWords, kBytes = N::kBytes;
  const char* from = row + d * stride * kBytes;
  if (stride == 1 && d + N::kRun <= end && reinterpret_cast<uintptr_t>(from) % kChunkBytes == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const Chunk chunk = reinterpret_cast<const Chunk*>(from)[i / 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) run.words[i + j] = chunk.words[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N::kRun; ++i) {
    if (d + i >= end) break;
    const char* at = from + i * stride * kBytes;
    if constexpr (kBytes == 4)
      run.words[i] = *reinterpret_cast<const uint32_t*>(at);
    else
      run.words[i / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(at)) << i % 2 * 16;
  }
}

// The same of packed codes: N::kRun / 8 * bits bytes, fewer at the end of a row.
template <class N>
__device__ inline void read_codes(Run<N>& run, const char* row, int64_t d, int64_t end, int bits) {
  const char* from = row + d / 8 * bits;
  const int whole = N::kRun / 8 * bits;
  const int64_t left = ((end - d) * bits + 7) / 8;
  const auto at = reinterpret_cast<uintptr_t>(from);
  if (whole == 16 && left >= 16 && at % 16 == 0) {
    const Chunk chunk = *reinterpret_cast<const Chunk*>(from);
#pragma unroll
    for (int i = 0; i < Run<N>::kWords; ++i) run.words[i] = chunk.words[i];
  } else if (whole == 8 && left >= 8 && at % 8 == 0) {
    const auto both = *reinterpret_cast<const uint64_t*>(from);
    run.words[0] = uint32_t(both), run.words[1] = uint32_t(both >> 32);
  } else if (whole == 4 && left >= 4 && at % 4 == 0) {
    run.words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if (whole == 2 && left >= 2 && at % 2 == 0) {
    run.words[0] = *reinterpret_cast<const uint16_t*>(from);
  } else {
    const int here = left < whole ? int(left) : whole;
#pragma unroll
    for (int i = 0; i < 4 * Run<N>::kWords; ++i) {
      if (i < here) run.words[i / 4] |= uint32_t(static_cast<uint8_t>(from[i])) << i % 4 * 8;
    }
  }
}

__device__ inline int bits_of(Code code) {
  return code == Code::kI4 ? 4 : code == Code::kI2 ? 2 : code == Code::kSign ? 1 : 8;
}

// A chunk's numbers from d on of a row, of those before `end`; zeros where the row does not count.
template <class N>
__device__ inline void read_run(Run<N>& run, const Rows& numbers, const EncodedRows& encoded, int64_t row, bool counts,
                                int64_t d, int64_t end) {
#pragma unroll
  for (int i = 0; i < Run<N>::kWords; ++i) run.words[i] = 0;
  if (!counts || d >= end) return;
  if constexpr (N::kEncoded) {
    read_codes(run, reinterpret_cast<const char*>(encoded.codes) + row * encoded.code_stride, d, end,
               bits_of(encoded.encoding.code));
  } else {
    read_numbers(run, static_cast<const char*>(numbers.data) + row * numbers.row_stride * N::kBytes, d, end,
                 numbers.column_stride);
  }
}

// Code i of a run as a number; the layouts are those of logra_kernels/ops/_format.py. A small whole number is the
// lowest byte of a float of 2^23 and more, whose steps are 1.
template <Code kCode>
__device__ inline float number_of(const uint32_t* words, int i) {
  constexpr uint32_t kTwo23 = 0x4b000000;
  if constexpr (kCode == Code::kI8) {
    const uint32_t byte = bytes_of(words[i / 4] ^ 0x80808080u, kTwo23, 0x7540u | uint32_t(i % 4));
    return bits_float(byte) - (0x1p23f + 128);
  } else if constexpr (kCode == Code::kI4) {
    return bits_float((words[i / 8] >> i % 8 * 4 & 15) | kTwo23) - (0x1p23f + 8);
  } else if constexpr (kCode == Code::kI2) {
    return bits_float((words[i / 16] >> i % 16 * 2 & 3) | kTwo23) - (0x1p23f + 2);
  } else if constexpr (kCode == Code::kSign) {
    return bits_float((words[i / 32] >> i % 32 & 1) != 0 ? 0x3f800000u : 0xbf800000u);
  } else {
    // e4m3's exponent and fraction lie as those of a float 2^-120 as large; 0x7f is NaN
    const uint32_t field = words[i / 4] >> i % 4 * 8, size = field & 0x7f;
    const float number = bits_float(size << 20) * 0x1p120f;
    return bits_float((size == 0x7f ? 0x7fc00000u : float_bits(number)) | (field & 0x80) << 24);
  }
}

// Eight codes as bf16, which holds them exactly.
template <Code kCode>
__device__ inline Chunk exact_bf16(const uint32_t* words) {
  Chunk packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = number_of<kCode>(words, 2 * i), high = number_of<kCode>(words, 2 * i + 1);
    packed.words[i] = bytes_of(float_bits(low), float_bits(high), 0x7632);
  }
  return packed;
}

// Bytes of 0..15, less `offset`, as int8.
__device__ inline uint32_t less(uint32_t bytes, uint32_t offset) {
  return ((bytes | 0x80808080u) - offset * 0x01010101u) ^ 0x80808080u;
}

// Sixteen codes as int8.
__device__ inline Chunk integers_of(const uint32_t* words, Code code) {
  Chunk packed;
  if (code == Code::kI8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.words[i] = words[i];
  } else if (code == Code::kI4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t even = words[i] & 0x0f0f0f0fu, odd = words[i] >> 4 & 0x0f0f0f0fu;
      packed.words[2 * i] = less(bytes_of(even, odd, 0x5140), 8);
      packed.words[2 * i + 1] = less(bytes_of(even, odd, 0x7362), 8);
    }
  } else if (code == Code::kI2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t four = words[0] >> 8 * i & 0xff;
      packed.words[i] = less((four | four << 6 | four << 12 | four << 18) & 0x03030303u, 2);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t four = words[0] >> 4 * i & 15;
      packed.words[i] = less((four | four << 7 | four << 14 | four << 21) << 1 & 0x02020202u, 1);
    }
  }
  return packed;
}

// A run into chunk `chunk` of row `row` of the tiles of `parts`, kTile bytes each, rows of 128 bytes.
template <class N, int kTile>
__device__ inline void store_run(char* parts, int row, int chunk, const Run<N>& run, Code code) {
  char* to = parts + tile_offset<8>(row, chunk);
  if constexpr (N::kRun == 16) {
    *reinterpret_cast<Chunk*>(to) = integers_of(run.words, code);
  } else if constexpr (N::kEncoded) {
    auto& chunk_of = *reinterpret_cast<Chunk*>(to);
    if (code == Code::kI8) {
      chunk_of = exact_bf16<Code::kI8>(run.words);
    } else if (code == Code::kI4) {
      chunk_of = exact_bf16<Code::kI4>(run.words);
    } else if (code == Code::kF8) {
      chunk_of = exact_bf16<Code::kF8>(run.words);
    } else if (code == Code::kI2) {
      chunk_of = exact_bf16<Code::kI2>(run.words);
    } else {
      chunk_of = exact_bf16<Code::kSign>(run.words);
    }
  } else if constexpr (N::kParts == 1) {
    *reinterpret_cast<Chunk*>(to) = {{run.words[0], run.words[1], run.words[2], run.words[3]}};
  } else {
    float numbers[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) numbers[i] = N::widen(run.words, i);
#pragma unroll
    for (int p = 0; p < N::kParts; ++p) {
      Chunk packed;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &low = numbers[2 * i], &high = numbers[2 * i + 1];
        const uint32_t word = pack_bf16(low, high);
        packed.words[i] = word;
        low -= bits_float(word << 16), high -= bits_float(word & 0xffff0000u);
        low = low == low ? low : 0.f, high = high == high ? high : 0.f;  // of what is not finite nothing is left
      }
      *reinterpret_cast<Chunk*>(to + p * kTile) = packed;
    }
  }
}

}  // namespace lgk
