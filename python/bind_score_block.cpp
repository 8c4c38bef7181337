#include "encoded.h"
#include "score_block/cpu.h"

namespace py = pybind11;
using namespace lgk;

void bind_score_block(py::module_& m) {
  m.def(
      "score_block",
      [](const Matrix& query_tensor, const Matrix& row_tensor, Address out, int64_t n_queries, int64_t n_rows,
         int64_t d, int n_threads) {
        const char* op = "score_block";
        check_sizes(op, {n_queries, d});
        check_sizes(op, {n_rows, d});
        check_sizes(op, {n_queries, n_rows});
        check_threads(op, n_threads);
        const Rows queries = rows_of(op, query_tensor), rows = rows_of(op, row_tensor);
        const bool wide = is_double(op, {queries.dtype, rows.dtype});
        const score_block::Shape shape = {n_queries, n_rows, d};
        py::gil_scoped_release unlocked;
        if (wide) {
          score_block::score_block(queries, rows, reinterpret_cast<double*>(out), shape, n_threads);
        } else {
          score_block::score_block(queries, rows, reinterpret_cast<float*>(out), shape, n_threads);
        }
      },
      py::arg("queries"), py::arg("rows"), py::arg("out"), py::arg("n_queries"), py::arg("n_rows"), py::arg("d"),
      py::arg("n_threads"));
  m.def(
      "score_block_encoded",
      [](const Matrix& query_tensor, const Encoded& encoded, Address out, int64_t n_queries, int64_t n_rows, int64_t d,
         int digits, int n_threads) {
        const char* op = "score_block";
        check_sizes(op, {n_queries, d});
        check_sizes(op, {n_rows, d});
        check_sizes(op, {n_queries, n_rows});
        check_threads(op, n_threads);
        check_digits(op, digits);
        const Rows queries = rows_of(op, query_tensor);
        LGK_CHECK(queries.dtype != Dtype::kF64, "score_block: queries on encoded rows are fp32, bf16 or fp16");
        const EncodedRows rows = encoded_of(op, encoded);
        py::gil_scoped_release unlocked;
        score_block::score_encoded(queries, rows, reinterpret_cast<float*>(out), {n_queries, n_rows, d}, digits,
                                   n_threads);
      },
      py::arg("queries"), py::arg("rows"), py::arg("out"), py::arg("n_queries"), py::arg("n_rows"), py::arg("d"),
      py::arg("digits"), py::arg("n_threads"));
}
