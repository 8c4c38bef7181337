// S[q,n] = sum_d queries[q,d] rows[n,d] on a CUDA device, rows of numbers or of codes with scales, which are converted
// on their way into shared memory.
//
// Operands are cut into bf16 parts of 8 bits: one for bf16 and for codes, which it holds exactly, two for fp16, three
// for fp32. Products of parts are summed in fp32 on the tensor cores, those below fp32's precision left out; a code's
// scale multiplies sums of at most 64 numbers. Whole codes beside int8 queries are multiplied as int8: sums of at most
// 128 numbers are exact, both scales multiply them. A long row is cut into pieces of D, whose sums are added in order:
// same input, same bits. Scores that parts make NaN of are summed anew of whole numbers, so that infinite ones of fp32
// and fp16 count as they do in bf16.
#pragma once
#include "common/cuda_arch.h"
#include "common/rows.h"
#include "encoded/rows.h"

namespace lgk::score_block {

// Rows of numbers, or of codes with scales where encoded.codes is not null.
struct Operand {
  Rows numbers;
  EncodedRows encoded;
};

// Where scores go that may be among the k best of their query, instead of all of them to `out`. A candidate is 64 bits:
// the score as an ordered integer, 0xffffffff for NaN, above the row number's complement, so that the larger one is the
// better one and none are equal.
struct Candidates {
  uint64_t* list;          // [query_count, capacity]; null where all scores are wanted
  uint32_t* counts;        // [query_count], of `list`
  const uint64_t* best;    // [query_count, k]: the best so far in descending order, zeros where there are fewer
  int64_t k, capacity;     // capacity >= row_count
  int64_t first_row;       // the number of the first row; numbers are below 2^32
  const float* row_scale;  // [row_count], a factor of each row's scores; null for none
  int64_t row_scale_stride;
  bool largest;
};

struct CudaArgs {
  Operand queries, rows;  // codes of queries are int8
  float* out;             // [query_count, row_count]
  float* partial;         // [pieces, query_count, row_count]; unused where there is one piece
  Candidates candidates;
  int64_t query_count, row_count, d;
  int64_t piece, pieces;  // numbers of a piece of D, a multiple of the tile's depth, and pieces in all
};

// Queries and rows of a block's tile, and a number of which pieces of D are multiples.
struct Tile {
  int queries, rows, depth;
};
Tile tile(const Operand& queries, const Operand& rows, int64_t query_count);

// Launches on the stream and returns without waiting; throws std::runtime_error with CUDA's own words on failure.
// Queries are of the rows' dtype or fp32; beside codes fp32, bf16, fp16 or, unless the codes are fp8, int8 with a scale
// for as many numbers as share one in the rows, or for 128 and more where more do.
void score_block_cuda(Arch arch, const CudaArgs& args, void* stream);

}  // namespace lgk::score_block
