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

int64_t width_of(int64_t columns) {
  int64_t width = 1;
  while (width < columns) width *= 2;
  return width;
}

template <typename T>
struct Few {
  const Kernels<T>& kernels;
  Rows a;
  const T* packed;  // b
  int64_t ldb, n, width, depth;
  Output<T> c;

  // What is used again for each row stays in the L2 cache.
  int64_t run() const { return kDotRun * std::max<int64_t>(1, kDotRunsOfOne / width); }
  bool in_place() const { return a.column_stride == 1 && !a.rounded; }
  int64_t task_rows(int64_t m, int n_threads) const {
    const int64_t most = in_place() ? kTaskSums / width : kCopiedRows;
    const int64_t large = kTaskBytes / (depth * dtype_bytes(a.dtype));
    return round_up(std::min(std::clamp(large, kCopiedRows, most), ceil_div(m, 4 * n_threads)), kDotRows);
  }
  int64_t sums_size(int64_t task) const { return task * width * kernels.lanes; }
  int64_t scratch_size(int64_t task) const { return sums_size(task) + (in_place() ? 0 : task * std::min(ldb, run())); }

  void multiply(int64_t row, int64_t rows, T* sums, T* copy) const {
    const int64_t ld = std::min(ldb, run());
    const Rows copied = matrix(copy, sizeof(T) == sizeof(double) ? Dtype::kF64 : Dtype::kF32, ld, 1);
    for (int64_t k = 0; k < depth; k += run()) {
      const int64_t here = std::min(run(), depth - k);
      if (!in_place()) kernels.pack_rows(a, row, rows, k, here, copy, ld);
      kernels.dot(in_place() ? a : copied, in_place() ? row : 0, rows, in_place() ? k : 0, here, packed + k, ldb, width,
                  sums, k > 0);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        c.data[(row + i) * c.row_stride + j * c.column_stride] =
            sum_of_lanes(sums + (i * width + j) * kernels.lanes, kernels.lanes);
      }
    }
  }
};

}  // namespace

template <typename T>
Buffer<T> lay_out_few(const Rows& b, int64_t n, int64_t depth) {
  const Kernels<T>& kernels = lgk::kernels<T>();
  const int64_t ldb = round_up(depth, kernels.lanes), width = width_of(n);
  Buffer<T> packed(round_up(width, kernels.row_tile) * ldb);
  kernels.pack_rows(b, 0, n, 0, depth, packed.data(), ldb);
  std::fill(packed.data() + n * ldb, packed.data() + width * ldb, T{0});
  return packed;
}

template <typename T>
void multiply_few(const Rows& a, int64_t m, const T* laid_out, int64_t n, int64_t depth, Output<T> c, int n_threads) {
  const Kernels<T>& kernels = lgk::kernels<T>();
  n_threads = threads_for(double(m) * depth * kFew, n_threads);
  const int64_t ldb = round_up(depth, kernels.lanes);
  const Few<T> few = {kernels, a, laid_out, ldb, n, width_of(n), depth, c};
  const int64_t task = few.task_rows(m, n_threads), size = round_up(few.scratch_size(task), kernels.lanes);
  const Buffer<T> scratch(size * n_threads);

#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
  for (int64_t i = 0; i < m; i += task) {
    T* sums = scratch.data() + size * omp_get_thread_num();
    few.multiply(i, std::min(task, m - i), sums, sums + few.sums_size(task));
  }
}

template Buffer<float> lay_out_few<float>(const Rows&, int64_t, int64_t);
template Buffer<double> lay_out_few<double>(const Rows&, int64_t, int64_t);
template void multiply_few<float>(const Rows&, int64_t, const float*, int64_t, int64_t, Output<float>, int);
template void multiply_few<double>(const Rows&, int64_t, const double*, int64_t, int64_t, Output<double>, int);

}  // namespace lgk
