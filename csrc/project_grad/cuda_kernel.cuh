// The kernels behind cuda.h, for every path of cuda_path.cuh: each warp projects 16 positions of the block's, and then
// adds up a share of G.
#pragma once
#include "project_grad/cuda_path.cuh"

namespace lgk::project_grad {

__device__ inline Span span_of(const CudaShape& shape, int64_t chunk) {
  if (shape.offsets == nullptr) {
    const int64_t most = (shape.length + shape.chunk - 1) / shape.chunk, first = chunk % most * shape.chunk;
    if (chunk / most >= shape.samples) return {shape.samples, 0, 0, false};
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

// A number's bf16 parts at [row][column] of the tiles of `parts`; of what is not finite the first one has all.
template <class Path>
__device__ inline void store_parts(char* parts, int row, int column, float v) {
#pragma unroll
  for (int i = 0; i < Path::kParts; ++i) {
    const uint16_t part = float_to_bf16(v);
    char* to = parts + i * Path::kPart + tile_offset<Path::kWidth / 8>(row, column / 8) + column % 8 * 2;
    *reinterpret_cast<uint16_t*>(to) = part;
    v -= bf16_to_float(part);
    v = v == v ? v : 0.f;
  }
}

// The block's positions start.. of a side that is projected already.
template <class Path>
__device__ inline void take_side(const CudaSide& side, int64_t sample, int64_t start, int64_t k0, const float* weights,
                                 bool weighted, char* parts) {
  using E = typename Path::Element;
  constexpr int kAtOnce = Path::kWarps * kWarp / Path::kWidth;  // positions
  const int column = int(threadIdx.x) % Path::kWidth;
  const bool there = k0 + column < side.k;
  const int64_t first = sample * side.sample_stride + start * side.row_stride + (k0 + column) * side.column_stride;
#pragma unroll 4
  for (int row = int(threadIdx.x) / Path::kWidth; row < Path::kPositions; row += kAtOnce) {
    const float weight = weights[row];
    float v = 0;
    if (there && weight != 0) {
      const int64_t at = first + row * side.row_stride;
      v = side.is_float ? static_cast<const float*>(side.positions)[at]
                        : E::widen(static_cast<const typename E::Storage*>(side.positions)[at]);
    }
    store_parts<Path>(parts, row, column, weighted ? v * weight : v);
  }
}

// The block's positions start.. of one side, projected, as bf16 parts. weights [kPositions] holds 0 for those that do
// not count; `weighted` multiplies by them. Ends with a barrier.
template <class Path>
__device__ void project_side(typename Path::Copies& copies, const CudaSide& side, int64_t sample, int64_t start,
                             int64_t k0, const float* weights, bool weighted, char* parts) {
  if (side.projection == nullptr) {
    take_side<Path>(side, sample, start, k0, weights, weighted, parts);
    Path::sync();
    return;
  }
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  Fragment<Path::kColumns> acc;
  acc.clear();
  copies.begin(side, sample, start, k0, weights);
  const int64_t steps = (side.d + Path::kDepth - 1) / Path::kDepth;
  for (int64_t step = 0; step < steps; ++step) {
    Path::multiply(acc, copies.arrived(side, weights, step), warp, lane);
    Path::template wait<1>();
    if (step > 0) copies.release();
  }
  Path::template wait<0>();
  Path::take(acc);
  copies.release();
  copies.finish();
  const int first = Path::row_of(warp) + lane / 4, left = Path::column_of(warp) + lane % 4 * 2;
  const float own[] = {weights[first], weights[first + 8]};
#pragma unroll
  for (int j = 0; j < Path::kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = first + e / 2 * 8, column = left + j * 8 + e % 2;
      const float v = own[e / 2] != 0 ? acc.c[j][e] : 0.f;  // what does not count may be NaN
      store_parts<Path>(parts, row, column, weighted ? v * own[e / 2] : v);
    }
  }
  Path::sync();
}

// The part of G that a warp adds up: 16 rows and kColumns columns; warps from kSharing on have none.
template <class Path>
struct Share {
  static constexpr int kRowGroups = Path::kWarps < Path::kWidth / 16 ? Path::kWarps : Path::kWidth / 16;
  static constexpr int kColumnGroups =
      Path::kWarps / kRowGroups < Path::kWidth / 16 ? Path::kWarps / kRowGroups : Path::kWidth / 16;
  static constexpr int kColumns = Path::kWidth / kColumnGroups, kSharing = kRowGroups * kColumnGroups;
  static_assert(kRowGroups * 16 == Path::kWidth, "too few warps for the rows of G");
  __device__ static bool has(int warp) { return kSharing == Path::kWarps || warp < kSharing; }
  __device__ static int row(int warp) { return warp % kRowGroups * 16; }
  __device__ static int column(int warp) { return warp / kRowGroups * kColumns; }
};

// g += left^T right over the block's positions, both as bf16 parts, small ones first: the tensor cores cut every sum
// off towards zero, by more where it is large. Products of small parts with small ones are below the precision that is
// kept.
template <class Path>
__device__ inline void add_outer(Fragment<Share<Path>::kColumns>& g, const char* left, const char* right, int warp,
                                 int lane) {
  constexpr int kChunks = Path::kWidth / 8, kColumns = Share<Path>::kColumns;
  const int row = Share<Path>::row(warp) / 8, column = Share<Path>::column(warp) / 8;
#pragma unroll
  for (int i = Path::kParts - 1; i >= 0; --i) {
#pragma unroll 2
    for (int k = 0; k < Path::kPositions; k += 16) {
      uint32_t a[4];
      load_matrices_transposed(
          a, left + i * Path::kPart + tile_offset<kChunks>(k + lane % 8 + lane / 16 * 8, row + lane / 8 % 2));
#pragma unroll
      for (int h = Path::kParts - i - 1; h >= 0; --h) {
#pragma unroll
        for (int j = 0; j < kColumns / 8; j += 2) {
          uint32_t b[4];
          load_matrices_transposed(
              b,
              right + h * Path::kPart + tile_offset<kChunks>(k + lane % 8 + lane / 8 % 2 * 8, column + j + lane / 16));
          multiply_bf16(g.c[j], a, b[0], b[1]);
          multiply_bf16(g.c[j + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

// The chunk's sums, from the fragments of all warps.
template <class Path>
__device__ inline void write_share(const Fragment<Share<Path>::kColumns>& g, float* out, const CudaArgs& args,
                                   int64_t o0, int64_t i0, int warp, int lane) {
#pragma unroll
  for (int j = 0; j < Share<Path>::kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t o = o0 + Share<Path>::row(warp) + lane / 4 + e / 2 * 8;
      const int64_t i = i0 + Share<Path>::column(warp) + j * 8 + lane % 4 * 2 + e % 2;
      if (o < args.dy.k && i < args.x.k) out[o * args.x.k + i] = g.c[j][e];
    }
  }
}

// The same, in sums of the block's positions alone where 24 bits are kept.
template <class Path>
__device__ inline void add_positions(Fragment<Share<Path>::kColumns>& g, const char* left, const char* right, int warp,
                                     int lane) {
  if constexpr (Path::kParts == 3) {
    Fragment<Share<Path>::kColumns> own;
    own.clear();
    add_outer<Path>(own, left, right, warp, lane);
#pragma unroll
    for (int j = 0; j < Share<Path>::kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) g.c[j][e] += own.c[j][e];
    }
  } else {
    add_outer<Path>(g, left, right, warp, lane);
  }
}

// The warps that multiply, over the positions of the span, in as many rounds as its cluster has.
template <class Path>
__device__ inline void add_span(typename Path::Copies& copies, char* shared, const CudaArgs& args, const Span& span,
                                int64_t rounds, int64_t chunk, int64_t o0, int64_t i0) {
  char *x_parts = shared + Path::kXParts, *dy_parts = shared + Path::kDyParts;
  float* weights = reinterpret_cast<float*>(shared + Path::kWeights);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  Fragment<Share<Path>::kColumns> g;
  g.clear();
  const int64_t stop = Path::kClusters ? span.first + rounds * Path::kPositions : span.end;
  for (int64_t start = span.first; start < stop; start += Path::kPositions) {
    Path::sync();  // the last positions' parts and weights are done with
    for (int i = thread; i < Path::kPositions; i += Path::kWarps * kWarp) {
      const int64_t t = start + i;
      weights[i] = t >= span.end ? 0.f
                   : args.weights == nullptr
                       ? 1.f
                       : args.weights[span.sample * args.weight_sample_stride + t * args.weight_row_stride];
    }
    Path::sync();
    project_side<Path>(copies, args.x, span.sample, start, i0, weights, false, x_parts);
    project_side<Path>(copies, args.dy, span.sample, start, o0, weights, args.weights != nullptr, dy_parts);
    if (Share<Path>::has(warp)) add_positions<Path>(g, dy_parts, x_parts, warp, lane);
  }
  copies.part();
  if (span.sample >= args.shape.samples) return;
  float* sums = span.only ? args.out + span.sample * args.dy.k * args.x.k : args.partial + chunk * args.dy.k * args.x.k;
  if (Share<Path>::has(warp)) write_share<Path>(g, sums, args, o0, i0, warp, lane);
}

template <class Path>
__device__ inline int64_t rounds_of(const Span& span) {
  return (span.end - span.first + Path::kPositions - 1) / Path::kPositions;
}

// The blocks of a cluster have one tile and chunks that follow each other.
template <class Path>
__global__ void __launch_bounds__(Path::kThreads, Path::kBlocks)
    project_grad_kernel(const CudaArgs args, const __grid_constant__ typename Path::Copies::Maps maps) {
  if constexpr (Path::kCompiled) {
    let_next_grid_start();
    char* const shared = block_memory();
    const int64_t tiles_in = (args.x.k + Path::kWidth - 1) / Path::kWidth;
    const int64_t tiles = tiles_in * ((args.dy.k + Path::kWidth - 1) / Path::kWidth);
    const int64_t cluster = int64_t(blockIdx.x) / maps.blocks, tile = cluster % tiles;
    const int64_t first_chunk = cluster / tiles * maps.blocks, chunk = first_chunk + Path::Copies::rank();
    const int64_t o0 = tile / tiles_in * Path::kWidth, i0 = tile % tiles_in * Path::kWidth;
    const Span span = span_of(args.shape, chunk);
    int64_t rounds = rounds_of<Path>(span);  // in which the cluster's block with the most positions takes them
    for (int i = 0; i < maps.blocks; ++i) {
      if (first_chunk + i == chunk) continue;
      const int64_t others = rounds_of<Path>(span_of(args.shape, first_chunk + i));
      if (others > rounds) rounds = others;
    }
    if (rounds == 0) return;
    typename Path::Copies copies(shared, maps);
    if constexpr (Path::kThreads > Path::kWarps * kWarp) {
      if (int(threadIdx.x) >= Path::kWarps * kWarp) {
        Path::leave_registers();
        if (int(threadIdx.x) == Path::kWarps * kWarp) copies.fetch_all(args, span, rounds, o0, i0);
        return;
      }
    }
    Path::take_registers();
    add_span<Path>(copies, shared, args, span, rounds, chunk, o0, i0);
  } else {
    __trap();  // this path is not for this architecture
  }
}

// out[n] = the sum of n's partial sums, in order; a sample of one chunk is there already, one of none is zero.
__global__ void add_chunks_kernel(const CudaArgs args) {
  wait_for_grid_before();
  const CudaShape& shape = args.shape;
  const int64_t size = args.dy.k * args.x.k, runs = (size + blockDim.x - 1) / blockDim.x;
  const int64_t n = blockIdx.x / runs, e = blockIdx.x % runs * blockDim.x + threadIdx.x;
  const int64_t most = (shape.length + shape.chunk - 1) / shape.chunk;
  const int64_t end = shape.offsets == nullptr ? (n + 1) * most : shape.chunk_ends[n];
  const int64_t begin = shape.offsets == nullptr ? n * most : n == 0 ? 0 : shape.chunk_ends[n - 1];
  if (e >= size || end - begin == 1) return;
  float total = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) total += args.partial[chunk * size + e];
  args.out[n * size + e] = total;
}

}  // namespace lgk::project_grad
