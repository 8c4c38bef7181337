#include <algorithm>
#include <stdexcept>
#include <string>

#include "project_grad/cuda.h"
#include "project_grad/cuda_kernel.cuh"

namespace lgk::project_grad {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("project_grad: ") + what + ": " + cudaGetErrorString(status));
  }
}

// fp32 operands, and sides that come projected, keep 24 bits; half ones that are projected here keep 16.
int parts(Element element, bool dy_projected) { return element == Element::kF32 || dy_projected ? 3 : 2; }

int width_class(Element element, int64_t width, bool dy_projected) {
  return width <= 32 ? 32 : width <= 64 || parts(element, dy_projected) == 3 ? 64 : 128;
}

template <class E, int kWidth, int kParts>
void launch(const CudaArgs& args, cudaStream_t stream) {
  const CudaShape& shape = args.shape;
  constexpr int kBytes = Layout<E, kWidth, kParts>::kBytes;
  const auto kernel = project_grad_kernel<E, kWidth, kParts>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "shared memory");
  const int64_t blocks = shape.chunks * ((args.x.k + kWidth - 1) / kWidth) * ((args.dy.k + kWidth - 1) / kWidth);
  kernel<<<static_cast<unsigned>(blocks), 2 * kWidth, kBytes, stream>>>(args);
  check(cudaGetLastError(), "launch");
  if (shape.offsets == nullptr && shape.length <= shape.chunk) return;
  constexpr int kThreads = 128;
  const int64_t size = args.dy.k * args.x.k;
  const dim3 grid(static_cast<unsigned>((size + kThreads - 1) / kThreads), static_cast<unsigned>(shape.samples));
  add_chunks_kernel<<<grid, kThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "launch of the sum");
}

template <class E>
void launch_width(int width, int kept, const CudaArgs& args, cudaStream_t stream) {
  if constexpr (sizeof(typename E::Storage) == 2) {
    if (kept == 2) {
      if (width == 32) return launch<E, 32, 2>(args, stream);
      if (width == 64) return launch<E, 64, 2>(args, stream);
      return launch<E, 128, 2>(args, stream);
    }
  }
  if (width == 32) return launch<E, 32, 3>(args, stream);
  launch<E, 64, 3>(args, stream);
}

}  // namespace

Tiling tiling(Element element, int64_t k_in, int64_t k_out, bool dy_projected) {
  const int width = width_class(element, std::max(k_in, k_out), dy_projected);
  return {width, ((k_in + width - 1) / width) * ((k_out + width - 1) / width)};
}

void project_grad_cuda(Element element, const CudaArgs& args, void* stream) {
  const bool dy_projected = args.dy.projection == nullptr;
  const int width = width_class(element, std::max(args.x.k, args.dy.k), dy_projected);
  const int kept = parts(element, dy_projected);
  const auto on = static_cast<cudaStream_t>(stream);
  if (element == Element::kBF16) return launch_width<BF16>(width, kept, args, on);
  if (element == Element::kF16) return launch_width<F16>(width, kept, args, on);
  launch_width<F32>(width, kept, args, on);
}

}  // namespace lgk::project_grad
