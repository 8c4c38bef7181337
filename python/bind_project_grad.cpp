#include <pybind11/stl.h>

#include "arguments.h"
#include "fast_call.h"
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

// One call with everything checked.
struct Call {
  project_grad::Side x, dy;
  Rows weights;
  project_grad::Shape shape;

  Call(const Positions& x_tensor, const Positions& dy_tensor, const std::optional<Matrix>& p_in,
       const std::optional<Matrix>& p_out, const std::optional<Positions>& weight_tensor, Address offsets,
       int64_t samples, int64_t length, int64_t rows, int64_t d_in, int64_t d_out, int64_t k_in, int64_t k_out) {
    const char* op = "project_grad";
    check_sizes(op, {rows, d_in});
    check_sizes(op, {rows, d_out});
    check_sizes(op, {k_in, d_in});
    check_sizes(op, {k_out, d_out});
    check_sizes(op, {samples, length});
    check_sizes(op, {samples, k_out, k_in});
    const auto* cuts = reinterpret_cast<const int64_t*>(offsets);
    if (cuts != nullptr) check_offsets(op, cuts, samples, rows);
    LGK_CHECK(cuts != nullptr || samples * length == rows, "project_grad: samples * length must be rows");
    x = side_of(op, x_tensor, p_in, d_in, k_in);
    dy = side_of(op, dy_tensor, p_out, d_out, k_out);
    weights = weight_tensor ? rows_of(op, *weight_tensor) : Rows{};
    check_side(op, x, wide());
    check_side(op, dy, wide());
    LGK_CHECK(!weight_tensor || weights.dtype == (wide() ? Dtype::kF64 : Dtype::kF32),
              "project_grad: weights must be fp32, or fp64 for fp64 dy");
    shape = {samples, length, cuts, d_in, d_out, k_in, k_out};
  }

  bool wide() const { return dy.positions.dtype == Dtype::kF64; }

  void run(Address out, bool add, int n_threads) {
    check_threads("project_grad", n_threads);
    shape.add = add;
    py::gil_scoped_release unlocked;
    if (wide()) {
      project_grad::project_grad(x, dy, weights, reinterpret_cast<double*>(out), shape, n_threads);
    } else {
      project_grad::project_grad(x, dy, weights, reinterpret_cast<float*>(out), shape, n_threads);
    }
  }
};

// What `project_grad_adder` returns.
PyObject* add(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  int64_t number[7];
  if (!read_numbers("project_grad_adder", arguments, count, number)) return nullptr;
  Call call = prepared<Call>(self);
  call.x.positions.data = reinterpret_cast<const void*>(number[0]);
  Rows& dy = call.dy.positions;
  dy = matrix(reinterpret_cast<const void*>(number[1]), dy.dtype, number[2], number[3]);
  dy = beside(dy, call.dy.has_projection ? call.dy.projection : dy);
  return none_of([&] { call.run(static_cast<Address>(number[4]), number[5] != 0, static_cast<int>(number[6])); });
}

PyMethodDef kAdd = {"project_grad_add", fast(add), METH_FASTCALL, nullptr};

}  // namespace

void bind_project_grad(py::module_& m) {
  m.def(
      "project_grad",
      [](const Positions& x, const Positions& dy, const std::optional<Matrix>& p_in, const std::optional<Matrix>& p_out,
         const std::optional<Positions>& weights, Address offsets, Address out, int64_t samples, int64_t length,
         int64_t rows, int64_t d_in, int64_t d_out, int64_t k_in, int64_t k_out, int n_threads) {
        Call(x, dy, p_in, p_out, weights, offsets, samples, length, rows, d_in, d_out, k_in, k_out)
            .run(out, false, n_threads);
      },
      py::arg("x"), py::arg("dy"), py::arg("p_in"), py::arg("p_out"), py::arg("weights"), py::arg("offsets"),
      py::arg("out"), py::arg("samples"), py::arg("length"), py::arg("rows"), py::arg("d_in"), py::arg("d_out"),
      py::arg("k_in"), py::arg("k_out"), py::arg("n_threads"));

  m.def(
      "project_grad_adder",
      [](const Positions& x, const Positions& dy, const std::optional<Matrix>& p_in, const std::optional<Matrix>& p_out,
         int64_t samples, int64_t length, int64_t d_in, int64_t d_out, int64_t k_in, int64_t k_out) {
        return bound(&kAdd, new Call(x, dy, p_in, p_out, std::nullopt, 0, samples, length, samples * length, d_in,
                                     d_out, k_in, k_out));
      },
      "f(x, dy, dy_row, dy_column, out, add, n_threads): project_grad without weights and offsets, checked once for "
      "many"
      " batches; dy is a matrix of rows.",
      py::arg("x"), py::arg("dy"), py::arg("p_in"), py::arg("p_out"), py::arg("samples"), py::arg("length"),
      py::arg("d_in"), py::arg("d_out"), py::arg("k_in"), py::arg("k_out"));
}
