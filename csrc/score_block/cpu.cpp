#include "score_block/cpu.h"

#include "common/check.h"
#include "common/product.h"
#include "encoded/product.h"

namespace lgk::score_block {

template <typename T>
void score_block(const Rows& queries, const Rows& rows, T* out, Shape shape, int n_threads) {
  multiply_rows<T>(rows, shape.rows, queries, shape.queries, shape.d, {out, 1, shape.rows}, n_threads);
}

template void score_block<float>(const Rows&, const Rows&, float*, Shape, int);
template void score_block<double>(const Rows&, const Rows&, double*, Shape, int);

void score_encoded(const Rows& queries, const EncodedRows& rows, float* out, Shape shape, int digits, int n_threads) {
  multiply_encoded(rows, shape.rows, queries, shape.queries, shape.d, {out, 1, shape.rows}, digits, n_threads);
}

void Scorer::score(const EncodedRows& rows, int64_t count, float* out, int64_t stride, int digits, int n_threads) {
  if (laid_out_ == nullptr) {
    laid_out_ = std::make_unique<EncodedQueries>(queries_, n_queries_, d_, rows.encoding, digits, n_threads);
    encoding_ = rows.encoding;
    digits_ = digits;
  }
  LGK_CHECK(rows.encoding.code == encoding_.code && rows.encoding.block == encoding_.block && digits == digits_,
            "score_block: the rows of a scorer must all have one format");
  laid_out_->multiply(rows, count, 0, n_queries_, {out, 1, stride}, n_threads);
}

}  // namespace lgk::score_block
