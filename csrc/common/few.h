// Products of rows with few columns, at the speed of memory.
#pragma once
#include <algorithm>

#include "common/kernels.h"
#include "common/product.h"

namespace lgk {

// How a few columns are laid out, at most kFew, for `dot` or what else reads them so: run by run, so that those which
// are used together lie together, and not a power of two apart, where they would share cache sets.
template <typename T>
struct FewColumns {
  const Products<T>& products;
  int64_t n, depth;
  int64_t run;  // packed numbers, which are used again for each row: whole chains
  int64_t width = power_of_two(n);

  static int64_t power_of_two(int64_t least) {
    int64_t power = 1;
    while (power < least) power *= 2;
    return power;
  }
  int64_t run_numbers() const { return run * products.terms; }
  int64_t longest() const { return std::min(run, round_up(ceil_div(depth, products.terms), products.lanes)); }
  int64_t ld() const { return longest() + products.lanes; }
  int64_t offset(int64_t k) const { return k / run_numbers() * round_up(width, products.row_tile) * ld(); }
  int64_t size() const { return offset(round_up(depth, run_numbers())); }

  Buffer<T> lay_out(const Rows& b) const {
    Buffer<T> packed(size());
    for (int64_t k = 0; k < depth; k += run_numbers()) {
      T* to = packed.data() + offset(k);
      products.pack_rows(b, 0, n, k, std::min(run_numbers(), depth - k), to, ld());
      std::fill(to + n * ld(), to + width * ld(), T{0});
    }
    return packed;
  }
};

// b's rows 0 .. n - 1 as multiply_few reads them, 1 <= n <= kFew. `products` are those of the dtypes of a and b.
template <typename T>
Buffer<T> lay_out_few(const Products<T>& products, const Rows& b, int64_t n, int64_t depth);

// multiply_rows by what was laid out. Each row of a is read once, from where it lies.
template <typename T>
void multiply_few(const Products<T>& products, const Rows& a, int64_t m, const T* laid_out, int64_t n, int64_t depth,
                  Output<T> c, int n_threads);

// Adds the upper half of the lanes to the lower half until one is left.
template <int64_t kLanes, typename T>
T sum_of_lanes(const T* sums) {
  if constexpr (kLanes == 1) {
    return sums[0];
  } else {
    T half[kLanes / 2];
    for (int64_t i = 0; i < kLanes / 2; ++i) half[i] = sums[i] + sums[i + kLanes / 2];
    return sum_of_lanes<kLanes / 2>(half);
  }
}

// The same for as many lanes as a kernel's vectors have, 16 at most: each number is known to the compiler, as rows of
// one page are read in the time of a few such sums.
template <typename T>
T sum_of_lanes(const T* sums, int64_t lanes) {
  if (lanes == 16) return sum_of_lanes<16>(sums);
  if (lanes == 8) return sum_of_lanes<8>(sums);
  return lanes == 4 ? sum_of_lanes<4>(sums) : sum_of_lanes<2>(sums);
}

}  // namespace lgk
