#include <omp.h>

#include <algorithm>
#include <cstring>

#include "common/amx.h"
#include "common/block.h"
#include "common/buffer.h"
#include "common/few.h"
#include "common/kernels.h"
#include "common/product.h"
#include "common/threads.h"

namespace lgk {
namespace {

constexpr int64_t kRun = kPanelsPerRun * kPanel;
// Columns of b that are packed at a time, which bounds the packed copy to kColumns * kRun numbers.
constexpr int64_t kColumns = 256;
constexpr double kPacking = 4;  // multiply-adds that take as long as laying a number out

template <typename T>
void add_tile(const T* tile, int64_t ld, int64_t rows, int64_t columns, Output<T> c, bool add) {
  if (c.column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      T* out = c.data + i * c.row_stride;
      for (int64_t j = 0; j < columns; ++j) out[j] = add ? out[j] + tile[i * ld + j] : tile[i * ld + j];
    }
    return;
  }
  for (int64_t j = 0; j < columns; ++j) {
    T* out = c.data + j * c.column_stride;
    for (int64_t i = 0; i < rows; ++i) {
      T& to = out[i * c.row_stride];
      to = add ? to + tile[i * ld + j] : tile[i * ld + j];
    }
  }
}

// To the nearest, and to even.
uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t nearest = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest);
}

template <typename T>
void round_tile(const T* tile, int64_t ld, int64_t rows, int64_t columns, uint16_t* out, int64_t row_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * row_stride + j] = bf16_of(static_cast<float>(tile[i * ld + j]));
  }
}

// All n <= kColumns columns as multiply_tiles reads them.
template <typename T>
Buffer<T> lay_out_tiles(const Products<T>& products, const Rows& b, int64_t n, int64_t depth, int n_threads) {
  Buffer<T> packed(Block<T>{products, b, 0, n, 0, depth, nullptr}.packed_size());
  const Block<T> block = {products, b, 0, n, 0, depth, packed.data()};
  const int64_t scratch_size = products.lanes * kTileLd;
  n_threads = threads_for(kPacking * n * depth, n_threads);
  const Buffer<T> scratch(scratch_size * n_threads);
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t task = 0; task < block.pack_tasks(); ++task) {
    block.pack(task, scratch.data() + scratch_size * omp_get_thread_num());
  }
  return packed;
}

// laid_out: what lay_out_tiles made of b, or null. Only one run of at most kColumns columns is rounded.
template <typename T>
void multiply_tiles(const Rows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<T> c, int n_threads,
                    T* laid_out) {
  const Products<T>& products = lgk::products<T>(a.number(), b.number());
  n_threads = threads_for(double(m) * n * depth, n_threads);
  const int64_t tile = tile_rows(m, products.tile_step, n_threads), run = kRun * products.terms;
  const Block<T> widest = {products, b, 0, std::min(n, kColumns), 0, std::min(depth, run), nullptr};
  const int64_t ld = widest.padded() + products.lanes, strip_size = widest.scratch_size(tile);
  const int64_t scratch_size = round_up(strip_size + round_up(tile, products.row_tile) * ld, products.lanes);
  const Buffer<T> packed(laid_out == nullptr ? widest.packed_size() : 0), scratch(scratch_size * n_threads);

#pragma omp parallel num_threads(n_threads)
  {
    const TileScope tiles;
    T* strip = scratch.data() + scratch_size * omp_get_thread_num();
    T* c_tile = strip + strip_size;
    for (int64_t j = 0; j < n; j += kColumns) {
      for (int64_t k = 0; k < depth; k += run) {
        T* to = laid_out == nullptr ? packed.data() : laid_out + widest.padded() * (k / products.terms);
        const Block<T> block = {products, b, j, std::min(kColumns, n - j), k, std::min(run, depth - k), to};
        if (laid_out == nullptr) {
#pragma omp for schedule(static)
          for (int64_t task = 0; task < block.pack_tasks(); ++task) block.pack(task, strip);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < m; i += tile) {
          const int64_t rows = std::min(tile, m - i);
          if (c.rounded != nullptr) {
            block.multiply(a, i, rows, strip, c_tile, ld);
            round_tile(c_tile, ld, rows, block.columns, c.rounded + i * c.row_stride, c.row_stride);
            continue;
          }
          const Output<T> to = {c.data + i * c.row_stride + j * c.column_stride, c.row_stride, c.column_stride};
          if (k == 0 && to.column_stride == 1 && block.fills(rows)) {
            block.multiply(a, i, rows, strip, to.data, to.row_stride);
          } else {
            block.multiply(a, i, rows, strip, c_tile, ld);
            add_tile<T>(c_tile, ld, rows, block.columns, to, k > 0);
          }
        }
      }
    }
  }
}

}  // namespace

template <typename T>
LaidOut<T>::LaidOut(const Rows& b, int64_t n, int64_t depth, Dtype a, int n_threads)
    : b_(b), n_(n), depth_(depth), a_(a) {
  if (n == 0 || n > kColumns || depth == 0) return;
  const Products<T>& products = lgk::products<T>(a, b.number());
  laid_out_ = std::make_unique<Buffer<T>>(n <= products.few ? lay_out_few(products, b, n, depth)
                                                            : lay_out_tiles<T>(products, b, n, depth, n_threads));
}

template <typename T>
void LaidOut<T>::multiply(const Rows& a, int64_t m, int64_t first, int64_t n, Output<T> c, int n_threads) const {
  if (laid_out_ == nullptr || m == 0 || n != n_ || a.number() != a_) {
    return multiply_rows(a, m, b_.from(first), n, depth_, c, n_threads);
  }
  const Products<T>& products = lgk::products<T>(a_, b_.number());
  if (n <= products.few) return multiply_few(products, a, m, laid_out_->data(), n, depth_, c, n_threads);
  multiply_tiles(a, m, b_, n, depth_, c, n_threads, laid_out_->data());
}

template <typename T>
void multiply_rows(const Rows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<T> c, int n_threads) {
  if (m == 0 || n == 0) return;
  if (depth == 0) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) c.data[i * c.row_stride + j * c.column_stride] = 0;
    }
    return;
  }
  const Products<T>& products = lgk::products<T>(a.number(), b.number());
  if (n <= products.few) {
    return multiply_few(products, a, m, lay_out_few(products, b, n, depth).data(), n, depth, c, n_threads);
  }
  if (n <= m) return multiply_tiles<T>(a, m, b, n, depth, c, n_threads, nullptr);
  multiply_tiles<T>(b, n, a, m, depth, {c.data, c.column_stride, c.row_stride}, n_threads, nullptr);
}

void multiply_rows_rounded(const Rows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, uint16_t* c,
                           int n_threads) {
  const Products<float>& products = lgk::products<float>(a.number(), b.number());
  if (depth > 0 && depth <= kRun * products.terms && products.few < n && n <= std::min(m, kColumns)) {
    return multiply_tiles<float>(a, m, b, n, depth, {nullptr, n, 1, c}, n_threads, nullptr);
  }
  const Buffer<float> whole(m * n);
  multiply_rows<float>(a, m, b, n, depth, {whole.data(), n, 1}, n_threads);
  round_tile(whole.data(), n, m, n, c, n);
}

template class LaidOut<float>;
template void multiply_rows<float>(const Rows&, int64_t, const Rows&, int64_t, int64_t, Output<float>, int);
template void multiply_rows<double>(const Rows&, int64_t, const Rows&, int64_t, int64_t, Output<double>, int);

}  // namespace lgk
