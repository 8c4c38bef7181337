#include <pybind11/stl.h>

#include "encoded.h"
#include "score_topk/cpu.h"

namespace py = pybind11;
using namespace lgk;

namespace {

Rows scale_of(const char* op, const std::optional<Matrix>& tensor) {
  const Rows scale = tensor ? rows_of(op, *tensor) : Rows{};
  LGK_CHECK(!tensor || scale.dtype == Dtype::kF32, std::string(op) + ": row_scale must be fp32");
  return scale;
}

// A block's rows, their factors and how many they are.
template <typename T>
using Added = std::tuple<T, std::optional<Matrix>, int64_t>;

template <typename T>
void check_room(const char* op, const score_topk::Search& search, const std::vector<Added<T>>& blocks, int n_threads) {
  int64_t left = search.left();
  for (const auto& block : blocks) {
    const int64_t count = std::get<2>(block);
    check_sizes(op, {count, search.shape().d});
    LGK_CHECK(count <= left, std::string(op) + ": more rows than were announced");
    left -= count;
  }
  check_threads(op, n_threads);
}

}  // namespace

void bind_score_topk(py::module_& m) {
  py::class_<score_topk::Search>(m, "Search")
      .def(py::init([](const Matrix& query_tensor, int64_t n_queries, int64_t n_rows, int64_t d, int64_t k,
                       bool largest) {
             const char* op = "score_topk";
             check_sizes(op, {n_queries, d});
             check_sizes(op, {n_queries, k});
             LGK_CHECK(k >= std::min<int64_t>(1, n_rows) && k <= n_rows,
                       "score_topk: k " + std::to_string(k) + " is not in 1.." + std::to_string(n_rows));
             const Rows queries = rows_of(op, query_tensor);
             LGK_CHECK(queries.dtype != Dtype::kF64, "score_topk: queries of a search are fp32, bf16 or fp16");
             return std::make_unique<score_topk::Search>(queries, score_topk::Shape{n_queries, n_rows, d, k, largest});
           }),
           py::arg("queries"), py::arg("n_queries"), py::arg("n_rows"), py::arg("d"), py::arg("k"), py::arg("largest"))
      .def(
          "add",
          [](score_topk::Search& search, const std::vector<Added<Matrix>>& blocks, int n_threads) {
            const char* op = "score_topk";
            check_room(op, search, blocks, n_threads);
            for (const auto& [rows, scale, count] : blocks) {
              LGK_CHECK(rows_of(op, rows).dtype != Dtype::kF64, "score_topk: rows of a search are fp32, bf16 or fp16");
              scale_of(op, scale);
            }
            py::gil_scoped_release unlocked;
            for (const auto& [rows, scale, count] : blocks) {
              search.add(rows_of(op, rows), count, scale_of(op, scale), n_threads);
            }
          },
          py::arg("blocks"), py::arg("n_threads"))
      .def(
          "add_encoded",
          [](score_topk::Search& search, const std::vector<Added<Encoded>>& blocks, int digits, int n_threads) {
            const char* op = "score_topk";
            check_room(op, search, blocks, n_threads);
            check_digits(op, digits);
            for (const auto& [rows, scale, count] : blocks) {
              encoded_of(op, rows);
              scale_of(op, scale);
            }
            py::gil_scoped_release unlocked;
            for (const auto& [rows, scale, count] : blocks) {
              search.add(encoded_of(op, rows), count, scale_of(op, scale), digits, n_threads);
            }
          },
          py::arg("blocks"), py::arg("digits"), py::arg("n_threads"))
      .def("found", &score_topk::Search::found)
      .def(
          "write",
          [](const score_topk::Search& search, Address values, Address indices, int n_threads) {
            check_threads("score_topk", n_threads);
            py::gil_scoped_release unlocked;
            search.write(reinterpret_cast<float*>(values), reinterpret_cast<int64_t*>(indices), n_threads);
          },
          py::arg("values"), py::arg("indices"), py::arg("n_threads"));

  m.def(
      "score_topk",
      [](const Matrix& query_tensor, const Matrix& row_tensor, const std::optional<Matrix>& scale_tensor,
         Address values, Address indices, int64_t n_queries, int64_t n_rows, int64_t d, int64_t k, bool largest,
         int n_threads) {
        const char* op = "score_topk";
        check_sizes(op, {n_queries, d});
        check_sizes(op, {n_rows, d});
        check_sizes(op, {n_queries, k});
        check_threads(op, n_threads);
        LGK_CHECK(k >= std::min<int64_t>(1, n_rows) && k <= n_rows,
                  "score_topk: k " + std::to_string(k) + " is not in 1.." + std::to_string(n_rows));
        const Rows queries = rows_of(op, query_tensor), rows = rows_of(op, row_tensor);
        const Rows scale = scale_tensor ? rows_of(op, *scale_tensor) : Rows{};
        const bool wide = is_double(op, {queries.dtype, rows.dtype});
        LGK_CHECK(!scale_tensor || scale.dtype == (wide ? Dtype::kF64 : Dtype::kF32),
                  "score_topk: row_scale must be fp32, or fp64 for fp64 rows");
        const score_topk::Shape shape = {n_queries, n_rows, d, k, largest};
        auto* index = reinterpret_cast<int64_t*>(indices);
        py::gil_scoped_release unlocked;
        if (wide) {
          score_topk::score_topk(queries, rows, scale, reinterpret_cast<double*>(values), index, shape, n_threads);
        } else {
          score_topk::score_topk(queries, rows, scale, reinterpret_cast<float*>(values), index, shape, n_threads);
        }
      },
      py::arg("queries"), py::arg("rows"), py::arg("row_scale"), py::arg("values"), py::arg("indices"),
      py::arg("n_queries"), py::arg("n_rows"), py::arg("d"), py::arg("k"), py::arg("largest"), py::arg("n_threads"));
  m.def(
      "score_topk_encoded",
      [](const Matrix& query_tensor, const Encoded& encoded, const std::optional<Matrix>& scale_tensor, Address values,
         Address indices, int64_t n_queries, int64_t n_rows, int64_t d, int64_t k, bool largest, int digits,
         int n_threads) {
        const char* op = "score_topk";
        check_sizes(op, {n_queries, d});
        check_sizes(op, {n_rows, d});
        check_sizes(op, {n_queries, k});
        check_threads(op, n_threads);
        check_digits(op, digits);
        LGK_CHECK(k >= std::min<int64_t>(1, n_rows) && k <= n_rows,
                  "score_topk: k " + std::to_string(k) + " is not in 1.." + std::to_string(n_rows));
        const Rows queries = rows_of(op, query_tensor);
        const Rows scale = scale_tensor ? rows_of(op, *scale_tensor) : Rows{};
        LGK_CHECK(queries.dtype != Dtype::kF64, "score_topk: queries on encoded rows are fp32, bf16 or fp16");
        LGK_CHECK(!scale_tensor || scale.dtype == Dtype::kF32, "score_topk: row_scale must be fp32");
        const EncodedRows rows = encoded_of(op, encoded);
        py::gil_scoped_release unlocked;
        score_topk::score_encoded(queries, rows, scale, reinterpret_cast<float*>(values),
                                  reinterpret_cast<int64_t*>(indices), {n_queries, n_rows, d, k, largest}, digits,
                                  n_threads);
      },
      py::arg("queries"), py::arg("rows"), py::arg("row_scale"), py::arg("values"), py::arg("indices"),
      py::arg("n_queries"), py::arg("n_rows"), py::arg("d"), py::arg("k"), py::arg("largest"), py::arg("digits"),
      py::arg("n_threads"));
}
