#include <pybind11/stl.h>

#include "arguments.h"
#include "factor_rows/cpu.h"

namespace py = pybind11;
using namespace lgk;

void bind_factor_rows(py::module_& m) {
  m.def(
      "factor_rows",
      [](const Matrix& row_tensor, const LayerSizes& sizes, int64_t rank, Address out, int64_t n, int n_threads) {
        const char* op = "factor_rows";
        const Factored layers = factored_of(op, sizes, rank);
        check_sizes(op, {n, layers.columns});
        check_sizes(op, {n, layers.factors});
        check_threads(op, n_threads);
        const Rows rows = rows_of(op, row_tensor);
        const bool wide = is_double(op, {rows.dtype});
        py::gil_scoped_release unlocked;
        if (wide) {
          factor_rows::factor_rows(rows, n, layers, reinterpret_cast<double*>(out), n_threads);
        } else {
          factor_rows::factor_rows(rows, n, layers, reinterpret_cast<float*>(out), n_threads);
        }
      },
      py::arg("rows"), py::arg("sizes"), py::arg("rank"), py::arg("out"), py::arg("n"), py::arg("n_threads"));
}
