#include "project_rows/cpu.h"

#include "common/product.h"

namespace lgk::project_rows {

template <typename T>
void project_rows(const Rows& x, const Rows& p, T* out, Shape shape, int n_threads) {
  multiply_rows<T>(x, shape.rows, p, shape.k, shape.d, {out, shape.k, 1}, n_threads);
}

void project_rows_rounded(const Rows& x, const Rows& p, uint16_t* out, Shape shape, int n_threads) {
  multiply_rows_rounded(x, shape.rows, p, shape.k, shape.d, out, n_threads);
}

template void project_rows<float>(const Rows&, const Rows&, float*, Shape, int);
template void project_rows<double>(const Rows&, const Rows&, double*, Shape, int);

}  // namespace lgk::project_rows
