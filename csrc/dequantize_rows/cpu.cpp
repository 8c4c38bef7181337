#include "dequantize_rows/cpu.h"

#include "common/threads.h"
#include "encoded/kernels.h"

namespace lgk::dequantize_rows {

void dequantize_rows(const EncodedRows& rows, float* out, Shape shape, int n_threads) {
  const EncodedKernels& kernels = encoded_kernels();
  n_threads = threads_for(double(shape.rows) * shape.d, n_threads);
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t row = 0; row < shape.rows; ++row) kernels.decode(rows, row, 0, shape.d, out + row * shape.d);
}

}  // namespace lgk::dequantize_rows
