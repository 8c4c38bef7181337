// score_topk's CUDA kernels on a CPU, behind a C function for ctypes.
#include "score.h"
//
namespace lgk::score_topk {
alignas(1024) char shared[48 << 10];
}
#include "score_topk/cuda_kernel.cuh"

using namespace lgk;
using namespace lgk::score_topk;

// Every argument of the op's CudaArgs; `timing`, arch and tile as for score_block.
extern "C" const char* score_topk(int arch, int tile, int timing, const int64_t* queries, int query_words,
                                  const int64_t* rows, int row_words, const float* row_scale, int64_t scale_stride,
                                  float* values, int64_t* indices, uint64_t* list, uint32_t* counts, uint64_t* best,
                                  float* partial, int64_t query_count, int64_t row_count, int64_t d, int64_t k,
                                  int largest, int64_t first_block, int64_t capacity, int64_t piece, int64_t pieces) {
  CudaArgs args = {};
  args.scores = {score_block::operand(queries, query_words),
                 score_block::operand(rows, row_words),
                 nullptr,
                 partial,
                 {list, counts, best, k, capacity, 0, row_scale, scale_stride, largest != 0},
                 query_count,
                 row_count,
                 d,
                 piece,
                 pieces};
  args.best = best, args.first_block = first_block, args.values = values, args.indices = indices;
  const on_cpu::Timing when = {(timing & 1) != 0, (timing & 2) != 0, (timing & 4) != 0};
  return guarded([&] {
    for (int64_t start = 0; start < row_count; start += block_rows(args, start)) {
      const Block block = block_of(args, start);
      score_block::run(Arch(arch), tile, block.scores, when);
      on_cpu::launch({unsigned(query_count), 1}, kThreads, when, [&] { merge_kernel(block.merge); });
    }
  });
}
