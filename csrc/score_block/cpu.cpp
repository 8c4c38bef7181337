#include "score_block/cpu.h"

#include "common/product.h"

namespace lgk::score_block {

template <typename T>
void score_block(const Rows& queries, const Rows& rows, T* out, Shape shape, int n_threads) {
  multiply_rows<T>(rows, shape.rows, queries, shape.queries, shape.d, {out, 1, shape.rows}, n_threads);
}

template void score_block<float>(const Rows&, const Rows&, float*, Shape, int);
template void score_block<double>(const Rows&, const Rows&, double*, Shape, int);

}  // namespace lgk::score_block
