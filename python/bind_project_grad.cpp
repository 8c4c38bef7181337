#include <pybind11/stl.h>

#include "arguments.h"
#include "project_grad/cpu.h"

namespace py = pybind11;
using namespace lgk;

namespace {

project_grad::Side side_of(const char* op, const Positions& positions, const std::optional<Matrix>& projection,
                           int64_t d, int64_t k) {
  LGK_CHECK(projection || d == k, "project_grad: d " + std::to_string(d) + " and k " + std::to_string(k) +
                                      " must be equal for a side without a projection");
  const Rows rows = rows_of(op, positions);
  if (!projection) return {rows, Rows{}, false};
  const Rows p = rows_of(op, *projection);
  return {beside(rows, p), p, true};
}

void check_side(const char* op, const project_grad::Side& side, bool wide) {
  LGK_CHECK((side.positions.dtype == Dtype::kF64) == wide &&
                (!side.has_projection || (side.projection.dtype == Dtype::kF64) == wide),
            std::string(op) + ": fp64 does not mix with other dtypes");
}

void check_offsets(const char* op, const int64_t* offsets, int64_t samples, int64_t rows) {
  LGK_CHECK(offsets[0] >= 0 && offsets[samples] <= rows,
            std::string(op) + ": offsets must stay within 0.." + std::to_string(rows));
  for (int64_t n = 0; n < samples; ++n) {
    LGK_CHECK(offsets[n] <= offsets[n + 1], std::string(op) + ": offsets must not decrease");
  }
}

}  // namespace

void bind_project_grad(py::module_& m) {
  m.def(
      "project_grad",
      [](const Positions& x, const Positions& dy, const std::optional<Matrix>& p_in, const std::optional<Matrix>& p_out,
         const std::optional<Positions>& weight_tensor, Address offsets, Address out, int64_t samples, int64_t length,
         int64_t rows, int64_t d_in, int64_t d_out, int64_t k_in, int64_t k_out, int n_threads) {
        const char* op = "project_grad";
        check_sizes(op, {rows, d_in});
        check_sizes(op, {rows, d_out});
        check_sizes(op, {k_in, d_in});
        check_sizes(op, {k_out, d_out});
        check_sizes(op, {samples, length});
        check_sizes(op, {samples, k_out, k_in});
        check_threads(op, n_threads);
        const auto* cuts = reinterpret_cast<const int64_t*>(offsets);
        if (cuts != nullptr) check_offsets(op, cuts, samples, rows);
        LGK_CHECK(cuts != nullptr || samples * length == rows, "project_grad: samples * length must be rows");
        const project_grad::Side in = side_of(op, x, p_in, d_in, k_in), gradient = side_of(op, dy, p_out, d_out, k_out);
        const Rows weights = weight_tensor ? rows_of(op, *weight_tensor) : Rows{};
        const bool wide = gradient.positions.dtype == Dtype::kF64;
        check_side(op, in, wide);
        check_side(op, gradient, wide);
        LGK_CHECK(!weight_tensor || weights.dtype == (wide ? Dtype::kF64 : Dtype::kF32),
                  "project_grad: weights must be fp32, or fp64 for fp64 dy");
        const project_grad::Shape shape = {samples, length, cuts, d_in, d_out, k_in, k_out};
        py::gil_scoped_release unlocked;
        if (wide) {
          project_grad::project_grad(in, gradient, weights, reinterpret_cast<double*>(out), shape, n_threads);
        } else {
          project_grad::project_grad(in, gradient, weights, reinterpret_cast<float*>(out), shape, n_threads);
        }
      },
      py::arg("x"), py::arg("dy"), py::arg("p_in"), py::arg("p_out"), py::arg("weights"), py::arg("offsets"),
      py::arg("out"), py::arg("samples"), py::arg("length"), py::arg("rows"), py::arg("d_in"), py::arg("d_out"),
      py::arg("k_in"), py::arg("k_out"), py::arg("n_threads"));
}
