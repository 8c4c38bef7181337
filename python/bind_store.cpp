#include <pybind11/stl.h>

#include <cstring>

#include "arguments.h"
#include "store/pages.h"
#include "store/take.h"

namespace py = pybind11;
using namespace lgk;

void bind_store(py::module_& m) {
  m.def(
      "populate",
      [](Address address, int64_t bytes, int n_threads) {
        check_sizes("populate", {bytes});
        check_threads("populate", n_threads);
        py::gil_scoped_release unlocked;
        return store::populate(reinterpret_cast<const void*>(address), bytes, n_threads);
      },
      py::arg("address"), py::arg("bytes"), py::arg("n_threads"),
      "Wait until a mapped range is in memory; 0, or the errno of a failed read.");
  m.def(
      "resident",
      [](Address address, int64_t bytes) {
        check_sizes("resident", {bytes});
        return store::resident(reinterpret_cast<const void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), "Whether a sample of a mapped range is in memory.");
  m.def(
      "let_go",
      [](Address address, int64_t bytes) {
        check_sizes("let_go", {bytes});
        py::gil_scoped_release unlocked;
        store::let_go(reinterpret_cast<const void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), "Take the whole pages of a mapped range out of the page table.");
  m.def(
      "gather",
      [](const std::vector<std::pair<Address, int64_t>>& parts, Address out, int64_t room) {
        int64_t count = 0;
        for (const auto& [address, bytes] : parts) {
          check_sizes("gather", {bytes});
          count += bytes;
        }
        LGK_CHECK(count <= room, "gather: " + std::to_string(count) + " bytes for a room of " + std::to_string(room));
        py::gil_scoped_release unlocked;
        auto* to = reinterpret_cast<char*>(out);
        for (const auto& [address, bytes] : parts) {
          std::memcpy(to, reinterpret_cast<const void*>(address), bytes);
          to += bytes;
        }
        return count;
      },
      py::arg("parts"), py::arg("out"), py::arg("room"), "Copy byte ranges one after the other; their total.");
  m.def(
      "take_rows",
      [](Address source, int64_t stride, Address out, int dtype, int64_t rows, int64_t d) {
        const char* op = "take_rows";
        check_sizes(op, {rows, d});
        const Dtype to = dtype_of(op, dtype);
        LGK_CHECK(to == Dtype::kF32 || to == Dtype::kBF16, "take_rows: rows are taken as fp32 or bf16");
        const auto* from = reinterpret_cast<const float*>(source);
        py::gil_scoped_release unlocked;
        return to == Dtype::kF32 ? store::take_fp32(from, stride, reinterpret_cast<float*>(out), rows, d)
                                 : store::take_bf16(from, stride, reinterpret_cast<uint16_t*>(out), rows, d);
      },
      py::arg("source"), py::arg("stride"), py::arg("out"), py::arg("dtype"), py::arg("rows"), py::arg("d"),
      "out = source, rows of fp32 `stride` apart; whether every number is finite, before and after.");
}
