#include "accumulate_gram/cpu.h"
#include "arguments.h"

namespace py = pybind11;
using namespace lgk;

void bind_accumulate_gram(py::module_& m) {
  m.def(
      "accumulate_gram",
      [](const Matrix& g_tensor, Address out, int64_t rows, int64_t d, int n_threads) {
        const char* op = "accumulate_gram";
        check_sizes(op, {rows, d});
        check_sizes(op, {d, d});
        check_threads(op, n_threads);
        const Rows g = rows_of(op, g_tensor);
        const bool wide = is_double(op, {g.dtype});
        const accumulate_gram::Shape shape = {rows, d};
        py::gil_scoped_release unlocked;
        if (wide) {
          accumulate_gram::accumulate_gram(g, reinterpret_cast<double*>(out), shape, n_threads);
        } else {
          accumulate_gram::accumulate_gram(g, reinterpret_cast<float*>(out), shape, n_threads);
        }
      },
      py::arg("g"), py::arg("out"), py::arg("rows"), py::arg("d"), py::arg("n_threads"));
}
