#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "arguments.h"
#include "store/ids.h"
#include "store/pages.h"
#include "store/take.h"
#include "store/writes.h"

namespace py = pybind11;
using namespace lgk;

namespace {

using ByteRanges = std::vector<std::pair<Address, int64_t>>;

template <typename Out>
bool taken(bool (*take)(const float*, int64_t, const store::Pieces<Out>&, int64_t), const float* source, int64_t stride,
           const ByteRanges& out, int64_t rows, int64_t d) {
  store::Pieces<Out> pieces;
  int64_t room = 0;
  for (const auto& [address, bytes] : out) {
    check_sizes("take_rows", {bytes});
    LGK_CHECK(address % sizeof(Out) == 0 && bytes % sizeof(Out) == 0, "take_rows: a number is cut in two");
    pieces.emplace_back(reinterpret_cast<Out*>(address), bytes / static_cast<int64_t>(sizeof(Out)));
    room += pieces.back().second;
  }
  LGK_CHECK(room == rows * d,
            "take_rows: " + std::to_string(room) + " places for " + std::to_string(rows * d) + " numbers");
  py::gil_scoped_release unlocked;
  return take(source, stride, pieces, d);
}

// The UTF-8 bytes of a list of str, which the list keeps alive.
std::vector<std::string_view> strings_of(const py::list& ids) {
  std::vector<std::string_view> found;
  found.reserve(ids.size());
  for (const py::handle id : ids) {
    if (!PyUnicode_Check(id.ptr())) throw py::type_error("logra_kernels: an id is not a str");
    Py_ssize_t bytes = 0;
    const char* data = PyUnicode_AsUTF8AndSize(id.ptr(), &bytes);
    if (data == nullptr) throw py::error_already_set();
    found.emplace_back(data, bytes);
  }
  return found;
}

// Strings as Arrow has them: n + 1 offsets into their bytes.
std::vector<std::string_view> strings_at(Address offsets, Address data, int64_t n) {
  check_sizes("IdTable", {n});
  const auto* from = reinterpret_cast<const int32_t*>(offsets);
  const auto* bytes = reinterpret_cast<const char*>(data);
  std::vector<std::string_view> found;
  found.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    LGK_CHECK(0 <= from[i] && from[i] <= from[i + 1], "IdTable: offsets go down");
    found.emplace_back(bytes + from[i], from[i + 1] - from[i]);
  }
  return found;
}

// Their bytes one after the other; n + 1 offsets into them, as Arrow has strings. None when these are too many for it.
py::object packed(const py::list& ids, Address offsets, int64_t room) {
  const auto strings = strings_of(ids);
  LGK_CHECK(room == static_cast<int64_t>(strings.size()) + 1, "pack_strings: n + 1 offsets are needed");
  auto* ends = reinterpret_cast<int32_t*>(offsets);
  int64_t total = *ends++ = 0;
  for (const std::string_view string : strings) {
    total += static_cast<int64_t>(string.size());
    if (total > std::numeric_limits<int32_t>::max()) return py::none();
    *ends++ = static_cast<int32_t>(total);
  }
  auto bytes = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, total));
  if (!bytes) throw py::error_already_set();
  char* to = PyBytes_AS_STRING(bytes.ptr());
  for (const std::string_view string : strings) to = std::copy(string.begin(), string.end(), to);
  return bytes;
}

void bind_ids(py::module_& m) {
  m.def("pack_strings", packed, py::arg("strings"), py::arg("offsets"), py::arg("room"),
        "Bytes of a list of str one after the other, and n + 1 int32 offsets; None when these are too many.");
  py::class_<store::IdTable>(m, "IdTable", "Distinct strings and the place of each in the order they came.")
      .def(py::init<>())
      .def("__len__", &store::IdTable::size)
      .def(
          "find",
          [](const store::IdTable& table, const py::list& ids, Address places, int64_t room) {
            const auto strings = strings_of(ids);
            LGK_CHECK(room == static_cast<int64_t>(strings.size()), "IdTable: find needs a place for each id");
            table.find(strings, reinterpret_cast<int64_t*>(places));
          },
          py::arg("ids"), py::arg("places"), py::arg("room"), "int64 places of the ids, -1 for those not there.")
      .def(
          "add", [](store::IdTable& table, const py::list& ids) { return table.add(strings_of(ids)); }, py::arg("ids"),
          "Give them the next places; -1, or the index of one that is there or comes twice, and then none has one.")
      .def(
          "add_arrow",
          [](store::IdTable& table, Address offsets, Address data, int64_t n) {
            const auto strings = strings_at(offsets, data, n);
            return table.add(strings);
          },
          py::arg("offsets"), py::arg("data"), py::arg("n"), "`add` of an Arrow array's int32 offsets and bytes.")
      .def(
          "add_new",
          [](store::IdTable& table, Address offsets, Address data, int64_t n, Address fresh) {
            table.add_new(strings_at(offsets, data, n), reinterpret_cast<bool*>(fresh));
          },
          py::arg("offsets"), py::arg("data"), py::arg("n"), py::arg("new"),
          "Give the next places to those of an Arrow array that are not there; for each, whether it was one.")
      .def(
          "drop",
          [](store::IdTable& table, int64_t count) {
            LGK_CHECK(0 <= count && count <= table.size(), "IdTable: drop of more ids than there are");
            table.drop(count);
          },
          py::arg("count"), "Forget those that came last.");
}

void bind_writes(py::module_& m) {
  py::class_<store::Writes>(m, "Writes", "Writes of files by a thread of their own, one after the other.")
      .def(py::init<>())
      .def(
          "add",
          [](store::Writes& writes, int fd, Address data, int64_t bytes, int64_t offset) {
            check_sizes("Writes", {bytes, offset});
            return writes.add(fd, reinterpret_cast<const void*>(data), bytes, offset);
          },
          py::arg("fd"), py::arg("data"), py::arg("bytes"), py::arg("offset"),
          "Queue bytes, which must stay as they are, for a file from `offset` on; the write's number.")
      .def("wait", &store::Writes::wait, py::arg("number"), py::call_guard<py::gil_scoped_release>(),
           "Return once the write is done: 0, or its errno.");
}

}  // namespace

void bind_store(py::module_& m) {
  bind_ids(m);
  bind_writes(m);
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
      [](const ByteRanges& parts, Address out, int64_t room) {
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
      [](Address source, int64_t stride, const ByteRanges& out, int dtype, int64_t rows, int64_t d) {
        const char* op = "take_rows";
        check_sizes(op, {rows, d});
        const Dtype to = dtype_of(op, dtype);
        LGK_CHECK(to == Dtype::kF32 || to == Dtype::kBF16, "take_rows: rows are taken as fp32 or bf16");
        const auto* from = reinterpret_cast<const float*>(source);
        return to == Dtype::kF32 ? taken(store::take_fp32, from, stride, out, rows, d)
                                 : taken(store::take_bf16, from, stride, out, rows, d);
      },
      py::arg("source"), py::arg("stride"), py::arg("out"), py::arg("dtype"), py::arg("rows"), py::arg("d"),
      "out, byte ranges one after the other = source, rows of fp32 `stride` apart; whether every number is finite,"
      " before and after.");
  m.def(
      "largest_magnitude",
      [](Address source, int64_t stride, int64_t rows, int64_t d) {
        check_sizes("largest_magnitude", {rows, d});
        py::gil_scoped_release unlocked;
        return store::largest_magnitude(reinterpret_cast<const float*>(source), stride, rows, d);
      },
      py::arg("source"), py::arg("stride"), py::arg("rows"), py::arg("d"),
      "Of rows of fp32 `stride` apart; NaN if there is one.");
}
