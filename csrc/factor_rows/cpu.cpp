#include "factor_rows/cpu.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/buffer.h"
#include "common/kernels.h"
#include "common/threads.h"

namespace lgk::factor_rows {
namespace {

// Residuals stay within 1e-3 of the least ones on matrices of independent normal numbers, the slowest to converge.
constexpr int64_t kMoreVectors = 7;
constexpr int64_t kVectorStep = 4;
constexpr int kIterations = 8;
constexpr int kSweeps = 6;

// Numbers in [-1, 1) by the SplitMix64 generator (Steele, Lea and Flood 2014).
template <typename T>
T start_number(uint64_t i) {
  uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<T>(static_cast<int64_t>(z ^ (z >> 31)) >> 40) * T(0x1p-23);
}

int64_t width_of(const FactoredLayer& layer, int64_t rank) {
  const int64_t wanted = round_up(rank + kMoreVectors, kVectorStep);
  return std::min(wanted, std::min(layer.k_out, layer.k_in));
}

template <typename T>
struct Job {
  const Products<T>& kernels;
  const FactorKernels<T>& factor_kernels;
  Rows rows;
  int64_t n;
  const Factored& layers;
  const T* start;
  T* out;
  int64_t most_numbers, most_vectors;  // of a matrix; of a matrix's y or q

  int64_t batch() const { return kernels.lanes; }
  int64_t scratch_size() const {
    return batch() * (most_numbers + 2 * most_vectors) + kernels.lanes * kTileLd + 2 * batch();
  }

  void factor(const FactoredLayer& layer, int64_t row, T* scratch) const {
    const int64_t count = std::min(batch(), n - row), width = width_of(layer, layers.rank);
    T *g = scratch, *y = g + batch() * most_numbers, *q = y + batch() * most_vectors;
    T *tile = q + batch() * most_vectors, *largest = tile + kernels.lanes * kTileLd, *root = largest + batch();
    for (int64_t k = 0; k < layer.size(); k += kPanel) {
      kernels.pack_columns(rows, row, count, layer.column + k, std::min(kPanel, layer.size() - k), g + k * batch(),
                           tile);
    }
    normalise(layer, g, largest, root);
    factor_kernels.subspace(g, layer.k_out, layer.k_in, start, width, kIterations, kSweeps, y, q);
    for (int64_t lane = 0; lane < count; ++lane) {
      write(layer, y + lane, q + lane, width, root[lane], out + (row + lane) * layers.factors + layer.factor);
    }
  }

  // Scales each matrix by a power of 4 to entries of at most 4, so that no square overflows, and of at least 1, so that
  // none that matters underflows; its square root is what each factor is multiplied by. NaN where a number is not
  // finite.
  void normalise(const FactoredLayer& layer, T* g, T* largest, T* root) const {
    const int64_t lanes = batch();
    std::fill_n(largest, lanes, T{0});
    for (int64_t i = 0; i < layer.size() * lanes; i += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T x = std::fabs(g[i + lane]);
        largest[lane] = x <= largest[lane] ? largest[lane] : x;  // NaN stays, unless a number follows
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      int exponent = 0;
      if (std::isfinite(largest[lane]) && largest[lane] > 0) exponent = std::ilogb(largest[lane]) >> 1;
      root[lane] = std::ldexp(T{1}, exponent);
      largest[lane] = std::ldexp(T{1}, -exponent);
    }
    for (int64_t i = 0; i < layer.size() * lanes; i += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) g[i + lane] = g[i + lane] * largest[lane] * largest[lane];
    }
  }

  // One lane's vectors; those of the largest singular values, in order.
  void write(const FactoredLayer& layer, const T* y, const T* q, int64_t width, T root, T* to) const {
    const int64_t rank = layers.rank, lanes = batch();
    T sigma[kMostRank + kMoreVectors + kVectorStep];
    for (int64_t b = 0; b < width; ++b) {
      T squares = 0;
      for (int64_t i = 0; i < layer.k_out; ++i) {
        const T x = y[(b * layer.k_out + i) * lanes];
        squares += x * x;
      }
      sigma[b] = std::sqrt(squares);
    }
    T *u = to, *v = to + rank * layer.k_out;
    for (int64_t c = 0; c < rank; ++c, u += layer.k_out, v += layer.k_in) {
      const int64_t best = c < width ? std::max_element(sigma, sigma + width) - sigma : 0;
      const bool none = c >= width || sigma[best] == 0;
      const T left = none ? 0 : root / std::sqrt(sigma[best]), right = none ? 0 : root * std::sqrt(sigma[best]);
      for (int64_t i = 0; i < layer.k_out; ++i) u[i] = none ? 0 : left * y[(best * layer.k_out + i) * lanes];
      for (int64_t i = 0; i < layer.k_in; ++i) v[i] = none ? 0 : right * q[(best * layer.k_in + i) * lanes];
      if (c < width) sigma[best] = sigma[best] != sigma[best] ? sigma[best] : T{-1};
    }
  }
};

}  // namespace

template <typename T>
void factor_rows(const Rows& rows, int64_t n, const Factored& layers, T* out, int n_threads) {
  if (n == 0 || layers.factors == 0) return;
  const Products<T>& kernels = lgk::kernels<T>();
  Job<T> job = {kernels, lgk::factor_kernels<T>(), rows, n, layers, nullptr, out, 0, 0};
  int64_t longest = 0, widest = 0;
  for (const FactoredLayer& layer : layers.layers) {
    const int64_t width = width_of(layer, layers.rank);
    job.most_numbers = std::max(job.most_numbers, layer.size());
    job.most_vectors = std::max(job.most_vectors, width * std::max(layer.k_out, layer.k_in));
    longest = std::max(longest, layer.k_in);
    widest = std::max(widest, width);
  }
  const Buffer<T> start(longest * widest);
  for (int64_t i = 0; i < longest * widest; ++i) start.data()[i] = start_number<T>(static_cast<uint64_t>(i));
  job.start = start.data();
  n_threads = threads_for(double(n) * layers.columns * widest * kIterations, n_threads);
  const int64_t size = round_up(job.scratch_size(), kCacheLine);
  const Buffer<T> scratch(size * n_threads);
  const int64_t batches = ceil_div(n, job.batch());

#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
  for (int64_t task = 0; task < batches * static_cast<int64_t>(layers.layers.size()); ++task) {
    job.factor(layers.layers[task / batches], task % batches * job.batch(),
               scratch.data() + size * omp_get_thread_num());
  }
}

template void factor_rows<float>(const Rows&, int64_t, const Factored&, float*, int);
template void factor_rows<double>(const Rows&, int64_t, const Factored&, double*, int);

}  // namespace lgk::factor_rows
