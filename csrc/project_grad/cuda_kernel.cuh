// The kernels behind cuda.h. A block has kWidth / 16 warps and takes kWidth positions at a time: each warp projects 16
// of them, and then adds up 16 rows of G.
#pragma once
#include "common/cuda_tile.cuh"
#include "project_grad/cuda.h"

namespace lgk::project_grad {

struct BF16 {
  using Storage = uint16_t;
  __device__ static float widen(uint16_t v) { return bf16_to_float(v); }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_bf16(c, a, b0, b1);
  }
};

struct F16 {
  using Storage = uint16_t;
  __device__ static float widen(uint16_t v) { return f16_to_float(v); }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_f16(c, a, b0, b1);
  }
};

struct F32 {
  using Storage = float;
  __device__ static float widen(float v) { return v; }
};

constexpr int kStages = 3;
constexpr int kRowChunks = 8;  // 128 bytes of a position or of a factor's row at a time

// kParts: of bf16 that a projected factor is cut into, 8 bits each.
template <class E, int kWidth, int kParts>
struct Layout {
  static constexpr int kDepth = kRowChunks * kChunkBytes / int(sizeof(typename E::Storage));
  static constexpr int kStage = 2 * kWidth * kRowChunks * kChunkBytes;  // positions, then the factor's rows
  static constexpr int kPart = kWidth * kWidth * 2;                     // [positions][features] bf16
  static constexpr int kSide = kParts * kPart;
  static constexpr int kPipeline = kStages * kStage > kSide ? kStages* kStage : kSide;
  static constexpr int kWeights = kPipeline + kSide;
  static constexpr int kBytes = kWeights + kWidth * int(sizeof(float));
};

// A warp's share of a tile [16, kWidth] in the accumulators of mma.m16n8: rows g and g + 8, columns 8 j + 2 t and the
// next one, with g = lane / 4 and t = lane % 4.
template <int kWidth>
struct Fragment {
  float c[kWidth / 8][4];
  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[j][e] = 0;
    }
  }
};

struct Span {
  int64_t sample, first, end;  // positions of the sample, or of all where it has offsets
  bool only;                   // the sample has no other chunk
};

__device__ inline Span span_of(const CudaShape& shape, int64_t chunk) {
  if (shape.offsets == nullptr) {
    const int64_t most = (shape.length + shape.chunk - 1) / shape.chunk, first = chunk % most * shape.chunk;
    const int64_t end = first + shape.chunk < shape.length ? first + shape.chunk : shape.length;
    return {chunk / most, first, end, most == 1};
  }
  int64_t low = 0, high = shape.samples;  // the first sample whose chunks end after this one
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (shape.chunk_ends[middle] <= chunk)
      low = middle + 1;
    else
      high = middle;
  }
  if (low == shape.samples) return {low, 0, 0, false};
  const int64_t begin = shape.offsets[low * shape.offset_stride], stop = shape.offsets[(low + 1) * shape.offset_stride];
  const int64_t first = begin + (chunk - (low == 0 ? 0 : shape.chunk_ends[low - 1])) * shape.chunk;
  const int64_t end = first + shape.chunk < stop ? first + shape.chunk : stop;
  return {low, first, end, stop - begin <= shape.chunk};
}

// One chunk of a row of `d` elements from `column` on; zeros beyond its end, and where the row does not count.
template <class E>
__device__ inline void copy_row_chunk(char* to, const typename E::Storage* row, bool counts, int64_t column, int64_t d,
                                      int64_t stride, bool aligned) {
  constexpr int kPer = kChunkBytes / int(sizeof(typename E::Storage));
  const int64_t left = counts ? d - column : 0;
  const int here = left < 0 ? 0 : left < kPer ? int(left) : kPer;
  if (aligned) {
    copy_chunk(to, here > 0 ? row + column : row, here * int(sizeof(typename E::Storage)));
    return;
  }
  typename E::Storage held[kPer];
  for (int i = 0; i < kPer; ++i) held[i] = i < here ? row[(column + i) * stride] : typename E::Storage(0);
  for (int i = 0; i < kPer; ++i) reinterpret_cast<typename E::Storage*>(to)[i] = held[i];
}

// c += positions [16 of a warp, kDepth] factor [kWidth, kDepth]^T, both tiles of kRowChunks chunks a row.
template <class E, int kWidth>
__device__ inline void multiply_stage(Fragment<kWidth>& out, const char* positions, const char* factor, int warp,
                                      int lane) {
  if constexpr (sizeof(typename E::Storage) == 2) {
#pragma unroll
    for (int k = 0; k < kRowChunks; k += 2) {
      uint32_t a[4];
      load_matrices(a, positions + tile_offset<kRowChunks>(warp * 16 + lane % 16, k + lane / 16));
#pragma unroll
      for (int j = 0; j < kWidth / 8; j += 2) {
        uint32_t b[4];
        const int row = j * 8 + lane % 8 + lane / 16 * 8;
        load_matrices(b, factor + tile_offset<kRowChunks>(row, k + lane / 8 % 2));
        E::multiply(out.c[j], a, b[0], b[1]);
        E::multiply(out.c[j + 1], a, b[2], b[3]);
      }
    }
  } else {
    const int g = warp * 16 + lane / 4, t = lane % 4 * 2;
    for (int k = 0; k < kRowChunks * 4; ++k) {
      const auto at = [k](const char* tile, int row) {
        return *reinterpret_cast<const float*>(tile + tile_offset<kRowChunks>(row, k / 4) + k % 4 * 4);
      };
      const float upper = at(positions, g), lower = at(positions, g + 8);
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        const float left = at(factor, j * 8 + t), right = at(factor, j * 8 + t + 1);
        out.c[j][0] += upper * left;
        out.c[j][1] += upper * right;
        out.c[j][2] += lower * left;
        out.c[j][3] += lower * right;
      }
    }
  }
}

// A number's bf16 parts at [row][column] of the tiles of `parts`.
template <class E, int kWidth, int kParts>
__device__ inline void store_parts(char* parts, int row, int column, float v) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const uint16_t part = float_to_bf16(v);
    char* to = parts + i * Layout<E, kWidth, kParts>::kPart + tile_offset<kWidth / 8>(row, column / 8) + column % 8 * 2;
    *reinterpret_cast<uint16_t*>(to) = part;
    v -= bf16_to_float(part);
  }
}

// The block's positions start.. of one side, projected, as bf16 parts. weights [kWidth] holds 0 for those that do not
// count; `weighted` multiplies by them. Ends with a barrier.
template <class E, int kWidth, int kParts>
__device__ void project_side(const CudaSide& side, int64_t sample, int64_t start, int64_t k0, const float* weights,
                             bool weighted, char* pipeline, char* parts) {
  using Storage = typename E::Storage;
  using L = Layout<E, kWidth, kParts>;
  const int thread = int(threadIdx.x), threads = int(blockDim.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t first = sample * side.sample_stride + start * side.row_stride;
  if (side.projection == nullptr) {
    for (int i = thread; i < kWidth * kWidth; i += threads) {
      const int row = i / kWidth, column = i % kWidth;
      float v = 0;
      if (weights[row] != 0 && k0 + column < side.k) {
        const int64_t at = first + row * side.row_stride + (k0 + column) * side.column_stride;
        v = side.is_float ? static_cast<const float*>(side.positions)[at]
                          : E::widen(static_cast<const Storage*>(side.positions)[at]);
      }
      store_parts<E, kWidth, kParts>(parts, row, column, weighted ? v * weights[row] : v);
    }
    __syncthreads();
    return;
  }
  const Storage* positions = static_cast<const Storage*>(side.positions) + first;
  const Storage* factor = static_cast<const Storage*>(side.projection) + k0 * side.projection_row_stride;
  constexpr int64_t kPer = kChunkBytes / sizeof(Storage);
  const bool positions_aligned = side.column_stride == 1 && side.row_stride % kPer == 0 &&
                                 reinterpret_cast<uintptr_t>(positions) % kChunkBytes == 0;
  const bool factor_aligned = side.projection_column_stride == 1 && side.projection_row_stride % kPer == 0 &&
                              reinterpret_cast<uintptr_t>(factor) % kChunkBytes == 0;
  const auto fetch = [&](int64_t step) {
    char* stage = pipeline + step % kStages * L::kStage;
    for (int i = thread; i < kWidth * kRowChunks; i += threads) {
      const int row = i / kRowChunks, chunk = i % kRowChunks;
      const int64_t column = step * L::kDepth + chunk * kPer;
      char* to = stage + tile_offset<kRowChunks>(row, chunk);
      const bool counts = weights[row] != 0;
      copy_row_chunk<E>(to, counts ? positions + row * side.row_stride : positions, counts, column, side.d,
                        side.column_stride, positions_aligned);
      const bool there = k0 + row < side.k;
      copy_row_chunk<E>(to + L::kStage / 2, there ? factor + row * side.projection_row_stride : factor, there, column,
                        side.d, side.projection_column_stride, factor_aligned);
    }
  };
  Fragment<kWidth> acc;
  acc.clear();
  const int64_t steps = (side.d + L::kDepth - 1) / L::kDepth;
  for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    commit_copies();
  }
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the stage has arrived for all, and nobody reads the one that is filled next
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    commit_copies();
    const char* stage = pipeline + step % kStages * L::kStage;
    multiply_stage<E, kWidth>(acc, stage, stage + L::kStage / 2, warp, lane);
  }
  wait_for_copies<0>();
  __syncthreads();  // `parts` may lie where the pipeline was
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = warp * 16 + lane / 4 + e / 2 * 8, column = j * 8 + lane % 4 * 2 + e % 2;
      store_parts<E, kWidth, kParts>(parts, row, column, weighted ? acc.c[j][e] * weights[row] : acc.c[j][e]);
    }
  }
  __syncthreads();
}

// g [16 rows of a warp, kWidth] += left^T right over the block's positions, both as bf16 parts; the products of small
// parts with small ones are below the precision that is kept.
template <class E, int kWidth, int kParts>
__device__ inline void add_outer(Fragment<kWidth>& g, const char* left, const char* right, int warp, int lane) {
  constexpr int kPart = Layout<E, kWidth, kParts>::kPart;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    for (int k = 0; k < kWidth; k += 16) {
      uint32_t a[4];
      load_matrices_transposed(
          a, left + i * kPart + tile_offset<kWidth / 8>(k + lane % 8 + lane / 16 * 8, warp * 2 + lane / 8 % 2));
#pragma unroll
      for (int h = 0; h < kParts - i; ++h) {
#pragma unroll
        for (int j = 0; j < kWidth / 8; j += 2) {
          uint32_t b[4];
          load_matrices_transposed(
              b, right + h * kPart + tile_offset<kWidth / 8>(k + lane % 8 + lane / 8 % 2 * 8, j + lane / 16));
          multiply_bf16(g.c[j], a, b[0], b[1]);
          multiply_bf16(g.c[j + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

template <class E, int kWidth, int kParts>
__global__ void __launch_bounds__(2 * kWidth) project_grad_kernel(const CudaArgs args) {
  using L = Layout<E, kWidth, kParts>;
  extern __shared__ __align__(128) char shared[];
  char* x_parts = shared + L::kPipeline;
  char* dy_parts = shared;  // where the pipeline was
  float* weights = reinterpret_cast<float*>(shared + L::kWeights);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t tiles_in = (args.x.k + kWidth - 1) / kWidth, tiles_out = (args.dy.k + kWidth - 1) / kWidth;
  const int64_t tiles = tiles_in * tiles_out, chunk = int64_t(blockIdx.x) / tiles, tile = int64_t(blockIdx.x) % tiles;
  const int64_t o0 = tile / tiles_in * kWidth, i0 = tile % tiles_in * kWidth;
  const Span span = span_of(args.shape, chunk);
  if (span.sample >= args.shape.samples) return;
  Fragment<kWidth> g;
  g.clear();
  for (int64_t start = span.first; start < span.end; start += kWidth) {
    __syncthreads();  // the last positions' parts and weights are done with
    for (int i = thread; i < kWidth; i += int(blockDim.x)) {
      const int64_t t = start + i;
      weights[i] = t >= span.end ? 0.f
                   : args.weights == nullptr
                       ? 1.f
                       : args.weights[span.sample * args.weight_sample_stride + t * args.weight_row_stride];
    }
    __syncthreads();
    project_side<E, kWidth, kParts>(args.x, span.sample, start, i0, weights, false, shared, x_parts);
    project_side<E, kWidth, kParts>(args.dy, span.sample, start, o0, weights, args.weights != nullptr, shared,
                                    dy_parts);
    add_outer<E, kWidth, kParts>(g, dy_parts, x_parts, warp, lane);
  }
  float* out =
      (span.only ? args.out + span.sample * args.dy.k * args.x.k : args.partial + chunk * args.dy.k * args.x.k);
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t o = o0 + warp * 16 + lane / 4 + e / 2 * 8, i = i0 + j * 8 + lane % 4 * 2 + e % 2;
      if (o < args.dy.k && i < args.x.k) out[o * args.x.k + i] = g.c[j][e];
    }
  }
}

// out[n] = the sum of n's partial sums, in order; a sample of one chunk is there already, one of none is zero.
__global__ void add_chunks_kernel(const CudaArgs args) {
  const CudaShape& shape = args.shape;
  const int64_t size = args.dy.k * args.x.k, n = blockIdx.y;
  const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t most = (shape.length + shape.chunk - 1) / shape.chunk;
  const int64_t end = shape.offsets == nullptr ? (n + 1) * most : shape.chunk_ends[n];
  const int64_t begin = shape.offsets == nullptr ? n * most : n == 0 ? 0 : shape.chunk_ends[n - 1];
  if (e >= size || end - begin == 1) return;
  float total = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) total += args.partial[chunk * size + e];
  args.out[n * size + e] = total;
}

}  // namespace lgk::project_grad
