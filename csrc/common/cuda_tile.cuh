// Tensor-core primitives of sm_80 and later, and tiles in shared memory: rows of 16-byte chunks, swizzled so that eight
// rows of one chunk fall into different banks.
#pragma once
#include <cstdint>

#ifndef LGK_CUDA_ON_CPU
#include <cuda_fp16.h>
#endif

namespace lgk {

constexpr int kChunkBytes = 16;
constexpr int kWarp = 32;

// Where a chunk of a row lies in a tile whose rows have kChunks of them, in bytes.
template <int kChunks>
__device__ inline int tile_offset(int row, int chunk) {
  constexpr int kMask = (kChunks < 8 ? kChunks : 8) - 1;
  return (row * kChunks + (chunk ^ (row & kMask))) * kChunkBytes;
}

#ifndef LGK_CUDA_ON_CPU

// Starts copying the first `bytes` (0..16) of a chunk from global to shared memory; the rest becomes zeros. Both
// addresses are multiples of 16.
__device__ inline void copy_chunk(char* shared, const void* global, int bytes) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest kLeft groups have arrived.
template <int kLeft>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], const char* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const char* shared) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// c [16, 8] += a [16, 16] b [8, 16]^T, in the fragments of mma.m16n8k16.
__device__ inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 32] b [8, 32]^T of int8, in the fragments of mma.m16n8k32.
__device__ inline void multiply_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four of the eight bytes of (b, a), those of a counted first, one for each nibble of the selector.
__device__ inline uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// Two numbers to bf16, to nearest even, the first one in the lower half; NaN stays NaN.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ inline float f16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint32_t float_bits(float v) { return __float_as_uint(v); }
__device__ inline float bits_float(uint32_t v) { return __uint_as_float(v); }

#endif

__device__ inline float bf16_to_float(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

// To nearest even; NaN stays NaN.
__device__ inline uint16_t float_to_bf16(float v) {
  const uint32_t bits = float_bits(v);
  if (v != v) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace lgk
