// Which kernel operands have: their number formats as types, and the queries of a tile.
#pragma once
#include "score_block/cuda_tile.cuh"

namespace lgk::score_block {

// function(Q(), R()) for the operands' number formats; false where they have no kernel.
template <class Function>
bool with_numbers(const Operand& queries, const Operand& rows, const Function& function) {
  const Dtype q = queries.numbers.dtype, r = rows.numbers.dtype;
  if (queries.encoded.codes != nullptr) {
    const bool whole = rows.encoded.codes != nullptr && rows.encoded.encoding.code != Code::kF8;
    if (queries.encoded.encoding.code != Code::kI8 || !whole) return false;
    return function(Integers(), Integers()), true;
  }
  if (rows.encoded.codes != nullptr) {
    if (q == Dtype::kF32) return function(F32(), Codes()), true;
    if (q == Dtype::kBF16) return function(BF16(), Codes()), true;
    if (q == Dtype::kF16) return function(F16(), Codes()), true;
    return false;
  }
  if (q == Dtype::kF32 && r == Dtype::kF32) return function(F32(), F32()), true;
  if (q == Dtype::kF32 && r == Dtype::kBF16) return function(F32(), BF16()), true;
  if (q == Dtype::kF32 && r == Dtype::kF16) return function(F32(), F16()), true;
  if (q == Dtype::kBF16 && r == Dtype::kBF16) return function(BF16(), BF16()), true;
  if (q == Dtype::kF16 && r == Dtype::kF16) return function(F16(), F16()), true;
  return false;
}

// function(K()) for the kernel of a tile of `queries`, 16, 64, or 128 where each operand is one part.
template <Arch kArch, class Q, class R, class Function>
void with_tile(int queries, const Function& function) {
  if (queries == 16) return function(Kernel<kArch, Q, R, 16>());
  if constexpr (Q::kParts == 1 && R::kParts == 1) {
    if (queries == 128) return function(Kernel<kArch, Q, R, 128>());
  }
  function(Kernel<kArch, Q, R, 64>());
}

template <class Function>
bool with_kernel(Arch arch, const CudaArgs& args, int queries, const Function& function) {
  return with_numbers(args.queries, args.rows, [&](auto q, auto r) {
    arch == Arch::kSm90 ? with_tile<Arch::kSm90, decltype(q), decltype(r)>(queries, function)
                        : with_tile<Arch::kSm80, decltype(q), decltype(r)>(queries, function);
  });
}

// The kernels of sm_90a take one scale a step; mma.sync has any.
inline Arch arch_for(Arch arch, const Operand& queries, const Operand& rows) {
  const int64_t step = queries.encoded.codes != nullptr ? 128 : 64;
  return rows.encoded.codes != nullptr && rows.encoded.encoding.block < step ? Arch::kSm80 : arch;
}

inline Tile tile_of(const Operand& queries, const Operand& rows, int64_t query_count) {
  bool single = false;
  with_numbers(queries, rows, [&](auto q, auto r) { single = decltype(q)::kParts == 1 && decltype(r)::kParts == 1; });
  return {query_count <= 16 ? 16 : query_count <= 64 || !single ? 64 : 128, kRows, 128};
}

}  // namespace lgk::score_block
