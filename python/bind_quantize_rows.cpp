#include "encoded.h"
#include "quantize_rows/cpu.h"

namespace py = pybind11;
using namespace lgk;

void bind_quantize_rows(py::module_& m) {
  m.def(
      "quantize_rows",
      [](const Matrix& g_tensor, Address codes, Address scales, int64_t rows, int64_t d, int code, bool half_scales,
         int64_t block, bool stochastic, int64_t seed, int64_t first_row, int n_threads) {
        const char* op = "quantize_rows";
        check_sizes(op, {rows, d});
        check_threads(op, n_threads);
        const Rows g = rows_of(op, g_tensor);
        LGK_CHECK(!is_double(op, {g.dtype}), "quantize_rows: g must be fp32, bf16 or fp16");
        const Encoding encoding = encoding_of(op, code, half_scales, block);
        py::gil_scoped_release unlocked;
        return quantize_rows::quantize_rows(g, encoding, {stochastic, seed, first_row},
                                            reinterpret_cast<uint8_t*>(codes), reinterpret_cast<void*>(scales),
                                            {rows, d}, n_threads);
      },
      py::arg("g"), py::arg("codes"), py::arg("scales"), py::arg("rows"), py::arg("d"), py::arg("code"),
      py::arg("half_scales"), py::arg("block"), py::arg("stochastic"), py::arg("seed"), py::arg("first_row"),
      py::arg("n_threads"));
}
