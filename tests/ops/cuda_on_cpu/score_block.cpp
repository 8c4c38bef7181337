// score_block's CUDA kernels on a CPU, behind a C function for ctypes.
#include "cuda_on_cpu.h"
//
#include "score_block/cuda_kernel.cuh"

namespace lgk::score_block {
alignas(1024) char shared[256 << 10];

template <class K>
void run(const CudaArgs& args, on_cpu::Timing timing) {
  std::memset(shared, 0xff, sizeof(shared));
  static_assert(K::kBytes <= 163 << 10, "more than a block of sm_80 can have");
  const int64_t down = (args.query_count + K::kQueries - 1) / K::kQueries,
                across = (args.row_count + kRows - 1) / kRows;
  on_cpu::launch({unsigned(down * across), unsigned(args.pieces)}, kThreads, timing, [&] { score_kernel<K>(args); });
  if (args.pieces == 1) return;
  const int64_t size = args.query_count * args.row_count;
  on_cpu::launch({unsigned((size + kThreads - 1) / kThreads), 1}, kThreads, timing, [&] { add_pieces_kernel(args); });
}
}  // namespace lgk::score_block

using namespace lgk;
using namespace lgk::score_block;

// Matrices as ops/_native.py gives them; tile is 16 or 64 queries. Returns null, or what went wrong.
extern "C" const char* score_block(int tile, int descending, const int64_t* queries, const int64_t* rows,
                                   const int64_t* encoded, float* out, float* partial, int64_t query_count,
                                   int64_t row_count, int64_t d, int64_t piece, int64_t pieces) {
  const auto numbers = [](const int64_t* v) {
    return v == nullptr ? Rows{} : matrix(reinterpret_cast<const void*>(v[0]), Dtype(v[1]), v[2], v[3]);
  };
  CudaArgs args = {numbers(queries), numbers(rows), {}, out, partial, query_count, row_count, d, piece, pieces};
  if (encoded != nullptr) {
    args.encoded = {{Code(encoded[2]), encoded[3] != 0, encoded[4]},
                    reinterpret_cast<const uint8_t*>(encoded[0]),
                    reinterpret_cast<const void*>(encoded[1]),
                    encoded[5],
                    encoded[6]};
  }
  const on_cpu::Timing timing = {descending != 0, false, false};
  static std::string error;
  try {
    const bool known = with_numbers(args, [&](auto q, auto r) {
      tile == 16 ? run<Kernel<decltype(q), decltype(r), 16>>(args, timing)
                 : run<Kernel<decltype(q), decltype(r), 64>>(args, timing);
    });
    return known ? nullptr : "no kernel for these dtypes";
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}
