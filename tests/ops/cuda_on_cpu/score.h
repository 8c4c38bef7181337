// The scoring kernels' arguments as ctypes gives them, and score_block's kernels run on a CPU.
#pragma once
#include "bulk_on_cpu.h"
#include "cuda_on_cpu.h"
//
#include "score_block/cuda_kernel.cuh"
#include "score_block/cuda_kinds.cuh"

namespace lgk::score_block {
alignas(1024) inline char shared[256 << 10];

template <class K>
void run_kernel(const CudaArgs& args, on_cpu::Timing timing) {
  std::memset(shared, 0xff, sizeof(shared));
  on_cpu::shared_memory = shared;
  static_assert(K::kBytes <= (K::kArch == Arch::kSm80 ? 163 << 10 : 227 << 10), "more than a block can have");
  const int64_t down = (args.query_count + K::kQueries - 1) / K::kQueries,
                across = (args.row_count + kRows - 1) / kRows;
  on_cpu::launch({unsigned(down * across), unsigned(args.pieces)}, kThreads, timing, [&] { score_kernel<K>(args); });
  if (args.pieces == 1) return;
  const int64_t size = args.query_count * args.row_count;
  on_cpu::launch({unsigned((size + kThreads - 1) / kThreads), 1}, kThreads, timing, [&] { add_pieces_kernel(args); });
}

// tile: queries of a block's.
inline void run(Arch arch, int tile, const CudaArgs& args, on_cpu::Timing timing) {
  const auto on_cpu = [&](auto kernel) { run_kernel<decltype(kernel)>(args, timing); };
  if (!with_kernel(arch_for(arch, args.queries, args.rows), args, tile, on_cpu)) {
    throw std::runtime_error("no kernel for these formats");
  }
}

// Four numbers of ops/_native.py for a matrix, seven for codes.
inline Operand operand(const int64_t* v, int count) {
  if (count == 4) return {matrix(reinterpret_cast<const void*>(v[0]), Dtype(v[1]), v[2], v[3]), {}};
  return {{},
          {{Code(v[2]), v[3] != 0, v[4]},
           reinterpret_cast<const uint8_t*>(v[0]),
           reinterpret_cast<const void*>(v[1]),
           v[5],
           v[6]}};
}

}  // namespace lgk::score_block

// Null, or what went wrong.
template <class Function>
const char* guarded(const Function& function) {
  static std::string error;
  try {
    function();
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}
