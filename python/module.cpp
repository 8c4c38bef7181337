#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

// One translation unit: pybind11's headers cost more seconds a file than all the kernels.
#include "bind_accumulate_gram.cpp"
#include "bind_dequantize_rows.cpp"
#include "bind_factor_rows.cpp"
#include "bind_project_grad.cpp"
#include "bind_project_rows.cpp"
#include "bind_quantize_rows.cpp"
#include "bind_score_block.cpp"
#include "bind_score_factored.cpp"
#include "bind_score_topk.cpp"
#include "bind_store.cpp"
#include "common/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Torch-free kernels of logra_kernels; arguments are raw addresses, checked by the Python caller.";
  m.def("isa", &lgk::isa_name,
        "The instruction set in use; ValueError if LOGRA_KERNELS_ISA names none of this machine's.");
  m.def("isas", &lgk::supported_isas, "The instruction sets this machine can run, slowest first.");
  m.def(
      "multiplies_bf16", [] { return lgk::products<float>(lgk::Dtype::kBF16, lgk::Dtype::kBF16).terms > 1; },
      "Whether the set in use multiplies bf16 itself: project_grad then rounds projected positions of bf16 sides.");
  bind_project_rows(m);
  bind_project_grad(m);
  bind_accumulate_gram(m);
  bind_quantize_rows(m);
  bind_dequantize_rows(m);
  bind_score_block(m);
  bind_score_topk(m);
  bind_store(m);
  bind_factor_rows(m);
  bind_score_factored(m);
}
