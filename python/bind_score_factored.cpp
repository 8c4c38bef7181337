#include <pybind11/stl.h>

#include "arguments.h"
#include "encoded.h"
#include "score_factored/cpu.h"

namespace py = pybind11;
using namespace lgk;

namespace {

Factored checked_factors(const char* op, const LayerSizes& sizes, int64_t rank, int64_t align,
                         const score_factored::Shape& shape, int n_threads) {
  const Factored layers = factored_of(op, sizes, rank, align);
  check_sizes(op, {shape.queries, layers.columns});
  check_sizes(op, {shape.rows, layers.factors});
  check_sizes(op, {shape.queries, shape.rows});
  check_threads(op, n_threads);
  return layers;
}

}  // namespace

void bind_score_factored(py::module_& m) {
  m.def(
      "score_factored",
      [](const Matrix& query_tensor, const Matrix& factor_tensor, const LayerSizes& sizes, int64_t rank, int64_t align,
         Address out, int64_t n_queries, int64_t n_rows, int n_threads) {
        const char* op = "score_factored";
        const Factored layers = checked_factors(op, sizes, rank, align, {n_queries, n_rows}, n_threads);
        const Rows queries = rows_of(op, query_tensor), factors = rows_of(op, factor_tensor);
        const bool wide = is_double(op, {queries.dtype, factors.dtype});
        const score_factored::Shape shape = {n_queries, n_rows};
        py::gil_scoped_release unlocked;
        if (wide) {
          score_factored::score_factored(queries, factors, layers, reinterpret_cast<double*>(out), shape, n_threads);
        } else {
          score_factored::score_factored(queries, factors, layers, reinterpret_cast<float*>(out), shape, n_threads);
        }
      },
      py::arg("queries"), py::arg("factors"), py::arg("sizes"), py::arg("rank"), py::arg("align"), py::arg("out"),
      py::arg("n_queries"), py::arg("n_rows"), py::arg("n_threads"));
  m.def(
      "score_factored_encoded",
      [](const Matrix& query_tensor, const Encoded& encoded, const LayerSizes& sizes, int64_t rank, int64_t align,
         Address out, int64_t n_queries, int64_t n_rows, int n_threads) {
        const char* op = "score_factored";
        const Factored layers = checked_factors(op, sizes, rank, align, {n_queries, n_rows}, n_threads);
        const Rows queries = rows_of(op, query_tensor);
        LGK_CHECK(queries.dtype != Dtype::kF64, "score_factored: queries on encoded factors are fp32, bf16 or fp16");
        const EncodedRows factors = encoded_of(op, encoded);
        py::gil_scoped_release unlocked;
        score_factored::score_encoded(queries, factors, layers, reinterpret_cast<float*>(out), {n_queries, n_rows},
                                      n_threads);
      },
      py::arg("queries"), py::arg("factors"), py::arg("sizes"), py::arg("rank"), py::arg("align"), py::arg("out"),
      py::arg("n_queries"), py::arg("n_rows"), py::arg("n_threads"));
}
