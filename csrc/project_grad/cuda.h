// G[n] = sum_{t of n} w[t] (P_out dy[t]) (P_in x[t])^T on a CUDA device, one pass over the positions.
//
// The positions of a sample are cut into chunks; a block takes a chunk and a tile of (k_out, k_in). A sample of one
// chunk is written at once, the sums of several go to `partial` and are added in order: same input, same bits. Products
// of half operands are summed in fp32; the projected factors are cut into two or three bf16 parts, whose products are
// summed in fp32 too, so that they keep 16 or 24 bits.
#pragma once
#include <cstdint>

#include "common/cuda_arch.h"

namespace lgk::project_grad {

enum class Element : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

// Positions [samples, length, d], or [rows, d] with sample_stride 0; strides in elements. Without a projection d is k
// and the positions, fp32 or of the call's element, are taken as they are.
struct CudaSide {
  const void* positions;
  int64_t sample_stride, row_stride, column_stride;
  const void* projection;  // [k, d], of the call's element; null without one
  int64_t projection_row_stride, projection_column_stride;
  int64_t d, k;
  bool is_float;  // of a side without a projection: its positions are fp32
};

// chunk_ends [samples] counts each sample's chunks and those before it; with offsets, null without. length is that of a
// sample, or of all positions where there are offsets.
struct CudaShape {
  int64_t samples, length;
  const int64_t* offsets;
  int64_t offset_stride;
  const int64_t* chunk_ends;
  int64_t chunk, chunks;  // positions of a chunk; chunks in all, at least as many as there are
};

struct CudaArgs {
  CudaSide x, dy;
  const float* weights;  // null for none
  int64_t weight_sample_stride, weight_row_stride;
  float* out;      // [samples, k_out, k_in]
  float* partial;  // [chunks, k_out, k_in]; unused where every sample has one chunk
  CudaShape shape;
};

// positions: that a block takes at a time, of which chunks are multiples, and the fewest it can take. tiles: of (k_out,
// k_in), a block each.
struct Tiling {
  int positions, least_positions;
  int64_t tiles;
};
Tiling tiling(Arch arch, Element element, int64_t k_in, int64_t k_out, bool dy_projected);

// Launches on the stream and returns without waiting; throws std::runtime_error with CUDA's own words on failure.
// positions is one of the tiling's. The kernels of sm_90 are for half operands whose dy is projected here; addresses
// and strides of what it projects are multiples of 16 bytes and its features neighbours. `blocks` of theirs, 1, 2, 4,
// or 0 for as many as suit the work, share what is read of a factor.
void project_grad_cuda(Arch arch, Element element, int positions, int blocks, const CudaArgs& args, void* stream);

}  // namespace lgk::project_grad
