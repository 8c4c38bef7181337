// project_grad's CUDA kernels on a CPU, behind a C function for ctypes.
#include "cuda_on_cpu.h"
//
#include "project_grad/cuda_kernel.cuh"

namespace lgk::project_grad {
alignas(128) char shared[256 << 10];

template <class E, int kWidth, int kParts>
void run(const CudaArgs& args, bool descending) {
  std::memset(shared, 0xff, sizeof(shared));
  const int64_t tiles = ((args.x.k + kWidth - 1) / kWidth) * ((args.dy.k + kWidth - 1) / kWidth);
  static_assert(Layout<E, kWidth, kParts>::kBytes <= 163 << 10, "more than a block of sm_80 can have");
  on_cpu::launch({unsigned(args.shape.chunks * tiles), 1}, 2 * kWidth, descending,
                 [&] { project_grad_kernel<E, kWidth, kParts>(args); });
  if (args.shape.offsets == nullptr && args.shape.length <= args.shape.chunk) return;
  const int64_t size = args.dy.k * args.x.k;
  on_cpu::launch({unsigned((size + 127) / 128), unsigned(args.shape.samples)}, 128, descending,
                 [&] { add_chunks_kernel(args); });
}

template <class E>
void run_width(int width, const CudaArgs& args, bool descending) {
  if constexpr (sizeof(typename E::Storage) == 2) {
    if (args.dy.projection != nullptr) {
      if (width == 32) return run<E, 32, 2>(args, descending);
      if (width == 64) return run<E, 64, 2>(args, descending);
      return run<E, 128, 2>(args, descending);
    }
  }
  if (width == 32) return run<E, 32, 3>(args, descending);
  run<E, 64, 3>(args, descending);
}
}  // namespace lgk::project_grad

using namespace lgk::project_grad;

// Every argument of CudaArgs in its order; width is 32, 64 or 128.
extern "C" void project_grad(int element, int width, int descending, const int64_t* x, const int64_t* dy,
                             const float* weights, int64_t weight_sample_stride, int64_t weight_row_stride, float* out,
                             float* partial, int64_t samples, int64_t length, const int64_t* offsets,
                             const int64_t* chunk_ends, int64_t chunk, int64_t chunks) {
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
  if (element == 1) return run_width<BF16>(width, args, descending != 0);
  if (element == 2) return run_width<F16>(width, args, descending != 0);
  run_width<F32>(width, args, descending != 0);
}
