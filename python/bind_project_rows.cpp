#include "arguments.h"
#include "fast_call.h"
#include "project_rows/cpu.h"

namespace py = pybind11;
using namespace lgk;

namespace {

// One call with everything checked.
struct RowsCall {
  Rows x, p;
  project_rows::Shape shape;
  bool wide, rounded;

  RowsCall(const Positions& x_tensor, const Matrix& p_tensor, int64_t rows, int64_t d, int64_t k, bool rounded = false)
      : rounded(rounded) {
    const char* op = "project_rows";
    check_sizes(op, {rows, d});
    check_sizes(op, {k, d});
    check_sizes(op, {rows, k});
    p = rows_of(op, p_tensor);
    x = beside(rows_of(op, x_tensor), p);
    wide = is_double(op, {x.dtype, p.dtype});
    LGK_CHECK(!(wide && rounded), "project_rows: fp64 is not rounded to bf16");
    shape = {rows, d, k};
  }

  void run(Address out, int n_threads) const {
    check_threads("project_rows", n_threads);
    py::gil_scoped_release unlocked;
    if (rounded) {
      project_rows::project_rows_rounded(x, p, reinterpret_cast<uint16_t*>(out), shape, n_threads);
    } else if (wide) {
      project_rows::project_rows(x, p, reinterpret_cast<double*>(out), shape, n_threads);
    } else {
      project_rows::project_rows(x, p, reinterpret_cast<float*>(out), shape, n_threads);
    }
  }
};

// What `row_projector` returns.
PyObject* project_rows_of(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  int64_t number[3];
  if (!read_numbers("row_projector", arguments, count, number)) return nullptr;
  RowsCall call = prepared<RowsCall>(self);
  call.x.data = reinterpret_cast<const void*>(number[0]);
  return none_of([&] { call.run(static_cast<Address>(number[1]), static_cast<int>(number[2])); });
}

PyMethodDef kProjectRows = {"project_rows", fast(project_rows_of), METH_FASTCALL, nullptr};

}  // namespace

void bind_project_rows(py::module_& m) {
  m.def(
      "project_rows",
      [](const Positions& x, const Matrix& p, Address out, int64_t rows, int64_t d, int64_t k, int n_threads) {
        RowsCall(x, p, rows, d, k).run(out, n_threads);
      },
      py::arg("x"), py::arg("p"), py::arg("out"), py::arg("rows"), py::arg("d"), py::arg("k"), py::arg("n_threads"));

  m.def(
      "row_projector",
      [](const Positions& x, const Matrix& p, int64_t rows, int64_t d, int64_t k, bool rounded) {
        return bound(&kProjectRows, new RowsCall(x, p, rows, d, k, rounded));
      },
      "f(x, out, n_threads): project_rows, checked once for many x of these sizes and strides; rounded to bf16 if "
      "asked.",
      py::arg("x"), py::arg("p"), py::arg("rows"), py::arg("d"), py::arg("k"), py::arg("rounded"));
}
