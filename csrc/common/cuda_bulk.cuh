// Primitives of sm_90a: tiles that the copy engine fetches through tensor maps, for one block or for several of a
// cluster at once, barriers that count the bytes which have arrived, and products of whole warp groups, straight from
// shared memory.
//
// A tile has rows of 128 bytes, and its 16-byte chunks lie where tile_offset<8> of cuda_tile.cuh says: the engine's
// 128-byte swizzle is the same. Tiles start at multiples of 1024 bytes, where the swizzle's pattern starts.
#pragma once
#include <cstdint>

#ifndef LGK_CUDA_ON_CPU
#include "common/cuda_map.h"
#endif

namespace lgk {

constexpr int kTileRowBytes = 128;
constexpr int kTileAlignment = 1024;
constexpr int kGroup = 128;  // threads of a warp group

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LGK_CUDA_ON_CPU)
constexpr bool kIsSm90 = true;  // whether this is compiled for sm_90a
#else
constexpr bool kIsSm90 = false;
#endif

// The tile's address, a stride of 1024 bytes from each 8 rows to the next ones, and the 128-byte swizzle, in the bit
// fields of wgmma's matrix descriptor. Rows run along K; `column` is a byte of a row, a multiple of 32.
__device__ inline uint64_t matrix_descriptor(uint32_t address, int column) {
  constexpr uint64_t kStride = 8 * kTileRowBytes >> 4, kSwizzle128 = 1, kUnusedLeading = 1;
  const uint64_t start = (address + static_cast<uint32_t>(column) & 0x3ffff) >> 4;
  return start | kUnusedLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

#ifndef LGK_CUDA_ON_CPU

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A phase of a barrier ends with the `count`th arrival, and when all bytes that are expected have arrived.
__device__ inline void init_barrier(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// What this thread has written to shared memory, barriers included, can be seen by the copy engine.
__device__ inline void show_to_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers that this thread has initialised can be seen by the cluster once it has met.
__device__ inline void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended; the one before the first counts as ended, with parity 1.
__device__ inline void wait_for_phase(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts fetching the map's box at (column, row, sample); what lies outside the tensor comes as zeros.
__device__ inline void fetch_tile(char* tile, const TensorMap* map, Barrier* barrier, int column, int row, int sample) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(tile)),
      "l"(map), "r"(column), "r"(row), "r"(sample), "r"(shared_address(barrier))
      : "memory");
}

// The same, to the same place of every block of the cluster whose bit is set, and each of their barriers.
__device__ inline void fetch_tile_to(char* tile, const TensorMap* map, Barrier* barrier, int column, int row,
                                     int sample, unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(tile)),
      "l"(map), "r"(column), "r"(row), "r"(sample), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// The shared memory that a launch asked for.
__device__ inline char* block_memory() {
  extern __shared__ __align__(kTileAlignment) char shared[];
  return shared;
}

// The block's number within its cluster.
__device__ inline int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster's blocks that have not ended.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// At the same barrier of another block of the cluster, which need not see what this thread has written: at the
// cluster's scope that would cost a fence of the whole device.
__device__ inline void arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// The grid that was launched to overlap with this one's end may start, and waits there for this one's results.
__device__ inline void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_grid_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A barrier of the block's first kThreads threads.
template <int kThreads>
__device__ inline void sync_first() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// Registers of a thread, by all warps of a group: those that fetch leave theirs to those that multiply.
template <int kRegisters>
__device__ inline void drop_to_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void rise_to_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Between what a thread does to its registers and the products that add to them.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the newest kLeft groups of products are complete.
template <int kLeft>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Keeps the compiler from reading the sums before the products have been waited for.
template <int kColumns>
__device__ inline void take_products(float (&c)[kColumns][4]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[j][e])::"memory");
  }
}
template <int kColumns>
__device__ inline void take_products(int32_t (&c)[kColumns][4]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(c[j][e])::"memory");
  }
}

#define LGK_C(kind, j) kind(c[j][0]), kind(c[j][1]), kind(c[j][2]), kind(c[j][3])
#define LGK_C4(kind, j) LGK_C(kind, j), LGK_C(kind, j + 1), LGK_C(kind, j + 2), LGK_C(kind, j + 3)
#define LGK_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define LGK_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LGK_R10 LGK_R8 ", %8, %9"
#define LGK_PRODUCT(n, numbers, end, registers, a_at, b_at, ...)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n numbers " {" registers "}, %" #a_at ", %" #b_at end ";" \
               : __VA_ARGS__                                                                                  \
               : "l"(a), "l"(b))

#define LGK_GROUP_PRODUCTS(name, type, kind, numbers, end)                                                       \
  __device__ inline void name(type(&c)[2][4], uint64_t a, uint64_t b) {                                          \
    LGK_PRODUCT(16, numbers, end, LGK_R8, 8, 9, LGK_C(kind, 0), LGK_C(kind, 1));                                 \
  }                                                                                                              \
  __device__ inline void name(type(&c)[4][4], uint64_t a, uint64_t b) {                                          \
    LGK_PRODUCT(32, numbers, end, LGK_R10 ", %10, %11, %12, %13, %14, %15", 16, 17, LGK_C4(kind, 0));            \
  }                                                                                                              \
  __device__ inline void name(type(&c)[8][4], uint64_t a, uint64_t b) {                                          \
    LGK_PRODUCT(64, numbers, end, LGK_R10 ", " LGK_TEN(1) ", " LGK_TEN(2) ", %30, %31", 32, 33, LGK_C4(kind, 0), \
                LGK_C4(kind, 4));                                                                                \
  }                                                                                                              \
  __device__ inline void name(type(&c)[16][4], uint64_t a, uint64_t b) {                                         \
    LGK_PRODUCT(128, numbers, end,                                                                               \
                LGK_R10 ", " LGK_TEN(1) ", " LGK_TEN(2) ", " LGK_TEN(3) ", " LGK_TEN(4) ", " LGK_TEN(            \
                    5) ", %60, %61, %62, %63",                                                                   \
                64, 65, LGK_C4(kind, 0), LGK_C4(kind, 4), LGK_C4(kind, 8), LGK_C4(kind, 12));                    \
  }

// c [64, N] += a [64, 32 bytes] b [N, 32 bytes]^T by a warp group, from shared memory; c in the fragments of m64nNk16,
// which are those of m16n8 for each warp's 16 rows. Not complete before it has been waited for.
LGK_GROUP_PRODUCTS(multiply_group_bf16, float, "+f", "k16.f32.bf16.bf16", ", 1, 1, 1, 0, 0")
LGK_GROUP_PRODUCTS(multiply_group_f16, float, "+f", "k16.f32.f16.f16", ", 1, 1, 1, 0, 0")
LGK_GROUP_PRODUCTS(multiply_group_s8, int32_t, "+r", "k32.s32.s8.s8", ", 1")

#undef LGK_C
#undef LGK_C4
#undef LGK_TEN
#undef LGK_R8
#undef LGK_R10
#undef LGK_PRODUCT
#undef LGK_GROUP_PRODUCTS

#endif

}  // namespace lgk
