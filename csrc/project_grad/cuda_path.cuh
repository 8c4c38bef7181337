// How the kernel's tiles of positions and factors come into shared memory and are multiplied: on sm_80 by the threads'
// own copies (cp.async) and a warp's products (mma.sync); on sm_90a by the copy engine, which a warp of its own keeps
// busy, and by products of warp groups (wgmma). Both leave the same fragments of projected positions.
#pragma once
#include "common/cuda_bulk.cuh"
#include "common/cuda_tile.cuh"
#include "project_grad/cuda.h"

namespace lgk::project_grad {

struct BF16 {
  using Storage = uint16_t;
  __device__ static float widen(uint16_t v) { return bf16_to_float(v); }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_bf16(c, a, b0, b1);
  }
  template <int kColumns>
  __device__ static void multiply_group(float (&c)[kColumns][4], uint64_t a, uint64_t b) {
    multiply_group_bf16(c, a, b);
  }
};

struct F16 {
  using Storage = uint16_t;
  __device__ static float widen(uint16_t v) { return f16_to_float(v); }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_f16(c, a, b0, b1);
  }
  template <int kColumns>
  __device__ static void multiply_group(float (&c)[kColumns][4], uint64_t a, uint64_t b) {
    multiply_group_f16(c, a, b);
  }
};

struct F32 {
  using Storage = float;
  __device__ static float widen(float v) { return v; }
};

constexpr int kRowChunks = 8;  // 128 bytes of a position or of a factor's row at a time

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

// kParts: of bf16 that a projected factor is cut into, 8 bits each. kPositions: that a block takes at a time. A warp
// projects 16 of them by kColumns rows of the factor, kSplit times as few as there are.
template <class E, int kWidth_, int kParts_, int kPositions_, int kSplit = 1>
struct Sizes {
  using Element = E;
  static constexpr int kWidth = kWidth_, kParts = kParts_, kPositions = kPositions_, kColumns = kWidth / kSplit;
  static constexpr int kWarps = kPositions / 16 * kSplit;
  static constexpr int kDepth = kRowChunks * kChunkBytes / int(sizeof(typename E::Storage));
  static constexpr int kFactorAt = kPositions * kRowChunks * kChunkBytes;  // of a stage: after its positions
  static constexpr int kStage = kFactorAt + kWidth * kRowChunks * kChunkBytes;
  static constexpr int kPart = kPositions * kWidth * 2;  // [positions][features] bf16
  static constexpr int kSide = kParts * kPart;
  static constexpr int kWeightBytes = kPositions * int(sizeof(float));
  __device__ static int row_of(int warp) { return warp / (4 * kSplit) * 64 + warp % 4 * 16; }
  __device__ static int column_of(int warp) { return warp / 4 % kSplit * kColumns; }
};

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

// A ring of stages that all threads fill, kStages - 1 ahead.
template <class Path>
class ThreadCopies {
  using E = typename Path::Element;
  using Storage = typename E::Storage;
  static constexpr int64_t kPer = kChunkBytes / sizeof(Storage);

 public:
  struct Maps {
    static constexpr int blocks = 1;  // of a cluster
  };
  static Maps maps(const CudaArgs&, int) { return {}; }
  __device__ static int rank() { return 0; }
  __device__ ThreadCopies(char* ring, const Maps&) : ring_(ring) {}

  // weights holds 0 for positions that do not count; they come as zeros.
  __device__ void begin(const CudaSide& side, int64_t sample, int64_t start, int64_t k0, const float* weights) {
    positions_ = static_cast<const Storage*>(side.positions) + sample * side.sample_stride + start * side.row_stride;
    factor_ = static_cast<const Storage*>(side.projection) + k0 * side.projection_row_stride;
    positions_aligned_ = side.column_stride == 1 && side.row_stride % kPer == 0 &&
                         reinterpret_cast<uintptr_t>(positions_) % kChunkBytes == 0;
    factor_aligned_ = side.projection_column_stride == 1 && side.projection_row_stride % kPer == 0 &&
                      reinterpret_cast<uintptr_t>(factor_) % kChunkBytes == 0;
    k0_ = k0, steps_ = (side.d + Path::kDepth - 1) / Path::kDepth;
    for (int64_t step = 0; step < Path::kStages - 1; ++step) {
      if (step < steps_) fetch(side, weights, step);
      commit_copies();
    }
  }

  __device__ const char* arrived(const CudaSide& side, const float* weights, int64_t step) {
    wait_for_copies<Path::kStages - 2>();
    __syncthreads();  // the stage has arrived for all, and nobody reads the one that is filled next
    if (step + Path::kStages - 1 < steps_) fetch(side, weights, step + Path::kStages - 1);
    commit_copies();
    return ring_ + step % Path::kStages * Path::kStage;
  }

  __device__ void release() {}

  __device__ void finish() {
    wait_for_copies<0>();
    __syncthreads();  // something else may lie where the ring was
  }
  __device__ void part() {}

 private:
  __device__ void fetch(const CudaSide& side, const float* weights, int64_t step) {
    char* stage = ring_ + step % Path::kStages * Path::kStage;
    static_assert(Path::kPositions == Path::kWidth, "as many positions as rows of the factor");
    for (int i = int(threadIdx.x); i < Path::kWidth * kRowChunks; i += int(blockDim.x)) {
      const int row = i / kRowChunks, chunk = i % kRowChunks;
      const int64_t column = step * Path::kDepth + chunk * kPer;
      char* to = stage + tile_offset<kRowChunks>(row, chunk);
      const bool counts = weights[row] != 0;
      copy_row_chunk<E>(to, counts ? positions_ + row * side.row_stride : positions_, counts, column, side.d,
                        side.column_stride, positions_aligned_);
      const bool there = k0_ + row < side.k;
      copy_row_chunk<E>(to + Path::kFactorAt, there ? factor_ + row * side.projection_row_stride : factor_, there,
                        column, side.d, side.projection_column_stride, factor_aligned_);
    }
  }

  char* ring_;
  const Storage *positions_ = nullptr, *factor_ = nullptr;
  int64_t k0_ = 0, steps_ = 0;
  bool positions_aligned_ = false, factor_aligned_ = false;
};

// c += positions [16 of a warp, kDepth] factor [kWidth, kDepth]^T, both tiles of kRowChunks chunks a row.
template <class E, int kWidth>
__device__ inline void multiply_stage(Fragment<kWidth>& out, const char* positions, const char* factor, int warp,
                                      int lane) {
  if constexpr (sizeof(typename E::Storage) == 2) {
    constexpr int kAtOnce = kWidth < 128 ? kRowChunks / 2 : 2;  // beyond which the widest spills registers
#pragma unroll kAtOnce
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

// kWidth positions at a time, in kWidth / 16 warps.
template <class E, int kWidth, int kParts>
struct Sm80 : Sizes<E, kWidth, kParts, kWidth> {
  using S = Sizes<E, kWidth, kParts, kWidth>;
  using Copies = ThreadCopies<Sm80>;
  static constexpr bool kCompiled = true, kClusters = false;
  static constexpr int kThreads = S::kWarps * kWarp, kBlocks = 1, kStages = 3;
  static constexpr int kDyParts = 0;  // where the ring was
  static constexpr int kXParts = kStages * S::kStage > S::kSide ? kStages* S::kStage : S::kSide;
  static constexpr int kWeights = kXParts + S::kSide, kBytes = kWeights + S::kWeightBytes;
  __device__ static void sync() { __syncthreads(); }
  __device__ static void take_registers() {}
  __device__ static void multiply(Fragment<kWidth>& out, const char* stage, int warp, int lane) {
    multiply_stage<E, kWidth>(out, stage, stage + S::kFactorAt, warp, lane);
  }
  template <int kLeft>
  __device__ static void wait() {}
  __device__ static void take(Fragment<kWidth>&) {}
};

// What the copy engine needs to know of the arguments, and the blocks of a cluster; a side without a projection has no
// maps.
struct EngineMaps {
  TensorMap x, p_in, dy, p_out;
  int blocks;
};

// A ring of stages that one warp more than multiply has the copy engine fill, as far ahead as there are stages.
//
// The blocks of a cluster project their own positions by the same rows of the factor: each fetches its share of them
// for all, so that L2 gives them once a cluster. So a stage is filled again when all blocks are done with it, and all
// go through equally many stages.
template <class Path>
class EngineCopies {
  struct Turn {
    int slot = 0, phase = 0;
    __device__ void advance() {
      if (++slot < Path::kStages) return;
      slot = 0, phase ^= 1;
    }
  };

 public:
  using Maps = EngineMaps;
  static Maps maps(const CudaArgs& args, int blocks) {
    Maps made = {};
    if (args.x.projection != nullptr) map_side(args.x, args.shape, blocks, made.x, made.p_in);
    map_side(args.dy, args.shape, blocks, made.dy, made.p_out);
    made.blocks = blocks;
    return made;
  }
  __device__ static int rank() { return cluster_rank(); }

  // By all threads of the block, once.
  __device__ EngineCopies(char* shared, const Maps& maps)
      : ring_(shared),
        full_(reinterpret_cast<Barrier*>(shared + Path::kBarriers)),
        empty_(full_ + Path::kStages),
        maps_(&maps),
        blocks_(maps.blocks) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Path::kStages; ++i) {
        init_barrier(full_ + i, 1), init_barrier(empty_ + i, Path::kWarps * blocks_);
      }
      show_to_engine();
      show_barriers();
    }
    if (blocks_ > 1)
      sync_cluster();
    else
      __syncthreads();
  }

  // By one thread: every stage of the cluster's rounds, in the order in which the others take them.
  __device__ void fetch_all(const CudaArgs& args, const Span& span, int64_t rounds, int64_t o0, int64_t i0) {
    const int sample = args.shape.offsets == nullptr ? int(span.sample) : 0;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t start = span.first + round * Path::kPositions;
      const bool own = start < span.end;  // the others may have more positions
      if (args.x.projection != nullptr) fetch_side(args.x, maps_->x, maps_->p_in, own, int(start), sample, int(i0));
      fetch_side(args.dy, maps_->dy, maps_->p_out, own, int(start), sample, int(o0));
    }
  }

  __device__ void begin(const CudaSide&, int64_t, int64_t, int64_t, const float*) {}

  __device__ const char* arrived(const CudaSide&, const float*, int64_t) {
    wait_for_phase(full_ + taken_.slot, taken_.phase);
    const char* stage = ring_ + taken_.slot * Path::kStage;
    taken_.advance();
    return stage;
  }

  // The oldest stage that this warp holds may be filled again.
  __device__ void release() {
    const int lane = int(threadIdx.x) % kWarp;
    if (blocks_ == 1) {
      if (lane == 0) arrive(empty_ + released_.slot);
    } else if (lane < blocks_) {
      arrive_at(empty_ + released_.slot, lane);
    }
    released_.advance();
  }

  __device__ void finish() {}

  // No block ends before the others are done with its barriers.
  __device__ void part() {
    if (blocks_ > 1) sync_cluster();
  }

 private:
  static void map_side(const CudaSide& side, const CudaShape& shape, int blocks, TensorMap& positions,
                       TensorMap& factor) {
    const int64_t samples = shape.offsets == nullptr ? shape.samples : 1;
    const int64_t apart = samples > 1 ? side.sample_stride : side.row_stride * shape.length;
    positions = tensor_map("project_grad", side.positions, side.d, shape.length, samples, side.row_stride, apart,
                           Path::kPositions);
    factor = tensor_map("project_grad", side.projection, side.d, side.k, 1, side.projection_row_stride,
                        side.projection_row_stride * side.k, Path::kWidth / blocks);
  }

  __device__ void fetch_side(const CudaSide& side, const TensorMap& positions, const TensorMap& factor, bool own,
                             int start, int sample, int k0) {
    const int rows = Path::kWidth / blocks_, first = rank() * rows;  // of the factor, for all blocks
    for (int64_t column = 0; column < side.d; column += Path::kDepth) {
      wait_for_phase(empty_ + taken_.slot, taken_.phase ^ 1);
      Barrier* full = full_ + taken_.slot;
      char* stage = ring_ + taken_.slot * Path::kStage;
      char* share = stage + Path::kFactorAt + first * kTileRowBytes;
      arrive_expecting(full, own ? Path::kStage : Path::kStage - Path::kFactorAt);
      if (own) fetch_tile(stage, &positions, full, int(column), start, sample);
      if (blocks_ == 1)
        fetch_tile(share, &factor, full, int(column), k0, 0);
      else
        fetch_tile_to(share, &factor, full, int(column), k0 + first, 0, (1u << blocks_) - 1);
      taken_.advance();
    }
  }

  char* ring_;
  Barrier *full_, *empty_;
  const Maps* maps_;
  const int blocks_;
  Turn taken_, released_;
};

// kPositions 64 or 128, a warp group for each 64 and each kWidth / kSplit rows of the factor, and a warp, or a group
// that gives registers away, to fetch. Two blocks share a processor where each can have a ring of four stages then.
template <class E, int kWidth, int kParts, int kPositions, int kSplit = 1>
struct Sm90 : Sizes<E, kWidth, kParts, kPositions, kSplit> {
  using S = Sizes<E, kWidth, kParts, kPositions, kSplit>;
  using Copies = EngineCopies<Sm90>;
  static constexpr bool kCompiled = kIsSm90, kClusters = true;
  static constexpr bool kWide = kWidth == 128;  // needs more registers than an even share of a block's
  static constexpr int kThreads = S::kWarps * kWarp + (kWide ? kGroup : kWarp);
  static constexpr int kFixed = 2 * S::kSide + S::kWeightBytes + 256;
  static constexpr int kOfHalf = ((113 << 10) - kFixed) / S::kStage, kOfAll = ((227 << 10) - kFixed) / S::kStage;
  static constexpr int kStages = kOfHalf >= 8 ? 8 : kOfHalf >= 4 ? kOfHalf : kOfAll;
  static constexpr int kBlocks = kOfHalf >= 4 ? 2 : 1;  // of a processor
  static constexpr int kXParts = kStages * S::kStage, kDyParts = kXParts + S::kSide;
  static constexpr int kWeights = kDyParts + S::kSide, kBarriers = kWeights + S::kWeightBytes;
  static constexpr int kBytes = kBarriers + 2 * kStages * int(sizeof(Barrier));
  __device__ static void sync() { sync_first<S::kWarps * kWarp>(); }
  __device__ static void leave_registers() {
    if constexpr (kWide) drop_to_registers<24>();
  }
  __device__ static void take_registers() {
    if constexpr (kWide) rise_to_registers<240>();
  }
  __device__ static void multiply(Fragment<S::kColumns>& out, const char* stage, int warp, int) {
    const uint32_t positions = shared_address(stage) + uint32_t(S::row_of(warp / 4 * 4) * kTileRowBytes);
    const uint32_t factor = shared_address(stage + S::kFactorAt) + uint32_t(S::column_of(warp) * kTileRowBytes);
    begin_products();
#pragma unroll
    for (int column = 0; column < kTileRowBytes; column += 32) {
      E::multiply_group(out.c, matrix_descriptor(positions, column), matrix_descriptor(factor, column));
    }
    commit_products();
  }
  template <int kLeft>
  __device__ static void wait() {
    wait_for_products<kLeft>();
  }
  __device__ static void take(Fragment<S::kColumns>& out) { take_products(out.c); }
};

}  // namespace lgk::project_grad
