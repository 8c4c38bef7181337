// Queries laid out once for products with any number of blocks of rows in one format.
#pragma once
#include <memory>
#include <vector>

#include "common/buffer.h"
#include "common/product.h"
#include "encoded/rows.h"

namespace lgk {

struct IntegerQueries;

// b's rows 0 .. n - 1, of `depth` numbers, as multiply_encoded of encoded/product.h takes them. b is read by multiply
// too, unless all of it could be laid out.
class EncodedQueries {
 public:
  static constexpr int64_t kAtOnce = 256;  // queries that are multiplied at a time, at most

  EncodedQueries(const Rows& b, int64_t n, int64_t depth, const Encoding& encoding, int digits, int n_threads);
  ~EncodedQueries();

  // c[i][j] = sum_k a[i][k] b[first + j][k] for i < m, j < n; `first` is a multiple of kAtOnce.
  void multiply(const EncodedRows& a, int64_t m, int64_t first, int64_t n, Output<float> c, int n_threads) const;

 private:
  Rows b_;
  int64_t depth_, at_once_;
  std::unique_ptr<Buffer<float>> rounded_;
  std::vector<std::unique_ptr<IntegerQueries>> groups_;  // of at_once_ queries; null: fp32 products
};

}  // namespace lgk
