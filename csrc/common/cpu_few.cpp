#include <omp.h>

#include <algorithm>

#include "common/buffer.h"
#include "common/few.h"
#include "common/kernels.h"
#include "common/threads.h"

namespace lgk {
namespace {

constexpr int64_t kTaskBytes = 2 << 20;  // of rows
constexpr int64_t kTaskSums = 1024;      // rows times columns of b at most
constexpr int64_t kCopiedRows = 16;      // of a task, where rows are copied
constexpr int64_t kDotRunsOfOne = 4;     // runs of a single column that are read before the next row is

template <typename T>
FewColumns<T> columns_of(const Products<T>& of_dtypes, int64_t n, int64_t depth) {
  const Products<T>& products = of_dtypes.dot != nullptr ? of_dtypes : kernels<T>();
  FewColumns<T> columns = {products, n, depth, kDotRun};
  columns.run *= std::max<int64_t>(1, kDotRunsOfOne / columns.width);
  return columns;
}

template <typename T>
struct Few {
  FewColumns<T> columns;
  Rows a;
  const T* packed;
  Output<T> c;

  const Products<T>& products() const { return columns.products; }
  bool in_place() const { return a.column_stride == 1 && !a.rounded; }
  int64_t task_rows(int64_t m, int n_threads) const {
    const int64_t most = in_place() ? kTaskSums / columns.width : kCopiedRows;
    const int64_t large = kTaskBytes / (columns.depth * dtype_bytes(a.dtype));
    return round_up(std::min(std::clamp(large, kCopiedRows, most), ceil_div(m, 4 * n_threads)), kDotRows);
  }
  int64_t sums_size(int64_t task) const { return task * columns.width * products().lanes; }
  int64_t scratch_size(int64_t task) const { return sums_size(task) + (in_place() ? 0 : task * columns.longest()); }

  void multiply(int64_t row, int64_t rows, T* sums, T* copy) const {
    const Rows copied = matrix(copy, products().dtype, columns.longest() * products().terms, 1);
    for (int64_t k = 0; k < columns.depth; k += columns.run_numbers()) {
      const int64_t here = std::min(columns.run_numbers(), columns.depth - k);
      if (!in_place()) products().pack_rows(a, row, rows, k, here, copy, columns.longest());
      products().dot(in_place() ? a : copied, in_place() ? row : 0, rows, in_place() ? k : 0, here,
                     packed + columns.offset(k), columns.ld(), columns.width, sums, k > 0);
    }
    const int64_t lanes = products().lanes;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns.n; ++j) {
        c.data[(row + i) * c.row_stride + j * c.column_stride] =
            sum_of_lanes(sums + (i * columns.width + j) * lanes, lanes);
      }
    }
  }
};

}  // namespace

template <typename T>
Buffer<T> lay_out_few(const Products<T>& products, const Rows& b, int64_t n, int64_t depth) {
  return columns_of(products, n, depth).lay_out(b);
}

template <typename T>
void multiply_few(const Products<T>& products, const Rows& a, int64_t m, const T* laid_out, int64_t n, int64_t depth,
                  Output<T> c, int n_threads) {
  const Few<T> few = {columns_of(products, n, depth), a, laid_out, c};
  n_threads = threads_for(double(m) * depth * kFew, n_threads);
  const int64_t task = few.task_rows(m, n_threads), size = round_up(few.scratch_size(task), products.lanes);
  const Buffer<T> scratch(size * n_threads);

#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
  for (int64_t i = 0; i < m; i += task) {
    T* sums = scratch.data() + size * omp_get_thread_num();
    few.multiply(i, std::min(task, m - i), sums, sums + few.sums_size(task));
  }
}

template Buffer<float> lay_out_few(const Products<float>&, const Rows&, int64_t, int64_t);
template Buffer<double> lay_out_few(const Products<double>&, const Rows&, int64_t, int64_t);
template void multiply_few(const Products<float>&, const Rows&, int64_t, const float*, int64_t, int64_t, Output<float>,
                           int);
template void multiply_few(const Products<double>&, const Rows&, int64_t, const double*, int64_t, int64_t,
                           Output<double>, int);

}  // namespace lgk
