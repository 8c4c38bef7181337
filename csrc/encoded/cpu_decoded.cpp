#include <omp.h>

#include <algorithm>

#include "common/block.h"
#include "common/buffer.h"
#include "common/few.h"
#include "common/kernels.h"
#include "common/threads.h"
#include "encoded/kernels.h"
#include "encoded/product.h"

namespace lgk {
namespace {

constexpr int64_t kRun = 8192;             // numbers of a row for which b is packed at a time
constexpr int64_t kStrip = 512;            // numbers of a row that are decoded at a time
constexpr int64_t kStripLd = kStrip + 16;  // rows a power of 2 apart would share cache sets
constexpr int64_t kColumns = 256;
constexpr int64_t kTaskRows = 16;            // rows that are decoded for few columns before the next run is
constexpr int64_t kTaskBytes = 1 << 20;      // of rows that are not
constexpr int64_t kTaskSums = 1024;          // rows times columns of b at most
constexpr int64_t kColumnBytes = 256 << 10;  // of b that such rows meet before its next columns: part of an L2 cache

struct Run {
  const Products<float>& products;
  Rows b;
  int64_t column, columns, start, depth;
  float* packed;

  int64_t strips() const { return ceil_div(depth, kStrip); }
  int64_t length(int64_t strip) const { return std::min(kStrip, depth - strip * kStrip); }
  Block<float> block(int64_t strip, int64_t depth_start) const {
    return {products,
            b,
            column,
            columns,
            depth_start,
            length(strip),
            packed + round_up(columns, products.lanes) * strip * kStrip};
  }
};

void multiply_wide(const EncodedRows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<float> c,
                   int n_threads) {
  const EncodedKernels& kernels = encoded_kernels();
  const Products<float>& products = lgk::products<float>(Dtype::kF32, Dtype::kF32);
  n_threads = threads_for(double(m) * n * depth, n_threads);
  const int64_t tile = round_up(tile_rows(m, products.tile_step, n_threads), products.row_tile);
  const Run widest = {products, b, 0, std::min(n, kColumns), 0, std::min(depth, kRun), nullptr};
  const int64_t ld = round_up(widest.columns, products.lanes) + products.lanes;
  const int64_t sums_size = tile * ld;
  const int64_t pack_size = std::max(widest.block(0, 0).scratch_size(tile), tile * kStripLd);
  const int64_t scratch_size = round_up(pack_size + 2 * sums_size, kCacheLine);
  const Buffer<float> packed(round_up(widest.columns, products.lanes) * round_up(widest.depth, kStrip));
  const Buffer<float> scratch(scratch_size * n_threads);

#pragma omp parallel num_threads(n_threads)
  {
    float* decoded = scratch.data() + scratch_size * omp_get_thread_num();
    float *sums = decoded + pack_size, *more = sums + sums_size;
    for (int64_t j = 0; j < n; j += kColumns) {
      for (int64_t k = 0; k < depth; k += kRun) {
        const Run run = {products, b, j, std::min(kColumns, n - j), k, std::min(kRun, depth - k), packed.data()};
#pragma omp for schedule(dynamic)
        for (int64_t strip = 0; strip < run.strips(); ++strip) {
          const Block<float> block = run.block(strip, k + strip * kStrip);
          for (int64_t task = 0; task < block.pack_tasks(); ++task) block.pack(task, decoded);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < m; i += tile) {
          const int64_t rows = std::min(tile, m - i), padded = round_up(rows, products.row_tile);
          for (int64_t strip = 0; strip < run.strips(); ++strip) {
            const int64_t length = run.length(strip);
            for (int64_t r = 0; r < padded; ++r) {
              float* to = decoded + r * kStripLd;
              if (r < rows) {
                kernels.decode(a, i + r, k + strip * kStrip, length, to);
              } else {
                std::fill(to, to + length, 0.0f);
              }
            }
            run.block(strip, 0).multiply(matrix(decoded, Dtype::kF32, kStripLd, 1), 0, padded, nullptr,
                                         strip == 0 ? sums : more, ld);
            for (int64_t x = 0; strip > 0 && x < rows * ld; ++x) sums[x] += more[x];
          }
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t q = 0; q < run.columns; ++q) {
              float& to = c.data[(i + r) * c.row_stride + (j + q) * c.column_stride];
              to = k > 0 ? to + sums[r * ld + q] : sums[r * ld + q];
            }
          }
        }
      }
    }
  }
}

// For few columns: rows decoded into the registers or the cache, a run at a time, and multiplied there.
struct Narrow {
  const EncodedRows& a;
  int64_t m;
  FewColumns<float> columns;
  const float* packed;
  Output<float> c;
  const EncodedKernels& decoder = encoded_kernels();
  int64_t width = columns.width, lanes = columns.products.lanes;

  static auto fused(const EncodedRows& a) {
    return a.encoding.code == Code::kF8 ? encoded_kernels().few_f8 : encoded_kernels().few_codes;
  }
  static FewColumns<float> columns_of(const EncodedRows& a, int64_t n, int64_t depth) {
    const Products<float>& products = lgk::kernels<float>();
    const int64_t chain = kDotChain * products.lanes;
    FewColumns<float> columns = {products, n, depth, chain};
    if (fused(a) != nullptr) columns.run = std::max(chain, kColumnBytes / (4 * columns.width) / chain * chain);
    return columns;
  }
  int64_t ld() const { return columns.ld(); }
  int64_t task_rows(int n_threads) const {
    const int64_t large = std::clamp(kTaskBytes / columns.depth, kTaskRows, kTaskSums / width);
    return round_up(std::min(fused(a) != nullptr ? large : kTaskRows, ceil_div(m, 4 * n_threads)), kDotRows);
  }
  int64_t sums_size(int64_t task) const { return task * width * lanes; }
  int64_t scratch_size(int64_t task) const { return sums_size(task) + (fused(a) != nullptr ? 0 : kDotRows * ld()); }

  void multiply(int64_t row, int64_t rows, float* sums, float* decoded) const {
    for (int64_t k = 0; k < columns.depth; k += columns.run) {
      const int64_t here = std::min(columns.run, columns.depth - k);
      const float* b = packed + columns.offset(k);
      if (const auto run = fused(a)) {
        run(a, row, rows, k, here, b, ld(), width, sums, k > 0);
        continue;
      }
      for (int64_t r = 0; r < rows; r += kDotRows) {
        const int64_t count = std::min(kDotRows, rows - r);
        for (int64_t x = 0; x < count; ++x) decoder.decode(a, row + r + x, k, here, decoded + x * ld());
        columns.products.dot(matrix(decoded, Dtype::kF32, ld(), 1), 0, count, 0, here, b, ld(), width,
                             sums + r * width * lanes, k > 0);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns.n; ++j) {
        c.data[(row + r) * c.row_stride + j * c.column_stride] = sum_of_lanes(sums + (r * width + j) * lanes, lanes);
      }
    }
  }
};

void multiply_narrow(const EncodedRows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<float> c,
                     int n_threads) {
  n_threads = threads_for(double(m) * depth * kFewColumns, n_threads);
  const FewColumns<float> columns = Narrow::columns_of(a, n, depth);
  const Buffer<float> packed = columns.lay_out(b);
  const Narrow narrow = {a, m, columns, packed.data(), c};
  const int64_t task = narrow.task_rows(n_threads), size = round_up(narrow.scratch_size(task), kCacheLine);
  const Buffer<float> scratch(size * n_threads);

#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
  for (int64_t i = 0; i < m; i += task) {
    float* sums = scratch.data() + size * omp_get_thread_num();
    narrow.multiply(i, std::min(task, m - i), sums, sums + narrow.sums_size(task));
  }
}

}  // namespace

void multiply_decoded(const EncodedRows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<float> c,
                      int n_threads) {
  if (n <= kFewColumns) return multiply_narrow(a, m, b, n, depth, c, n_threads);
  multiply_wide(a, m, b, n, depth, c, n_threads);
}

}  // namespace lgk
