// Runs CUDA C++ kernels on a CPU, a fiber a thread, so that indices, barriers, swizzles and fragments are tested where
// there is no device. The primitives of common/cuda_tile.cuh do here what the PTX manual says of them; an asynchronous
// copy lands when it is waited for and not before. Fibers of a block, or of a cluster of blocks, run one after the
// other, from barrier to barrier, in ascending or descending order. The primitives of common/cuda_bulk.cuh are in
// bulk_on_cpu.h.
#pragma once
#define LGK_CUDA_ON_CPU
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __grid_constant__
#define __trap() std::abort()
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Dim3 {
  unsigned x, y;
};

namespace on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

struct Copy {
  char* to;
  const char* from;
  int bytes;
};

// What 32 lanes show each other; two of them take turns, since no lane can be two exchanges ahead of another.
struct Exchange {
  uint64_t words[kWarp][8];
  int arrived = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int64_t barriers = 0, firsts = 0, exchanges = 0, clusters = 0, waits = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Bulk;

// In which order fibers run, and whether what is asynchronous on sm_90 happens at once or when it is waited for.
struct Timing {
  bool descending, copies_at_once, products_at_once;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<int> at_barrier, at_first;  // how many fibers have reached barrier i, of all and of the first ones
  std::shared_ptr<Bulk> bulk;             // of bulk_on_cpu.h, the same for the blocks of a cluster
  std::vector<std::vector<Exchange>> warps;
  ucontext_t scheduler;
  int current = 0;
  unsigned x = 0;  // of blockIdx
  char* memory = nullptr;
  Timing timing = {};
  std::exception_ptr error;
  std::function<void()> body;

  bool ended() const {
    for (const Fiber& fiber : fibers) {
      if (!fiber.done) return false;
    }
    return true;
  }
  int64_t progress() const {
    int64_t sum = 0;
    for (const Fiber& f : fibers) sum += f.barriers + f.firsts + f.exchanges + f.clusters + f.waits + f.done;
    return sum;
  }
};

constexpr size_t kSharedBytes = 256 << 10;  // of a block
inline char* shared_memory;                 // of the first block of a cluster; the others' follow
inline std::vector<Block>* cluster;
inline Block* block;
inline void (*at_end)() = nullptr;  // of every cluster: throws where something is left undone

inline Fiber& self() { return block->fibers[block->current]; }
inline void yield() { swapcontext(&self().context, &block->scheduler); }

inline void enter() {
  try {
    block->body();
  } catch (...) {
    block->error = std::current_exception();
  }
  self().done = true;
  yield();
}

// All lanes' words, once all of the warp have given theirs.
inline const Exchange& exchange(const uint64_t* words, int count) {
  const int lane = block->current % kWarp, warp = block->current / kWarp;
  const size_t turn = self().exchanges++;
  auto& all = block->warps[warp];
  if (all.size() <= turn) all.resize(turn + 1);
  std::memcpy(all[turn].words[lane], words, sizeof(uint64_t) * count);
  ++all[turn].arrived;
  while (block->warps[warp][turn].arrived < kWarp) yield();
  return block->warps[warp][turn];
}

}  // namespace on_cpu

inline Dim3 threadIdx, blockIdx, blockDim;

namespace on_cpu {

// The calling fiber's `turn`th barrier of `threads` fibers.
inline void meet(std::vector<int> Block::* at, size_t turn, int threads) {
  auto& counts = block->*at;
  if (counts.size() <= turn) counts.resize(turn + 1, 0);
  ++counts[turn];
  while ((block->*at)[turn] < threads) yield();
}

}  // namespace on_cpu

inline void __syncthreads() {
  on_cpu::meet(&on_cpu::Block::at_barrier, on_cpu::self().barriers++, int(on_cpu::block->fibers.size()));
}

template <class T>
T atomicAdd(T* at, T more) {
  const T before = *at;
  *at += more;
  return before;
}

namespace on_cpu {

inline void prepare(Block& fresh, int threads, Timing timing, const std::function<void()>& kernel) {
  fresh.fibers.resize(threads);
  fresh.warps.resize((threads + kWarp - 1) / kWarp);
  fresh.body = kernel;
  fresh.timing = timing;
  for (Fiber& fiber : fresh.fibers) {
    getcontext(&fiber.context);
    fiber.stack.reset(new char[kStackBytes]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, enter, 0);
  }
}

// Lets a thread that has not ended run on to where it waits.
inline void resume(Block& here, int thread, unsigned y) {
  if (here.fibers[thread].done) return;
  block = &here;
  here.current = thread;
  blockIdx = {here.x, y};
  threadIdx = {unsigned(thread), 0};
  swapcontext(&here.scheduler, &here.fibers[thread].context);
  if (here.error) std::rethrow_exception(here.error);
}

// Runs kernel() for every thread of every block, `at_once` blocks (which divide grid.x) as a cluster. Throws where
// threads wait for each other for ever.
inline void launch(Dim3 grid, int threads, Timing timing, const std::function<void()>& kernel, unsigned at_once = 1) {
  blockDim = {unsigned(threads), 1};
  if (grid.x % at_once != 0) throw std::runtime_error("a grid is no whole number of clusters");
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += at_once) {
      std::vector<Block> blocks(at_once);
      for (unsigned i = 0; i < at_once; ++i) {
        blocks[i].x = x + i, blocks[i].memory = shared_memory + i * kSharedBytes;
        prepare(blocks[i], threads, timing, kernel);
      }
      cluster = &blocks;
      int64_t rounds = 0;
      while (std::any_of(blocks.begin(), blocks.end(), [](const Block& b) { return !b.ended(); })) {
        for (Block& here : blocks) {
          for (int64_t before = -1; before != here.progress(); ++rounds) {
            before = here.progress();
            for (int i = 0; i < threads; ++i) resume(here, timing.descending ? threads - 1 - i : i, y);
          }
        }
        if (rounds > 100'000) throw std::runtime_error("threads wait for each other");
      }
      if (at_end != nullptr) at_end();
    }
  }
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h >> 15) << 31, exponent = h >> 10 & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float tiny = mantissa * 0x1p-24f;
    std::memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Number i of a word or of a tile's bytes, as the products take it.
inline float from_bf16(uint64_t word, int i) { return bf16_to_float(uint16_t(word >> 16 * i)); }
inline float from_half(uint64_t word, int i) { return half_to_float(uint16_t(word >> 16 * i)); }
inline int32_t from_s8(uint64_t word, int i) { return int8_t(word >> 8 * i); }

// A sum as the tensor cores keep it: theirs are not rounded to nearest, but cut off towards zero (Fasi et al. 2021,
// "Numerical behavior of NVIDIA tensor cores"), once for each instruction's products here.
inline float kept(float, double sum) {
  const float nearest = float(sum);
  return std::isfinite(nearest) && std::abs(double(nearest)) > std::abs(sum) ? std::nextafter(nearest, 0.f) : nearest;
}
inline int32_t kept(int32_t, int32_t sum) { return sum; }
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, float>, double, T>;

// mma.m16n8 with k of 32 bytes: a lane holds rows g, g + 8 of a, row g of b, and rows g, g + 8, columns 2t, 2t + 1 of
// c.
template <auto kNumber, int kEach, class T>
void multiply(T (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t words[] = {a[0], a[1], a[2], a[3], b0, b1};
  const Exchange& all = exchange(words, 6);
  const int lane = block->current % kWarp, g = lane / 4, t = lane % 4;
  for (int e = 0; e < 4; ++e) {
    Wide<T> sum = c[e];
    for (int k = 0; k < 8 * kEach; ++k) {
      const int owner = k / kEach % 4, upper = k / (4 * kEach);
      const Wide<T> left = kNumber(all.words[g * 4 + owner][e / 2 + 2 * upper], k % kEach);
      const Wide<T> right = kNumber(all.words[(2 * t + e % 2) * 4 + owner][4 + upper], k % kEach);
      sum += left * right;
    }
    c[e] = kept(c[e], sum);
  }
}

}  // namespace on_cpu

namespace lgk {

inline void copy_chunk(char* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    throw std::runtime_error("an asynchronous copy is not aligned");
  }
  on_cpu::self().open.push_back({shared, static_cast<const char*>(global), bytes});
}
inline void commit_copies() {
  on_cpu::self().groups.push_back(std::move(on_cpu::self().open));
  on_cpu::self().open.clear();
}
template <int kLeft>
void wait_for_copies() {
  auto& groups = on_cpu::self().groups;
  for (; groups.size() > kLeft; groups.pop_front()) {
    for (const on_cpu::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}
inline void load_matrices(uint32_t (&r)[4], const char* shared) {
  const uint64_t words[] = {reinterpret_cast<uint64_t>(shared)};
  const on_cpu::Exchange& all = on_cpu::exchange(words, 1);
  const int lane = on_cpu::block->current % on_cpu::kWarp;
  for (int i = 0; i < 4; ++i) {
    const char* row = reinterpret_cast<const char*>(all.words[i * 8 + lane / 4][0]);
    std::memcpy(&r[i], row + lane % 4 * 4, 4);
  }
}
inline void load_matrices_transposed(uint32_t (&r)[4], const char* shared) {
  const uint64_t words[] = {reinterpret_cast<uint64_t>(shared)};
  const on_cpu::Exchange& all = on_cpu::exchange(words, 1);
  const int lane = on_cpu::block->current % on_cpu::kWarp;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int h = 0; h < 2; ++h) {
      const char* row = reinterpret_cast<const char*>(all.words[i * 8 + lane % 4 * 2 + h][0]);
      std::memcpy(&pair[h], row + lane / 4 * 2, 2);
    }
    r[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}
inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu::multiply<on_cpu::from_bf16, 2>(c, a, b0, b1);
}
inline void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu::multiply<on_cpu::from_half, 2>(c, a, b0, b1);
}
inline void multiply_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu::multiply<on_cpu::from_s8, 4>(c, a, b0, b1);
}
inline uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return bytes;
}
inline float f16_to_float(uint16_t bits) { return on_cpu::half_to_float(bits); }
inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// To nearest even; NaN stays NaN.
inline uint32_t pack_bf16(float low, float high) {
  const auto half = [](float v) {
    const uint32_t bits = float_bits(v);
    return v != v ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return half(high) << 16 | half(low);
}

}  // namespace lgk
