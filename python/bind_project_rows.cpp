#include "arguments.h"
#include "project_rows/cpu.h"

namespace py = pybind11;
using namespace lgk;

void bind_project_rows(py::module_& m) {
  m.def(
      "project_rows",
      [](const Positions& x_tensor, const Matrix& p_tensor, Address out, int64_t rows, int64_t d, int64_t k,
         int n_threads) {
        const char* op = "project_rows";
        check_sizes(op, {rows, d});
        check_sizes(op, {k, d});
        check_sizes(op, {rows, k});
        check_threads(op, n_threads);
        const Rows p = rows_of(op, p_tensor), x = beside(rows_of(op, x_tensor), p);
        const bool wide = is_double(op, {x.dtype, p.dtype});
        const project_rows::Shape shape = {rows, d, k};
        py::gil_scoped_release unlocked;
        if (wide) {
          project_rows::project_rows(x, p, reinterpret_cast<double*>(out), shape, n_threads);
        } else {
          project_rows::project_rows(x, p, reinterpret_cast<float*>(out), shape, n_threads);
        }
      },
      py::arg("x"), py::arg("p"), py::arg("out"), py::arg("rows"), py::arg("d"), py::arg("k"), py::arg("n_threads"));
}
