#include <stdexcept>
#include <string>

#include "score_block/cuda.h"
#include "score_block/cuda_kernel.cuh"
#include "score_block/cuda_kinds.cuh"

namespace lgk::score_block {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it again
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

Tile tile(const Operand& queries, const Operand& rows, int64_t query_count) {
  return tile_of(queries, rows, query_count);
}

void score_block_cuda(Arch arch, const CudaArgs& args, void* stream) {
  if (arch == Arch::kSm90 && !kHasSm90) throw std::runtime_error("score_block: no kernel of sm_90a in this build");
  const auto launched = [&](auto kernel) { launch<decltype(kernel)>(args, static_cast<cudaStream_t>(stream)); };
  const int queries = tile_of(args.queries, args.rows, args.query_count).queries;
  if (!with_kernel(arch_for(arch, args.queries, args.rows), args, queries, launched)) {
    throw std::runtime_error("score_block: no CUDA kernel for queries and rows of these formats");
  }
}

}  // namespace lgk::score_block
