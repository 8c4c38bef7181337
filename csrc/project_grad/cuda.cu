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

template <class Path>
void launch(const CudaArgs& args, cudaStream_t stream) {
  const CudaShape& shape = args.shape;
  const auto kernel = project_grad_kernel<Path>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Path::kBytes), "shared memory");
  const auto tiles = [](int64_t k) { return (k + Path::kWidth - 1) / Path::kWidth; };
  const auto blocks = static_cast<unsigned>(shape.chunks * tiles(args.x.k) * tiles(args.dy.k));
  kernel<<<blocks, Path::kThreads, Path::kBytes, stream>>>(args, Path::Copies::maps(args));
  check(cudaGetLastError(), "launch");
  if (shape.offsets == nullptr && shape.length <= shape.chunk) return;
  constexpr int kThreads = 128;
  const int64_t runs = (args.dy.k * args.x.k + kThreads - 1) / kThreads;
  add_chunks_kernel<<<static_cast<unsigned>(runs * shape.samples), kThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "launch of the sum");
}

template <class E>
void launch_sm80(int width, int kept, const CudaArgs& args, cudaStream_t stream) {
  if constexpr (sizeof(typename E::Storage) == 2) {
    if (kept == 2) {
      if (width == 32) return launch<Sm80<E, 32, 2>>(args, stream);
      if (width == 64) return launch<Sm80<E, 64, 2>>(args, stream);
      return launch<Sm80<E, 128, 2>>(args, stream);
    }
  }
  if (width == 32) return launch<Sm80<E, 32, 3>>(args, stream);
  launch<Sm80<E, 64, 3>>(args, stream);
}

template <class E>
void launch_sm90(int width, int positions, const CudaArgs& args, cudaStream_t stream) {
  if (width == 128) return launch<Sm90<E, 128, 2, 128>>(args, stream);
  if (positions == 64) {
    if (width == 32) return launch<Sm90<E, 32, 2, 64>>(args, stream);
    return launch<Sm90<E, 64, 2, 64>>(args, stream);
  }
  if (width == 32) return launch<Sm90<E, 32, 2, 128>>(args, stream);
  launch<Sm90<E, 64, 2, 128>>(args, stream);
}

}  // namespace

Tiling tiling(Arch arch, Element element, int64_t k_in, int64_t k_out, bool dy_projected) {
  const int width = width_class(element, std::max(k_in, k_out), dy_projected);
  const int64_t tiles = ((k_in + width - 1) / width) * ((k_out + width - 1) / width);
  if (arch == Arch::kSm80) return {width, width, tiles};
  return {128, width == 128 ? 128 : 64, tiles};
}

void project_grad_cuda(Arch arch, Element element, int positions, const CudaArgs& args, void* stream) {
  const bool dy_projected = args.dy.projection == nullptr;
  const int width = width_class(element, std::max(args.x.k, args.dy.k), dy_projected);
  const auto on = static_cast<cudaStream_t>(stream);
  if (arch == Arch::kSm90) {
    if (!kHasSm90 || element == Element::kF32 || dy_projected) {
      throw std::runtime_error("project_grad: no kernel of sm_90a in this build, or for these operands");
    }
    if (element == Element::kBF16) return launch_sm90<BF16>(width, positions, args, on);
    return launch_sm90<F16>(width, positions, args, on);
  }
  const int kept = parts(element, dy_projected);
  if (element == Element::kBF16) return launch_sm80<BF16>(width, kept, args, on);
  if (element == Element::kF16) return launch_sm80<F16>(width, kept, args, on);
  launch_sm80<F32>(width, kept, args, on);
}

}  // namespace lgk::project_grad
