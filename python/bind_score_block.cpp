#include "encoded.h"
#include "score_block/cpu.h"

namespace py = pybind11;
using namespace lgk;

namespace {

// `count` rows for which the scorer's scores are wanted, at a stride between queries that holds them.
void check_block(const score_block::Scorer& scorer, int64_t count, int64_t stride, int n_threads) {
  const char* op = "score_block";
  check_sizes(op, {count, scorer.d()});
  check_sizes(op, {scorer.queries(), stride});
  LGK_CHECK(count <= stride, "score_block: the scores of " + std::to_string(count) + " rows do not fit a stride of " +
                                 std::to_string(stride));
  check_threads(op, n_threads);
}

}  // namespace

void bind_score_block(py::module_& m) {
  py::class_<score_block::Scorer>(m, "Scorer")
      .def(py::init([](const Matrix& query_tensor, int64_t n_queries, int64_t d) {
             check_sizes("score_block", {n_queries, d});
             const Rows queries = rows_of("score_block", query_tensor);
             LGK_CHECK(queries.dtype != Dtype::kF64, "score_block: queries of a scorer are fp32, bf16 or fp16");
             return std::make_unique<score_block::Scorer>(queries, n_queries, d);
           }),
           py::arg("queries"), py::arg("n_queries"), py::arg("d"))
      .def(
          "score",
          [](score_block::Scorer& scorer, const Encoded& row_tensor, int64_t count, Address out, int64_t stride,
             int digits, int n_threads) {
            check_block(scorer, count, stride, n_threads);
            check_digits("score_block", digits);
            const EncodedRows rows = encoded_of("score_block", row_tensor);
            py::gil_scoped_release unlocked;
            scorer.score(rows, count, reinterpret_cast<float*>(out), stride, digits, n_threads);
          },
          py::arg("rows"), py::arg("count"), py::arg("out"), py::arg("stride"), py::arg("digits"),
          py::arg("n_threads"));

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
