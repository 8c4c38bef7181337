// score_block's CUDA kernels on a CPU, behind a C function for ctypes.
#include "score.h"

using namespace lgk::score_block;

// `timing` as for project_grad's; arch is 80 or 90, tile the queries of a block's.
extern "C" const char* score_block(int arch, int tile, int timing, const int64_t* queries, int query_words,
                                   const int64_t* rows, int row_words, float* out, float* partial, int64_t query_count,
                                   int64_t row_count, int64_t d, int64_t piece, int64_t pieces) {
  const CudaArgs args = {operand(queries, query_words),
                         operand(rows, row_words),
                         out,
                         partial,
                         {},
                         query_count,
                         row_count,
                         d,
                         piece,
                         pieces};
  return guarded([&] { run(lgk::Arch(arch), tile, args, {(timing & 1) != 0, (timing & 2) != 0, (timing & 4) != 0}); });
}
