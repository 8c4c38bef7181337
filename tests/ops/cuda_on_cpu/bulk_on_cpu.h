// The primitives of common/cuda_bulk.cuh on a CPU, from what the PTX manual says of them: mbarrier, bulk tensor copies,
// wgmma, clusters. Copies land and products are computed at once or as late as can be, when somebody waits for them, as
// the launch's timing says: late copies show what is read too early, early ones beside late products what is freed too
// early. What a device would not do in good order throws: a copy to a barrier that the engine cannot see or to a block
// that has ended, products without a fence, a descriptor that lanes do not agree on.
#pragma once
#include <map>
#include <string>

#include "cuda_on_cpu.h"

namespace on_cpu {

struct Phases {
  int count = 0, arrivals_left = 0, phase = 0;
  int64_t bytes_left = 0;
  bool visible = false;                       // to the copy engine
  std::vector<std::function<void()>> coming;  // copies that have not landed

  void land() {
    const auto copies = std::move(coming);
    coming.clear();
    for (const auto& copy : copies) copy();
  }
  void settle() {
    if (arrivals_left < 0) throw std::runtime_error("more arrivals than a barrier expects");
    if (arrivals_left > 0 || bytes_left != 0) return;
    arrivals_left = count;
    phase ^= 1;
  }
};

struct Products {
  bool fenced = false;
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};

struct Bulk {
  std::map<const void*, Phases> barriers;
  std::map<const Fiber*, Products> of_thread;
  std::vector<int> at_cluster;  // how many threads have reached the cluster's barrier i
};

inline Bulk& bulk() {
  std::shared_ptr<Bulk>& made = cluster->front().bulk;
  if (!made) made = std::make_shared<Bulk>();
  return *made;
}
inline Products& products_of_thread() { return bulk().of_thread[&self()]; }

inline Phases& barrier_at(const void* barrier) {
  const auto found = bulk().barriers.find(barrier);
  if (found == bulk().barriers.end()) throw std::runtime_error("a barrier is used before it is initialised");
  return found->second;
}

inline void must(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

inline const bool checks_end = [] {
  at_end = [] {
    for (const auto& [_, phases] : bulk().barriers) must(phases.coming.empty(), "a block ends before its copies do");
  };
  return true;
}();

// A matrix in shared memory as wgmma finds it: bits 0-13 start, 16-29 and 32-45 leading and stride offset, all in 16
// bytes, 49-51 base offset, 62-63 swizzle. K-major with 128-byte swizzle: eight rows of 128 bytes make a pattern, whose
// 16-byte chunks are permuted by address bits 7-9; patterns along M or N lie a stride offset apart.
struct Matrix {
  uint32_t start, stride;

  explicit Matrix(uint64_t descriptor) {
    start = uint32_t(descriptor & 0x3fff) << 4;
    stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    must((descriptor >> 62) == 1, "only the 128-byte swizzle is known here");
    must((descriptor >> 49 & 7) == 0 && (start & 0x380) == 0, "the swizzle's pattern does not start at 1024 bytes");
  }
  // The 8 bytes that start at a multiple of 8 of a row.
  uint64_t at(int row, int byte) const {
    uint32_t address = start + uint32_t(row / 8) * stride + uint32_t(row % 8) * 128 + uint32_t(byte);
    address ^= (address >> 7 & 7) << 4;
    uint64_t word;
    std::memcpy(&word, block->memory + address, 8);
    return word;
  }
};

// m64nN with k of 32 bytes: warp w of the group holds rows 16 w + g and + 8, columns 8 j + 2 t and + 1 of c.
template <auto kNumber, int kEach, class T, int kColumns>
void multiply_group(T (&c)[kColumns][4], uint64_t a, uint64_t b) {
  const uint64_t words[] = {a, b};
  const Exchange& all = exchange(words, 2);
  for (int lane = 0; lane < kWarp; ++lane) {
    must(all.words[lane][0] == a && all.words[lane][1] == b, "descriptors differ within a warp");
  }
  Products& products = products_of_thread();
  must(products.fenced, "products without a fence before them");
  const int lane = block->current % kWarp, row = block->current / kWarp % 4 * 16 + lane / 4;
  T(*sums)[4] = c;
  products.open.push_back([=] {
    const Matrix left(a), right(b);
    for (int j = 0; j < kColumns; ++j) {
      for (int e = 0; e < 4; ++e) {
        Wide<T> sum = sums[j][e];
        for (int byte = 0; byte < 32; byte += 8) {
          const uint64_t own = left.at(row + e / 2 * 8, byte), other = right.at(j * 8 + lane % 4 * 2 + e % 2, byte);
          for (int k = 0; k < 2 * kEach; ++k) sum += Wide<T>(kNumber(own, k)) * kNumber(other, k);
        }
        sums[j][e] = kept(sums[j][e], sum);
      }
    }
  });
  if (block->timing.products_at_once) products.open.back()(), products.open.pop_back();
}

}  // namespace on_cpu

namespace lgk {

struct TensorMap {
  const char* data;
  int64_t sizes[3], strides[2];  // of rows and samples, in bytes
  int box_rows;
};

inline TensorMap tensor_map(const char*, const void* data, int64_t columns, int64_t rows, int64_t samples,
                            int64_t row_stride, int64_t sample_stride, int box_rows) {
  using on_cpu::must;
  must(reinterpret_cast<uintptr_t>(data) % 16 == 0, "a tensor map's address is not aligned");
  must(row_stride * 2 % 16 == 0 && sample_stride * 2 % 16 == 0, "a tensor map's stride is no multiple of 16 bytes");
  must(row_stride >= columns && sample_stride >= row_stride * rows, "a tensor map's stride is too small");
  for (const int64_t size : {columns, rows, samples}) must(size > 0 && size <= int64_t(1) << 32, "a tensor map's size");
  must(sample_stride * 2 < int64_t(1) << 40 && box_rows > 0 && box_rows <= 256, "a tensor map's stride or box");
  return {static_cast<const char*>(data), {columns, rows, samples}, {row_stride * 2, sample_stride * 2}, box_rows};
}

using Barrier = uint64_t;

inline uint32_t shared_address(const void* shared) {
  return uint32_t(static_cast<const char*>(shared) - on_cpu::block->memory);
}

inline void init_barrier(Barrier* barrier, int count) {
  on_cpu::Phases fresh;
  fresh.count = fresh.arrivals_left = count;
  on_cpu::bulk().barriers[barrier] = fresh;
}
inline void show_to_engine() {
  for (auto& [_, phases] : on_cpu::bulk().barriers) phases.visible = true;
}
inline void arrive(Barrier* barrier) {
  on_cpu::Phases& phases = on_cpu::barrier_at(barrier);
  --phases.arrivals_left;
  phases.settle();
}
inline void arrive_expecting(Barrier* barrier, int bytes) {
  on_cpu::barrier_at(barrier).bytes_left += bytes;
  arrive(barrier);
}
inline void wait_for_phase(Barrier* barrier, int parity) {
  on_cpu::Phases& phases = on_cpu::barrier_at(barrier);
  while (phases.phase == parity) {
    phases.land();
    if (phases.phase == parity) on_cpu::yield();
  }
  ++on_cpu::self().waits;
}
inline void show_barriers() {}

inline void let_next_grid_start() {}
inline void wait_for_grid_before() {}

inline char* block_memory() { return on_cpu::block->memory; }
inline int cluster_rank() { return int(on_cpu::block - on_cpu::cluster->data()); }

// What this address of shared memory is in another block of the cluster.
template <class T>
T* in_block(T* shared, int rank) {
  const on_cpu::Block& there = on_cpu::cluster->at(size_t(rank));
  on_cpu::must(!there.ended(), "the memory of a block is used that has ended");
  return reinterpret_cast<T*>(there.memory + shared_address(shared));
}

inline void arrive_at(Barrier* barrier, int rank) { arrive(in_block(barrier, rank)); }

inline void sync_cluster() {
  const size_t turn = size_t(on_cpu::self().clusters++);
  auto& counts = on_cpu::bulk().at_cluster;
  if (counts.size() <= turn) counts.resize(turn + 1, 0);
  ++counts[turn];
  const auto missing = [turn] {  // threads that have ended do not count
    int left = -on_cpu::bulk().at_cluster[turn];
    for (const on_cpu::Block& block : *on_cpu::cluster) {
      for (const on_cpu::Fiber& fiber : block.fibers) left += !fiber.done || size_t(fiber.clusters) > turn;
    }
    return left > 0;
  };
  while (missing()) on_cpu::yield();
}

// To the same place of every block whose bit is set, each of whose barriers counts the bytes.
inline void fetch_tile_to(char* tile, const TensorMap* map, Barrier* barrier, int column, int row, int sample,
                          unsigned blocks) {
  for (int rank = 0; rank < int(on_cpu::cluster->size()); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    char* const memory = on_cpu::cluster->at(size_t(rank)).memory;
    const uint32_t begin = shared_address(tile);
    Barrier* const there = in_block(barrier, rank);
    on_cpu::Phases& phases = on_cpu::barrier_at(there);
    on_cpu::must(phases.visible, "the copy engine cannot see a barrier");
    on_cpu::must(begin % 1024 == 0, "a swizzled tile does not start at a multiple of 1024 bytes");
    phases.coming.push_back([=] {
      for (int r = 0; r < map->box_rows; ++r) {
        for (int c = 0; c < 64; ++c) {
          uint16_t number = 0;
          const int64_t at[] = {int64_t(column) + c, int64_t(row) + r, sample};
          bool inside = true;
          for (int i = 0; i < 3; ++i) inside = inside && at[i] >= 0 && at[i] < map->sizes[i];
          if (inside) {
            std::memcpy(&number, map->data + at[0] * 2 + at[1] * map->strides[0] + at[2] * map->strides[1], 2);
          }
          uint32_t address = begin + uint32_t(r * 128 + c * 2);
          address ^= (address >> 7 & 7) << 4;
          std::memcpy(memory + address, &number, 2);
        }
      }
      on_cpu::Phases& full = on_cpu::barrier_at(there);
      full.bytes_left -= int64_t(map->box_rows) * 128;
      full.settle();
    });
    if (on_cpu::block->timing.copies_at_once) phases.land();
  }
}
inline void fetch_tile(char* tile, const TensorMap* map, Barrier* barrier, int column, int row, int sample) {
  fetch_tile_to(tile, map, barrier, column, row, sample, 1u << cluster_rank());
}

template <int kThreads>
void sync_first() {
  on_cpu::must(on_cpu::block->current < kThreads, "a thread that does not count is at a barrier of the first ones");
  on_cpu::meet(&on_cpu::Block::at_first, on_cpu::self().firsts++, kThreads);
}

template <int kRegisters>
void drop_to_registers() {}
template <int kRegisters>
void rise_to_registers() {}

inline void begin_products() { on_cpu::products_of_thread().fenced = true; }
inline void commit_products() {
  on_cpu::Products& products = on_cpu::products_of_thread();
  products.groups.push_back(std::move(products.open));
  products.open.clear();
  products.fenced = false;
}
template <int kLeft>
void wait_for_products() {
  auto& groups = on_cpu::products_of_thread().groups;
  for (; groups.size() > kLeft; groups.pop_front()) {
    for (const auto& product : groups.front()) product();
  }
  const uint64_t none[] = {0};
  on_cpu::exchange(none, 1);  // no lane goes on before the whole warp is here
}
template <class T, int kColumns>
void take_products(T (&)[kColumns][4]) {}

template <int kColumns>
void multiply_group_bf16(float (&c)[kColumns][4], uint64_t a, uint64_t b) {
  on_cpu::multiply_group<on_cpu::from_bf16, 2>(c, a, b);
}
template <int kColumns>
void multiply_group_f16(float (&c)[kColumns][4], uint64_t a, uint64_t b) {
  on_cpu::multiply_group<on_cpu::from_half, 2>(c, a, b);
}
template <int kColumns>
void multiply_group_s8(int32_t (&c)[kColumns][4], uint64_t a, uint64_t b) {
  on_cpu::multiply_group<on_cpu::from_s8, 4>(c, a, b);
}

}  // namespace lgk
