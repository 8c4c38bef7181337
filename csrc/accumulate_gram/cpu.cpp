#include "accumulate_gram/cpu.h"

#include <omp.h>

#include <algorithm>

#include "common/amx.h"
#include "common/buffer.h"
#include "common/kernels.h"
#include "common/threads.h"

namespace lgk::accumulate_gram {
namespace {

constexpr int64_t kMostBlock = 192;  // side of a block of out: two packed panels and their product fit the L2 cache
constexpr int64_t kTinyDim = 512;    // up to so many columns, each thread packs all rows itself
constexpr int64_t kLeastShare = 64;  // if it multiplies them by so many columns
constexpr int64_t kMostStep = 48;    // rows of out that are computed at a time, where they are added to in place
constexpr int64_t kLeastBlock = 48;  // below this, packing costs more than a second thread gains

// The upper triangle of out in square blocks, in row-major order.
struct Triangle {
  int64_t d, block;

  int64_t side() const { return ceil_div(d, block); }
  int64_t tasks() const { return side() * (side() + 1) / 2; }
  void locate(int64_t task, int64_t* i, int64_t* j) const {
    int64_t row = 0;
    for (; task >= side() - row; ++row) task -= side() - row;
    *i = row * block;
    *j = (row + task) * block;
  }
};

Triangle cut(int64_t d, int n_threads) {
  Triangle triangle = {d, kMostBlock};
  while (triangle.block > kLeastBlock && triangle.tasks() < 4 * n_threads) triangle.block /= 2;
  return triangle;
}

template <typename T>
struct Tile {
  const Products<T>& products;
  int64_t ld;
  T *left, *right, *sum;

  static int64_t row_length(const Products<T>& products, int64_t block) { return round_up(block, products.lanes) + 16; }
  static int64_t size(int64_t ld, int64_t block) { return (2 * (kPanel + 8) + block + 8) * ld; }

  void add(const Rows& g, Shape shape, int64_t i, int64_t j, int64_t block, T* out) const {
    const int64_t rows = std::min(block, shape.d - i), columns = std::min(block, shape.d - j);
    const int64_t step = kPanel * products.terms;
    for (int64_t start = 0; start < shape.rows; start += step) {
      const int64_t depth = std::min(step, shape.rows - start);
      const int64_t panel = start / step % kPanelsPerRun;
      products.pack_terms(g, start, depth, i, rows, left, ld);
      if (i != j) products.pack_terms(g, start, depth, j, columns, right, ld);
      products.outer(left, ld, rows, i == j ? left : right, ld, columns, ceil_div(depth, products.terms), sum, ld,
                     panel > 0);
      if (panel == kPanelsPerRun - 1 || start + depth == shape.rows) flush(shape.d, i, j, rows, columns, out);
    }
  }

  void flush(int64_t d, int64_t i, int64_t j, int64_t rows, int64_t columns, T* out) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) out[(i + r) * d + j + c] += sum[r * ld + c];
    }
    if (i != j) mirror(d, i, j, rows, columns, out);
  }

  void mirror(int64_t d, int64_t i, int64_t j, int64_t rows, int64_t columns, T* out) const {
    const Rows sums = matrix(sum, sizeof(T) == sizeof(double) ? Dtype::kF64 : Dtype::kF32, ld, 1);
    const Products<T>& kernels = lgk::kernels<T>();
    const int64_t step = 2 * kernels.lanes;
    T *transposed = left, *scratch = right;
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t count = std::min(step, rows - r), width = round_up(count, kernels.lanes);
      for (int64_t c = 0; c < columns; c += kPanel) {
        const int64_t here = std::min(kPanel, columns - c);
        kernels.pack_columns(sums, r, count, c, here, transposed, scratch);
        for (int64_t k = 0; k < here; ++k) {
          T* to = out + (j + c + k) * d + i + r;
          for (int64_t n = 0; n < count; ++n) to[n] += transposed[k * width + n];
        }
      }
    }
  }
};

// A few rows: writing out is what takes time, so that each number of it is computed where it lies and none is mirrored.
template <typename T>
void add_in_place(const Products<T>& products, const Rows& g, T* out, Shape shape, int n_threads) {
  const int64_t ld = Tile<T>::row_length(products, shape.d), terms = products.terms;
  const int64_t step = std::min(products.row_block, kMostStep);
  const int64_t slice = products.row_tile * terms;
  // Two threads of a tiny job wait for each other, and for what the other has packed, longer than packing all takes.
  const bool apart = n_threads > 1 && shape.d <= kTinyDim && kLeastShare * n_threads <= shape.d;
  const int64_t size = round_up(shape.rows, slice) / terms * ld;
  const Buffer<T> scratch(size * (apart ? n_threads : 1));
  const auto pack = [&](int64_t row, T* packed) {
    products.pack_terms(g, row, std::min(slice, shape.rows - row), 0, shape.d, packed + row / terms * ld, ld);
  };
#pragma omp parallel num_threads(n_threads)
  {
    const TileScope tiles;
    T* packed = scratch.data() + (apart ? size * omp_get_thread_num() : 0);
    if (apart) {
      for (int64_t r = 0; r < shape.rows; r += slice) pack(r, packed);
    } else {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < shape.rows; r += slice) pack(r, packed);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < shape.d; i += step) {
      products.outer(packed + i, ld, std::min(step, shape.d - i), packed, ld, shape.d, ceil_div(shape.rows, terms),
                     out + i * shape.d, shape.d, true);
    }
  }
}

}  // namespace

template <typename T>
void accumulate_gram(const Rows& g, T* out, Shape shape, int n_threads) {
  if (shape.rows == 0 || shape.d == 0) return;
  const Products<T>& products = lgk::products<T>(g.dtype, g.dtype);
  n_threads = threads_for(double(shape.rows) * shape.d * shape.d / 2, n_threads);
  const bool few = ceil_div(shape.rows, products.terms) <= products.few_terms;
  if (few && shape.d % products.lanes == 0) return add_in_place(products, g, out, shape, n_threads);
  const Triangle triangle = cut(shape.d, n_threads);
  const int64_t ld = Tile<T>::row_length(products, triangle.block), size = Tile<T>::size(ld, triangle.block);
  const Buffer<T> scratch(size * n_threads);

#pragma omp parallel num_threads(n_threads)
  {
    const TileScope tiles;
    T* mine = scratch.data() + size * omp_get_thread_num();
    const Tile<T> tile = {products, ld, mine, mine + (kPanel + 8) * ld, mine + 2 * (kPanel + 8) * ld};
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < triangle.tasks(); ++task) {
      int64_t i, j;
      triangle.locate(task, &i, &j);
      tile.add(g, shape, i, j, triangle.block, out);
    }
  }
}

template void accumulate_gram<float>(const Rows&, float*, Shape, int);
template void accumulate_gram<double>(const Rows&, double*, Shape, int);

}  // namespace lgk::accumulate_gram
