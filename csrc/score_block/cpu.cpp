#include "score_block/cpu.h"

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

}  // namespace lgk::score_block
