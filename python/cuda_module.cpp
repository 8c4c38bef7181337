// _C_cuda: the CUDA kernels. Imports where there is no driver; links neither torch nor the shared CUDA runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <variant>

#include "arguments.h"
#include "project_grad/cuda.h"
#include "score_block/cuda.h"
#include "score_topk/cuda.h"

namespace py = pybind11;
using namespace lgk;

namespace {

project_grad::Element element_of(int code) {
  LGK_CHECK(code >= 0 && code <= 2, "project_grad: dtype code " + std::to_string(code) + " has no CUDA kernel");
  return static_cast<project_grad::Element>(code);
}

Arch arch_of(const char* op, int code) {
  LGK_CHECK(code == 80 || code == 90, std::string(op) + ": arch must be 80 or 90");
  return static_cast<Arch>(code);
}

// positions as (address, dtype code, strides of sample, row and column), d, and the projection with its k.
project_grad::CudaSide side_of(int element, const std::tuple<Address, int, int64_t, int64_t, int64_t>& positions,
                               int64_t d, const std::optional<Matrix>& projection, int64_t k) {
  const auto& [data, dtype, sample_stride, row_stride, column_stride] = positions;
  LGK_CHECK(projection || d == k, "project_grad: d and k must be equal for a side without a projection");
  LGK_CHECK(dtype == element || (!projection && dtype == 0), "project_grad: positions must have the call's dtype");
  LGK_CHECK(!projection || std::get<1>(*projection) == element, "project_grad: factors must have the call's dtype");
  project_grad::CudaSide side = {};
  side.positions = reinterpret_cast<const void*>(data);
  side.sample_stride = sample_stride, side.row_stride = row_stride, side.column_stride = column_stride;
  if (projection) {
    side.projection = reinterpret_cast<const void*>(std::get<0>(*projection));
    side.projection_row_stride = std::get<2>(*projection), side.projection_column_stride = std::get<3>(*projection);
  }
  side.d = d, side.k = k, side.is_float = dtype == 0;
  return side;
}

// Codes, scales, format code, whether scales are fp16, block, bytes and scales between rows.
using Encoded = std::tuple<Address, Address, int, bool, int64_t, int64_t, int64_t>;

using Scored = std::variant<Matrix, Encoded>;

score_block::Operand operand_of(const char* op, const Scored& rows) {
  if (const auto* numbers = std::get_if<Matrix>(&rows)) return {rows_of(op, *numbers), {}};
  const auto& [codes, scales, code, half_scales, block, code_stride, scale_stride] = std::get<Encoded>(rows);
  LGK_CHECK(code >= 3 && code <= 7, std::string(op) + ": format code " + std::to_string(code) + " is unknown");
  LGK_CHECK(block >= 32 && (block & (block - 1)) == 0, std::string(op) + ": block must be a power of two from 32 on");
  return {{},
          {{static_cast<Code>(code), half_scales, block},
           reinterpret_cast<const uint8_t*>(codes),
           reinterpret_cast<const void*>(scales),
           code_stride,
           scale_stride}};
}

// The queries, the rows and how D is cut, checked.
score_block::CudaArgs scores_of(const char* op, const Scored& queries, const Scored& rows, Address partial,
                                int64_t query_count, int64_t row_count, int64_t d, int64_t piece, int64_t pieces) {
  check_sizes(op, {query_count, row_count, d});
  score_block::CudaArgs args = {};
  args.queries = operand_of(op, queries), args.rows = operand_of(op, rows);
  LGK_CHECK(args.queries.encoded.codes == nullptr ||
                args.queries.encoded.encoding.block >= std::min<int64_t>(args.rows.encoded.encoding.block, 128),
            std::string(op) + ": queries' scales reach less far than the rows'");
  const auto tile = score_block::tile(args.queries, args.rows, query_count);
  LGK_CHECK(piece > 0 && piece % tile.depth == 0 && pieces > 0 && pieces < 65536 &&
                (pieces == 1 || (pieces - 1) * piece < d) && d <= pieces * piece,
            std::string(op) + ": pieces do not cover D");
  args.partial = reinterpret_cast<float*>(partial);
  args.query_count = query_count, args.row_count = row_count, args.d = d, args.piece = piece, args.pieces = pieces;
  return args;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "Torch-free CUDA kernels of logra_kernels; arguments are raw addresses, checked by the Python caller.";
  m.def("has_sm_90a", [] { return kHasSm90; }, "Whether this build holds kernels for compute capability 9.0 alone.");
  m.def(
      "project_grad_tiling",
      [](int arch, int dtype, int64_t k_in, int64_t k_out, bool dy_projected) {
        const auto tiling =
            project_grad::tiling(arch_of("project_grad", arch), element_of(dtype), k_in, k_out, dy_projected);
        return std::make_tuple(tiling.positions, tiling.least_positions, tiling.tiles);
      },
      py::arg("arch"), py::arg("dtype"), py::arg("k_in"), py::arg("k_out"), py::arg("dy_projected"),
      "(positions a block takes at a time, the fewest it can take, blocks a chunk)");
  m.def(
      "project_grad",
      [](int arch, int dtype, int positions, const std::tuple<Address, int, int64_t, int64_t, int64_t>& x,
         const std::tuple<Address, int, int64_t, int64_t, int64_t>& dy, const std::optional<Matrix>& p_in,
         const std::optional<Matrix>& p_out, std::tuple<Address, int64_t, int64_t> weights, Address offsets,
         int64_t offset_stride, Address chunk_ends, Address out, Address partial, int64_t samples, int64_t length,
         int64_t chunk, int64_t chunks, int64_t d_in, int64_t d_out, int64_t k_in, int64_t k_out, int blocks,
         Address stream) {
        check_sizes("project_grad", {samples, k_out, k_in});
        LGK_CHECK(blocks == 0 || blocks == 1 || blocks == 2 || blocks == 4,
                  "project_grad: blocks must be 0, 1, 2 or 4");
        const auto kernels = arch_of("project_grad", arch);
        const auto tiling = project_grad::tiling(kernels, element_of(dtype), k_in, k_out, !p_out);
        LGK_CHECK(positions == tiling.positions || positions == tiling.least_positions,
                  "project_grad: positions is not one of the tiling's");
        LGK_CHECK(chunk % positions == 0, "project_grad: a chunk must be a whole number of a block's positions");
        LGK_CHECK(chunk > 0 && chunks >= 0 && length >= 0,
                  "project_grad: chunk, chunks and length must not be negative");
        LGK_CHECK((offsets == 0) == (chunk_ends == 0), "project_grad: offsets and chunk_ends come together");
        project_grad::CudaArgs args = {};
        args.x = side_of(dtype, x, d_in, p_in, k_in);
        args.dy = side_of(dtype, dy, d_out, p_out, k_out);
        args.weights = reinterpret_cast<const float*>(std::get<0>(weights));
        args.weight_sample_stride = std::get<1>(weights), args.weight_row_stride = std::get<2>(weights);
        args.out = reinterpret_cast<float*>(out), args.partial = reinterpret_cast<float*>(partial);
        args.shape = {samples,
                      length,
                      reinterpret_cast<const int64_t*>(offsets),
                      offset_stride,
                      reinterpret_cast<const int64_t*>(chunk_ends),
                      chunk,
                      chunks};
        const auto element = element_of(dtype);
        py::gil_scoped_release unlocked;
        project_grad::project_grad_cuda(kernels, element, positions, blocks, args, reinterpret_cast<void*>(stream));
      },
      py::arg("arch"), py::arg("dtype"), py::arg("positions"), py::arg("x"), py::arg("dy"), py::arg("p_in"),
      py::arg("p_out"), py::arg("weights"), py::arg("offsets"), py::arg("offset_stride"), py::arg("chunk_ends"),
      py::arg("out"), py::arg("partial"), py::arg("samples"), py::arg("length"), py::arg("chunk"), py::arg("chunks"),
      py::arg("d_in"), py::arg("d_out"), py::arg("k_in"), py::arg("k_out"), py::arg("blocks"), py::arg("stream"));
  m.def(
      "score_tile",
      [](const Scored& queries, const Scored& rows, int64_t query_count) {
        const auto tile =
            score_block::tile(operand_of("score_block", queries), operand_of("score_block", rows), query_count);
        return std::make_tuple(tile.queries, tile.rows, tile.depth);
      },
      py::arg("queries"), py::arg("rows"), py::arg("query_count"),
      "(queries and rows of a block's tile, a number of which pieces of D are multiples)");
  m.def(
      "score_block",
      [](int arch, const Scored& queries, const Scored& rows, Address out, Address partial, int64_t query_count,
         int64_t row_count, int64_t d, int64_t piece, int64_t pieces, Address stream) {
        const auto kernels = arch_of("score_block", arch);
        auto args = scores_of("score_block", queries, rows, partial, query_count, row_count, d, piece, pieces);
        args.out = reinterpret_cast<float*>(out);
        py::gil_scoped_release unlocked;
        score_block::score_block_cuda(kernels, args, reinterpret_cast<void*>(stream));
      },
      py::arg("arch"), py::arg("queries"), py::arg("rows"), py::arg("out"), py::arg("partial"), py::arg("query_count"),
      py::arg("row_count"), py::arg("d"), py::arg("piece"), py::arg("pieces"), py::arg("stream"));
  m.attr("SCORE_TOPK_MOST_K") = score_topk::kMostBest;
  m.def(
      "score_topk",
      [](int arch, const Scored& queries, const Scored& rows, std::pair<Address, int64_t> row_scale, Address values,
         Address indices, Address candidates, Address counts, Address best, Address partial, int64_t query_count,
         int64_t row_count, int64_t d, int64_t k, bool largest, int64_t first_block, int64_t capacity, int64_t piece,
         int64_t pieces, Address stream) {
        const auto kernels = arch_of("score_topk", arch);
        score_topk::CudaArgs args = {};
        args.scores = scores_of("score_topk", queries, rows, partial, query_count, row_count, d, piece, pieces);
        LGK_CHECK(row_count < int64_t(1) << 32, "score_topk: " + std::to_string(row_count) +
                                                    " rows; a call of the CUDA kernels takes less than 2^32");
        LGK_CHECK(k >= 1 && k <= score_topk::kMostBest && k <= row_count,
                  "score_topk: k must be from 1 to " + std::to_string(score_topk::kMostBest) + " and at most all rows");
        LGK_CHECK(first_block >= 1 && first_block <= capacity && (pieces == 1 || row_count <= first_block),
                  "score_topk: blocks of rows do not fit");
        args.scores.candidates = {reinterpret_cast<uint64_t*>(candidates),
                                  reinterpret_cast<uint32_t*>(counts),
                                  nullptr,
                                  k,
                                  capacity,
                                  0,
                                  reinterpret_cast<const float*>(row_scale.first),
                                  row_scale.second,
                                  largest};
        args.best = reinterpret_cast<uint64_t*>(best), args.first_block = first_block;
        args.values = reinterpret_cast<float*>(values), args.indices = reinterpret_cast<int64_t*>(indices);
        py::gil_scoped_release unlocked;
        score_topk::score_topk_cuda(kernels, args, reinterpret_cast<void*>(stream));
      },
      py::arg("arch"), py::arg("queries"), py::arg("rows"), py::arg("row_scale"), py::arg("values"), py::arg("indices"),
      py::arg("candidates"), py::arg("counts"), py::arg("best"), py::arg("partial"), py::arg("query_count"),
      py::arg("row_count"), py::arg("d"), py::arg("k"), py::arg("largest"), py::arg("first_block"), py::arg("capacity"),
      py::arg("piece"), py::arg("pieces"), py::arg("stream"));
}
