// The kernels behind cuda.h. A block has 8 warps and a tile of queries against 128 rows; while a step of 64 numbers is
// multiplied, the next one is on its way to registers, and is converted as it goes into the other half of shared
// memory.
#pragma once
#include "common/cuda_tile.cuh"
#include "score_block/cuda.h"

namespace lgk::score_block {

constexpr int kThreads = 256, kRows = 128, kDepth = 64, kChunks = kDepth / 8;

struct __align__(16) Chunk {
  uint32_t words[4];
};

// How numbers lie in memory and become fp32: eight neighbours at a time.
struct F32 {
  static constexpr int kParts = 3, kBytes = 4;
  __device__ static float widen(const char* at) { return *reinterpret_cast<const float*>(at); }
};
struct BF16 {
  static constexpr int kParts = 1, kBytes = 2;
  __device__ static float widen(const char* at) { return bf16_to_float(*reinterpret_cast<const uint16_t*>(at)); }
};
struct F16 {
  static constexpr int kParts = 2, kBytes = 2;
  __device__ static float widen(const char* at) { return f16_to_float(*reinterpret_cast<const uint16_t*>(at)); }
};
// Codes of any format; at most a byte a number.
struct Codes {
  static constexpr int kParts = 1, kBytes = 1;
};

// Eight numbers of a row as they were read.
template <class N>
struct Run {
  static constexpr int kWords = 8 * N::kBytes / 4;
  uint32_t words[kWords];
};

// Numbers d .. d + 7 of a row of `end`; zeros beyond it, and where the row does not count.
template <class N>
__device__ inline void read_run(Run<N>& run, const char* row, bool counts, int64_t d, int64_t end, int64_t stride) {
  constexpr int kWords = Run<N>::kWords, kBytes = N::kBytes;
  for (int i = 0; i < kWords; ++i) run.words[i] = 0;
  if (!counts || d >= end) return;
  const char* from = row + d * stride * kBytes;
  if (stride == 1 && d + 8 <= end && reinterpret_cast<uintptr_t>(from) % kChunkBytes == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const Chunk chunk = reinterpret_cast<const Chunk*>(from)[i / 4];
      for (int j = 0; j < 4; ++j) run.words[i + j] = chunk.words[j];
    }
    return;
  }
  const int here = end - d < 8 ? int(end - d) : 8;
  for (int i = 0; i < 8; ++i) {
    const char* at = from + i * stride * kBytes;
    if (i >= here) break;
    if constexpr (kBytes == 4)
      run.words[i] = *reinterpret_cast<const uint32_t*>(at);
    else
      run.words[i / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(at)) << i % 2 * 16;
  }
}

// The same of packed codes: `bits` bytes, fewer at the end of a row.
__device__ inline void read_codes(Run<Codes>& run, const char* row, bool counts, int64_t d, int64_t end, int bits) {
  run.words[0] = run.words[1] = 0;
  if (!counts || d >= end) return;
  const char* from = row + d / 8 * bits;
  const int64_t left = ((end - d) * bits + 7) / 8;
  const int here = left < bits ? int(left) : bits;
  if (here == 8 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
    const auto both = *reinterpret_cast<const uint64_t*>(from);
    run.words[0] = uint32_t(both), run.words[1] = uint32_t(both >> 32);
  } else if (here == 4 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    run.words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    for (int i = 0; i < here; ++i) run.words[i / 4] |= uint32_t(static_cast<uint8_t>(from[i])) << i % 4 * 8;
  }
}

__device__ inline int bits_of(Code code) {
  return code == Code::kI4 ? 4 : code == Code::kI2 ? 2 : code == Code::kSign ? 1 : 8;
}

// A code of the format as a number; the layouts are those of logra_kernels/ops/_format.py.
__device__ inline float number_of(uint32_t field, Code code) {
  if (code == Code::kI8) return float(static_cast<int8_t>(field));
  if (code == Code::kI4) return float(int(field) - 8);
  if (code == Code::kI2) return float(int(field) - 2);
  if (code == Code::kSign) return float(2 * int(field) - 1);
  const uint32_t size = field & 0x7f, sign = (field & 0x80) << 24;
  const float tiny = float(size) * 0x1p-9f;
  if (size == 0x7f) return bits_float(0x7fc00000);
  return bits_float(sign | (size < 8 ? float_bits(tiny) : (size << 20) + (120u << 23)));
}

template <class N>
__device__ inline void decode(float (&numbers)[8], const Run<N>& run, Code code, int bits) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if constexpr (N::kBytes > 1) {
      numbers[i] = N::widen(reinterpret_cast<const char*>(run.words) + i * N::kBytes);
    } else {
      const int at = i * bits;
      numbers[i] = number_of(run.words[at / 32] >> at % 32 & ((1u << bits) - 1), code);
    }
  }
}

// A run as bf16 parts, into chunk `chunk` of row `row` of the tiles of `parts`, kTile bytes each.
template <class N, int kTile>
__device__ inline void store_run(char* parts, int row, int chunk, const Run<N>& run, Code code, int bits) {
  float numbers[8];
  decode(numbers, run, code, bits);
#pragma unroll
  for (int p = 0; p < N::kParts; ++p) {
    Chunk packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t word = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& v = numbers[2 * i + h];
        const uint16_t part = float_to_bf16(v);
        word |= uint32_t(part) << 16 * h;
        const float rest = v - bf16_to_float(part);
        v = rest == rest ? rest : 0.f;  // of what is not finite nothing is left
      }
      packed.words[i] = word;
    }
    *reinterpret_cast<Chunk*>(parts + p * kTile + tile_offset<kChunks>(row, chunk)) = packed;
  }
}

template <class Q_, class R_, int kQueries_>
struct Kernel {
  using Q = Q_;
  using R = R_;
  static constexpr bool kEncoded = R::kBytes == 1;
  static constexpr int kQueries = kQueries_, kMost = Q::kParts > R::kParts ? Q::kParts : R::kParts;
  // with two parts on both sides all four products count, with three those of small parts by small ones do not
  static constexpr int kKept = kMost == 2 && Q::kParts == R::kParts ? 3 : kMost;
  static constexpr int kQueryTile = kQueries * kDepth * 2, kRowTile = kRows * kDepth * 2;
  static constexpr int kScaleBytes = kEncoded ? 2 * kRows * int(sizeof(float)) : 0;  // of each half of a step
  static constexpr int kHalf = Q::kParts * kQueryTile + R::kParts * kRowTile + kScaleBytes, kBytes = 2 * kHalf;
  static constexpr int kWarpsDown = kQueries >= 64 ? 2 : 1, kWarpsAcross = 8 / kWarpsDown;
  static constexpr int kDown = kQueries / kWarpsDown / 16, kAcross = kRows / kWarpsAcross / 8;  // fragments of a warp
  static constexpr int kQueryRuns = kQueries * kChunks / kThreads, kRowRuns = kRows * kChunks / kThreads;
  static_assert(kQueryRuns >= 1 || kQueries * kChunks == kThreads / 2, "a run a thread, or one for half of them");
};

template <class K>
struct Sums {
  float c[K::kDown][K::kAcross][4];
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < K::kDown; ++i) {
#pragma unroll
      for (int j = 0; j < K::kAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
      }
    }
  }
};

// A step of the block on its way from memory.
template <class K>
class Step {
  static constexpr int kQueryRuns = K::kQueryRuns > 0 ? K::kQueryRuns : 1;

 public:
  __device__ void read(const CudaArgs& args, int64_t q0, int64_t n0, int64_t d, int64_t end) {
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kQueryRuns; ++i) {
      const int row = (thread + i * kThreads) / kChunks, chunk = thread % kChunks;
      const bool counts = row < K::kQueries && q0 + row < args.query_count;
      const Rows& from = args.queries;
      read_run(queries_[i], static_cast<const char*>(from.data) + (q0 + row) * from.row_stride * K::Q::kBytes, counts,
               d + chunk * 8, end, from.column_stride);
    }
#pragma unroll
    for (int i = 0; i < K::kRowRuns; ++i) {
      const int row = (thread + i * kThreads) / kChunks, chunk = thread % kChunks;
      const bool counts = n0 + row < args.row_count;
      if constexpr (K::kEncoded) {
        const EncodedRows& from = args.encoded;
        read_codes(rows_[i], reinterpret_cast<const char*>(from.codes) + (n0 + row) * from.code_stride, counts,
                   d + chunk * 8, end, bits_of(from.encoding.code));
      } else {
        const Rows& from = args.rows;
        read_run(rows_[i], static_cast<const char*>(from.data) + (n0 + row) * from.row_stride * K::R::kBytes, counts,
                 d + chunk * 8, end, from.column_stride);
      }
    }
    if constexpr (K::kEncoded) {
      const EncodedRows& from = args.encoded;
      const int64_t row = n0 + thread % kRows, middle = d + thread / kRows * (kDepth / 2);
      scale_ = 0;
      if (row < args.row_count) {
        const int64_t at = row * from.scale_stride + (middle < end ? middle : d) / from.encoding.block;
        scale_ = from.encoding.half_scales ? f16_to_float(static_cast<const uint16_t*>(from.scales)[at])
                                           : static_cast<const float*>(from.scales)[at];
      }
    }
  }

  __device__ void store(char* half, const CudaArgs& args) const {
    const int thread = int(threadIdx.x), bits = K::kEncoded ? bits_of(args.encoded.encoding.code) : 0;
    char* rows = half + K::Q::kParts * K::kQueryTile;
#pragma unroll
    for (int i = 0; i < kQueryRuns; ++i) {
      const int row = (thread + i * kThreads) / kChunks;
      if (row < K::kQueries) store_run<typename K::Q, K::kQueryTile>(half, row, thread % kChunks, queries_[i], {}, 0);
    }
#pragma unroll
    for (int i = 0; i < K::kRowRuns; ++i) {
      const int row = (thread + i * kThreads) / kChunks;
      store_run<typename K::R, K::kRowTile>(rows, row, thread % kChunks, rows_[i], args.encoded.encoding.code, bits);
    }
    if constexpr (K::kEncoded) reinterpret_cast<float*>(rows + K::R::kParts * K::kRowTile)[thread] = scale_;
  }

 private:
  Run<typename K::Q> queries_[kQueryRuns];
  Run<typename K::R> rows_[K::kRowRuns];
  float scale_ = 0;
};

// sums += the step's products over chunks `chunk` and the next one, 16 numbers.
template <class K>
__device__ inline void multiply(Sums<K>& sums, const char* half, int chunk, int query, int row, int lane) {
  const char* rows = half + K::Q::kParts * K::kQueryTile;
#pragma unroll
  for (int r = 0; r < K::R::kParts; ++r) {
    uint32_t b[K::kAcross / 2][4];
#pragma unroll
    for (int j = 0; j < K::kAcross / 2; ++j) {
      const int at = row + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(b[j], rows + r * K::kRowTile + tile_offset<kChunks>(at, chunk + lane / 8 % 2));
    }
#pragma unroll
    for (int p = 0; p < K::Q::kParts; ++p) {
      if (p + r >= K::kKept) continue;
#pragma unroll
      for (int i = 0; i < K::kDown; ++i) {
        uint32_t a[4];
        const int at = query + i * 16 + lane % 16;
        load_matrices(a, half + p * K::kQueryTile + tile_offset<kChunks>(at, chunk + lane / 16));
#pragma unroll
        for (int j = 0; j < K::kAcross; ++j)
          multiply_bf16(sums.c[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// sums += part, each column times its scale where there are scales.
template <class K>
__device__ inline void add_scaled(Sums<K>& sums, const Sums<K>& part, const float* scales, int row, int lane) {
#pragma unroll
  for (int j = 0; j < K::kAcross; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float scale = K::kEncoded ? scales[row + j * 8 + lane % 4 * 2 + e % 2] : 1.f;
#pragma unroll
      for (int i = 0; i < K::kDown; ++i) sums.c[i][j][e] += part.c[i][j][e] * scale;
    }
  }
}

// A step's products are summed by themselves where they are to be scaled, or where the many small ones of several parts
// would each cost the whole sum a rounding.
template <class K>
__device__ inline void add_step(Sums<K>& sums, const char* half, int64_t block, int query, int row, int lane) {
  if constexpr (!K::kEncoded && K::kMost == 1) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) multiply<K>(sums, half, chunk, query, row, lane);
  } else {
    const auto* scales =
        reinterpret_cast<const float*>(half + K::Q::kParts * K::kQueryTile + K::R::kParts * K::kRowTile);
    Sums<K> part;
    part.clear();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      multiply<K>(part, half, chunk, query, row, lane);
      if (chunk + 2 == kChunks) {
        add_scaled(sums, part, scales + kRows, row, lane);
      } else if (K::kEncoded && chunk + 2 == kChunks / 2 && block < kDepth) {  // a scale reaches no further
        add_scaled(sums, part, scales, row, lane);
        part.clear();
      }
    }
  }
}

template <class K>
__global__ void __launch_bounds__(kThreads, K::kQueries == 16 ? 2 : 1) score_kernel(const CudaArgs args) {
  extern __shared__ __align__(1024) char shared[];
  const int64_t tiles_down = (args.query_count + K::kQueries - 1) / K::kQueries;
  const int64_t q0 = int64_t(blockIdx.x) % tiles_down * K::kQueries;  // tiles of the same rows are neighbours
  const int64_t n0 = int64_t(blockIdx.x) / tiles_down * kRows;
  const int64_t begin = int64_t(blockIdx.y) * args.piece;
  const int64_t end = begin + args.piece < args.d ? begin + args.piece : args.d;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int query = warp / K::kWarpsAcross * K::kDown * 16, row = warp % K::kWarpsAcross * K::kAcross * 8;
  Sums<K> sums;
  sums.clear();
  Step<K> step;
  step.read(args, q0, n0, begin, end);
  step.store(shared, args);
  __syncthreads();
  char *now = shared, *next = shared + K::kHalf;
  for (int64_t d = begin; d < end; d += kDepth) {
    const bool more = d + kDepth < end;
    if (more) step.read(args, q0, n0, d + kDepth, end);
    add_step<K>(sums, now, args.encoded.encoding.block, query, row, lane);
    if (more) step.store(next, args);
    __syncthreads();  // all have read `now`, and written `next`
    char* other = now;
    now = next, next = other;
  }
  float* out = args.pieces == 1 ? args.out : args.partial + int64_t(blockIdx.y) * args.query_count * args.row_count;
#pragma unroll
  for (int i = 0; i < K::kDown; ++i) {
#pragma unroll
    for (int j = 0; j < K::kAcross; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t q = q0 + query + i * 16 + lane / 4 + e / 2 * 8;
        const int64_t n = n0 + row + j * 8 + lane % 4 * 2 + e % 2;
        if (q < args.query_count && n < args.row_count) out[q * args.row_count + n] = sums.c[i][j][e];
      }
    }
  }
}

// out = the sum of the pieces' sums, in order.
__global__ void add_pieces_kernel(const CudaArgs args) {
  const int64_t size = args.query_count * args.row_count, e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= size) return;
  float total = 0;
  for (int64_t piece = 0; piece < args.pieces; ++piece) total += args.partial[piece * size + e];
  args.out[e] = total;
}

// function(Q(), R()) for the operands' number formats; false where they have no kernel.
template <class Function>
bool with_numbers(const CudaArgs& args, const Function& function) {
  const Dtype queries = args.queries.dtype;
  if (args.encoded.codes != nullptr) {
    if (queries == Dtype::kF32) return function(F32(), Codes()), true;
    if (queries == Dtype::kBF16) return function(BF16(), Codes()), true;
    if (queries == Dtype::kF16) return function(F16(), Codes()), true;
    return false;
  }
  const Dtype rows = args.rows.dtype;
  if (queries == Dtype::kF32 && rows == Dtype::kF32) return function(F32(), F32()), true;
  if (queries == Dtype::kF32 && rows == Dtype::kBF16) return function(F32(), BF16()), true;
  if (queries == Dtype::kF32 && rows == Dtype::kF16) return function(F32(), F16()), true;
  if (queries == Dtype::kBF16 && rows == Dtype::kBF16) return function(BF16(), BF16()), true;
  if (queries == Dtype::kF16 && rows == Dtype::kF16) return function(F16(), F16()), true;
  return false;
}

}  // namespace lgk::score_block
