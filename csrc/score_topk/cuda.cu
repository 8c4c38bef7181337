#include <stdexcept>
#include <string>

#include "score_topk/cuda.h"
#include "score_topk/cuda_kernel.cuh"

namespace lgk::score_topk {

void score_topk_cuda(Arch arch, const CudaArgs& args, void* stream) {
  for (int64_t start = 0; start < args.scores.row_count; start += block_rows(args, start)) {
    const Block block = block_of(args, start);
    score_block::score_block_cuda(arch, block.scores, stream);
    merge_kernel<<<static_cast<unsigned>(args.scores.query_count), kThreads, kBytes,
                   static_cast<cudaStream_t>(stream)>>>(block.merge);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess)
      throw std::runtime_error(std::string("score_topk: launch: ") + cudaGetErrorString(status));
  }
}

}  // namespace lgk::score_topk
