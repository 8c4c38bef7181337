#include "dequantize_rows/cpu.h"
#include "encoded.h"

namespace py = pybind11;
using namespace lgk;

void bind_dequantize_rows(py::module_& m) {
  m.def(
      "dequantize_rows",
      [](const Encoded& encoded, Address out, int64_t rows, int64_t d, int n_threads) {
        const char* op = "dequantize_rows";
        check_sizes(op, {rows, d});
        check_threads(op, n_threads);
        const EncodedRows from = encoded_of(op, encoded);
        py::gil_scoped_release unlocked;
        dequantize_rows::dequantize_rows(from, reinterpret_cast<float*>(out), {rows, d}, n_threads);
      },
      py::arg("encoded"), py::arg("out"), py::arg("rows"), py::arg("d"), py::arg("n_threads"));
}
