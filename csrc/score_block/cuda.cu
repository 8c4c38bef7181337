#include <stdexcept>
#include <string>

#include "score_block/cuda.h"
#include "score_block/cuda_kernel.cuh"

namespace lgk::score_block {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("score_block: ") + what + ": " + cudaGetErrorString(status));
  }
}

template <class K>
void launch(const CudaArgs& args, cudaStream_t stream) {
  check(cudaFuncSetAttribute(score_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kBytes), "shared memory");
  const int64_t down = (args.query_count + K::kQueries - 1) / K::kQueries,
                across = (args.row_count + kRows - 1) / kRows;
  const dim3 grid(static_cast<unsigned>(down * across), static_cast<unsigned>(args.pieces));
  score_kernel<K><<<grid, kThreads, K::kBytes, stream>>>(args);
  check(cudaGetLastError(), "launch");
  if (args.pieces == 1) return;
  const int64_t size = args.query_count * args.row_count;
  add_pieces_kernel<<<static_cast<unsigned>((size + kThreads - 1) / kThreads), kThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "launch of the sum");
}

}  // namespace

Tile tile(int64_t query_count) { return {query_count <= 16 ? 16 : 64, kRows, kDepth}; }

void score_block_cuda(const CudaArgs& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const bool few = tile(args.query_count).queries == 16;
  const bool known = with_numbers(args, [&](auto q, auto r) {
    few ? launch<Kernel<decltype(q), decltype(r), 16>>(args, on)
        : launch<Kernel<decltype(q), decltype(r), 64>>(args, on);
  });
  if (!known) throw std::runtime_error("score_block: no CUDA kernel for queries and rows of these dtypes");
}

}  // namespace lgk::score_block
