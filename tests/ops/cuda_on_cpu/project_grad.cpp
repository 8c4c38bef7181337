// project_grad's CUDA kernels on a CPU, behind a C function for ctypes.
#include "bulk_on_cpu.h"
#include "cuda_on_cpu.h"
//
#include "project_grad/cuda_kernel.cuh"

namespace lgk::project_grad {
alignas(1024) char shared[4 * on_cpu::kSharedBytes];  // of four blocks

template <class Path>
void run(const CudaArgs& args, int blocks, on_cpu::Timing timing) {
  std::memset(shared, 0xff, sizeof(shared));
  on_cpu::shared_memory = shared;
  constexpr int kMost = Path::kThreads > Path::kWarps * kWarp ? 227 << 10 : 163 << 10;  // of sm_90, of sm_80
  static_assert(Path::kBytes <= kMost, "more than a block can have");
  const int64_t tiles =
      ((args.x.k + Path::kWidth - 1) / Path::kWidth) * ((args.dy.k + Path::kWidth - 1) / Path::kWidth);
  const auto maps = Path::Copies::maps(args, blocks);
  const unsigned cluster = unsigned(Path::kClusters ? blocks : 1);
  const auto clusters = (unsigned(args.shape.chunks) + cluster - 1) / cluster * unsigned(tiles);
  on_cpu::launch(
      {clusters * cluster, 1}, Path::kThreads, timing, [&] { project_grad_kernel<Path>(args, maps); }, cluster);
  if (args.shape.offsets == nullptr && args.shape.length <= args.shape.chunk) return;
  const int64_t size = args.dy.k * args.x.k;
  on_cpu::launch({unsigned((size + 127) / 128 * args.shape.samples), 1}, 128, timing, [&] { add_chunks_kernel(args); });
}

template <class E>
void run_path(int positions, int width, const CudaArgs& args, int blocks, on_cpu::Timing timing) {
  if constexpr (sizeof(typename E::Storage) == 2) {
    if (positions == 64 && width == 32) return run<Sm90<E, 32, 2, 64>>(args, blocks, timing);
    if (positions == 64 && width == 64) return run<Sm90<E, 64, 2, 64>>(args, blocks, timing);
    if (positions == 64) return run<Sm90<E, 128, 2, 64, 2>>(args, blocks, timing);
    if (positions == 128 && width == 32) return run<Sm90<E, 32, 2, 128>>(args, blocks, timing);
    if (positions == 128 && width == 64) return run<Sm90<E, 64, 2, 128>>(args, blocks, timing);
    if (positions == 128) return run<Sm90<E, 128, 2, 128>>(args, blocks, timing);
    if (args.dy.projection != nullptr) {
      if (width == 32) return run<Sm80<E, 32, 2>>(args, blocks, timing);
      if (width == 64) return run<Sm80<E, 64, 2>>(args, blocks, timing);
      return run<Sm80<E, 128, 2>>(args, blocks, timing);
    }
  }
  if (width == 32) return run<Sm80<E, 32, 3>>(args, blocks, timing);
  run<Sm80<E, 64, 3>>(args, blocks, timing);
}
}  // namespace lgk::project_grad

using namespace lgk::project_grad;

// Every argument of CudaArgs in its order; width is 32, 64 or 128; positions 64 or 128 take the kernels of sm_90, in
// clusters of `blocks`, 0 those of sm_80. Returns null, or what went wrong.
extern "C" const char* project_grad(int element, int positions, int width, int blocks, int timing, const int64_t* x,
                                    const int64_t* dy, const float* weights, int64_t weight_sample_stride,
                                    int64_t weight_row_stride, float* out, float* partial, int64_t samples,
                                    int64_t length, const int64_t* offsets, const int64_t* chunk_ends, int64_t chunk,
                                    int64_t chunks) {
  const auto side = [](const int64_t* v) {
    return CudaSide{reinterpret_cast<const void*>(v[0]),
                    v[1],
                    v[2],
                    v[3],
                    reinterpret_cast<const void*>(v[4]),
                    v[5],
                    v[6],
                    v[7],
                    v[8],
                    v[9] != 0};
  };
  const CudaArgs args = {
      side(x),           side(dy), weights, weight_sample_stride,
      weight_row_stride, out,      partial, {samples, length, offsets, 1, chunk_ends, chunk, chunks}};
  const on_cpu::Timing when = {(timing & 1) != 0, (timing & 2) != 0, (timing & 4) != 0};
  static std::string error;
  try {
    if (element == 1)
      run_path<BF16>(positions, width, args, blocks, when);
    else if (element == 2)
      run_path<F16>(positions, width, args, blocks, when);
    else
      run_path<F32>(positions, width, args, blocks, when);
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}
