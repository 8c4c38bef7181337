#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "project_grad/cuda.h"
#include "project_grad/cuda_kernel.cuh"

namespace lgk::project_grad {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it again
    throw std::runtime_error(std::string("project_grad: ") + what + ": " + cudaGetErrorString(status));
  }
}

// fp32 operands, and sides that come projected, keep 24 bits; half ones that are projected here keep 16.
int parts(Element element, bool dy_projected) { return element == Element::kF32 || dy_projected ? 3 : 2; }

int width_class(Element element, int64_t width, bool dy_projected) {
  return width <= 32 ? 32 : width <= 64 || parts(element, dy_projected) == 3 ? 64 : 128;
}

constexpr int kMostBlocks = 4;  // of a cluster: with more, fewer clusters fit the processors that can share

cudaLaunchConfig_t config_of(int64_t grid, int threads, size_t bytes, cudaStream_t stream, cudaLaunchAttribute* more) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid)), config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = more, config.numAttrs = more == nullptr ? 0 : 1;
  return config;
}

cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(blocks), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  return cluster;
}

// Sums of chunks; on sm_90 the grid is set up while the one before it ends.
void add_chunks(const CudaArgs& args, bool overlapping, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const int64_t runs = (args.dy.k * args.x.k + kThreads - 1) / kThreads;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const auto config = config_of(runs * args.shape.samples, kThreads, 0, stream, overlapping ? &overlap : nullptr);
  check(cudaLaunchKernelEx(&config, add_chunks_kernel, args), "launch of the sum");
}

// How many clusters of so many blocks the current device runs at once.
template <class Path>
int clusters_at_once(int blocks) {
  thread_local std::map<std::pair<int, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "device");
  const auto [found, is_new] = known.try_emplace({device, blocks}, 0);
  if (is_new) {
    cudaLaunchAttribute cluster = cluster_of(blocks);
    const auto config = config_of(blocks, Path::kThreads, Path::kBytes, nullptr, &cluster);
    if (cudaOccupancyMaxActiveClusters(&found->second, project_grad_kernel<Path>, &config) != cudaSuccess) {
      cudaGetLastError();  // none, then
      found->second = 0;
    }
  }
  return found->second;
}

// Blocks of a cluster for so many chunks: the most with which they take no more turns than with fewer. Clusters need
// processors that are neighbours, of which a few stay idle.
template <class Path>
int blocks_of_cluster(int64_t chunks, int64_t tiles) {
  int best = 1;
  int64_t fewest = INT64_MAX;  // turns
  for (int blocks = 1; blocks <= kMostBlocks && blocks <= chunks; blocks *= 2) {
    const int64_t clusters = (chunks + blocks - 1) / blocks * tiles, at_once = clusters_at_once<Path>(blocks);
    if (at_once == 0) continue;
    const int64_t turns = (clusters + at_once - 1) / at_once;
    if (turns <= fewest) fewest = turns, best = blocks;
  }
  return best;
}

template <class Path>
void launch(const CudaArgs& args, int blocks, cudaStream_t stream) {
  const CudaShape& shape = args.shape;
  const auto kernel = project_grad_kernel<Path>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Path::kBytes), "shared memory");
  const auto tiles_of = [](int64_t k) { return (k + Path::kWidth - 1) / Path::kWidth; };
  const int64_t tiles = tiles_of(args.x.k) * tiles_of(args.dy.k);
  if constexpr (Path::kClusters) {
    if (blocks == 0) blocks = blocks_of_cluster<Path>(shape.chunks, tiles);
  }
  cudaLaunchAttribute cluster = cluster_of(blocks);
  const int64_t grid = (shape.chunks + blocks - 1) / blocks * blocks * tiles;
  const auto config = config_of(grid, Path::kThreads, Path::kBytes, stream, blocks > 1 ? &cluster : nullptr);
  check(cudaLaunchKernelEx(&config, kernel, args, Path::Copies::maps(args, blocks)), "launch");
  if (shape.offsets != nullptr || shape.length > shape.chunk) add_chunks(args, Path::kClusters, stream);
}

template <class E>
void launch_sm80(int width, int kept, const CudaArgs& args, cudaStream_t stream) {
  if constexpr (sizeof(typename E::Storage) == 2) {
    if (kept == 2) {
      if (width == 32) return launch<Sm80<E, 32, 2>>(args, 1, stream);
      if (width == 64) return launch<Sm80<E, 64, 2>>(args, 1, stream);
      return launch<Sm80<E, 128, 2>>(args, 1, stream);
    }
  }
  if (width == 32) return launch<Sm80<E, 32, 3>>(args, 1, stream);
  launch<Sm80<E, 64, 3>>(args, 1, stream);
}

template <class E>
void launch_sm90(int width, int positions, const CudaArgs& args, int blocks, cudaStream_t stream) {
  if (positions == 64) {
    if (width == 32) return launch<Sm90<E, 32, 2, 64>>(args, blocks, stream);
    if (width == 64) return launch<Sm90<E, 64, 2, 64>>(args, blocks, stream);
    return launch<Sm90<E, 128, 2, 64, 2>>(args, blocks, stream);
  }
  if (width == 32) return launch<Sm90<E, 32, 2, 128>>(args, blocks, stream);
  if (width == 64) return launch<Sm90<E, 64, 2, 128>>(args, blocks, stream);
  launch<Sm90<E, 128, 2, 128>>(args, blocks, stream);
}

}  // namespace

Tiling tiling(Arch arch, Element element, int64_t k_in, int64_t k_out, bool dy_projected) {
  const int width = width_class(element, std::max(k_in, k_out), dy_projected);
  const int64_t tiles = ((k_in + width - 1) / width) * ((k_out + width - 1) / width);
  if (arch == Arch::kSm80) return {width, width, tiles};
  return {128, 64, tiles};
}

void project_grad_cuda(Arch arch, Element element, int positions, int blocks, const CudaArgs& args, void* stream) {
  const bool dy_projected = args.dy.projection == nullptr;
  const int width = width_class(element, std::max(args.x.k, args.dy.k), dy_projected);
  const auto on = static_cast<cudaStream_t>(stream);
  if (arch == Arch::kSm90) {
    if (!kHasSm90 || element == Element::kF32 || dy_projected) {
      throw std::runtime_error("project_grad: no kernel of sm_90a in this build, or for these operands");
    }
    if (element == Element::kBF16) return launch_sm90<BF16>(width, positions, args, blocks, on);
    return launch_sm90<F16>(width, positions, args, blocks, on);
  }
  const int kept = parts(element, dy_projected);
  if (element == Element::kBF16) return launch_sm80<BF16>(width, kept, args, on);
  if (element == Element::kF16) return launch_sm80<F16>(width, kept, args, on);
  launch_sm80<F32>(width, kept, args, on);
}

}  // namespace lgk::project_grad
