// The only code that depends on the instruction set: kernels in two precisions, one table for each set.
//
// Operands are packed into tiles of T (float for fp32, bf16 and fp16; double for fp64), padded with zeros, so that the
// inner loops know neither dtypes nor strides nor ragged edges. A padded row or column only ever reaches padded
// results. Where the machine multiplies bf16 itself, two operands of bf16 are packed as they are, a pair of neighbours
// in the place of one float. The left operand's rows are read from where they lie if that is how they would be packed;
// products of few columns always do so.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/rows.h"

namespace lgk {

// Terms that are summed one after the other; the sums of such panels are then added. Bounds the rounding error of long
// sums.
constexpr int64_t kPanel = 128;
// Panels whose sums are added before the total so far is added to them: very long sums are three levels deep.
constexpr int64_t kPanelsPerRun = 64;
// Long rows whose distance is a multiple of a large power of 2 fall into the same cache sets, so that what was fetched
// ahead for one row is evicted by the next: each row is read in pieces of at least a quarter of a page.
constexpr int64_t kPanelsPerStrip = 4;
// Row length of an A tile: a constant, so that the rows of a register tile are constant offsets from one pointer; not a
// power of two, so that they do not share cache sets.
constexpr int64_t kTileLd = kPanel + 16;

// The terms of a dot product that one lane sums before the total so far is added to them.
constexpr int64_t kDotChain = 128;
// Runs of chains have a multiple of this many columns: one of kDotChain * lanes in every set, so that cutting there
// changes no bits.
constexpr int64_t kDotRun = 8192;
// The most columns for which rows are read from where they lie, and the rows that are read side by side at most.
constexpr int64_t kFew = 8;
constexpr int64_t kDotRows = 8;
constexpr int64_t kDotPiece = 16;  // vectors of each that stay in the L1 cache
constexpr int64_t kFewTerms = 64;

// What a product fetches into the cache meanwhile: what the next one reads of as many rows, row_step bytes of each
// while it multiplies a cache line of its own. Rows may lie too far apart for the hardware to see streams.
struct Fetch {
  const char* rows;              // null: nothing
  int64_t row_stride, row_step;  // bytes
};

template <typename T>
struct Products {
  Dtype dtype;        // rows of this are laid out as packed ones are
  int64_t lanes;      // packed columns are padded to a multiple of this
  int64_t row_tile;   // packed rows are padded to a multiple of this
  int64_t tile_step;  // tiles of rows that are multiplied at once have a multiple of this, but for a last one
  int64_t row_block;  // rows that multiply takes at a time
  int64_t terms;      // what a packed number holds: 1 number, or a pair of bf16
  int64_t few;        // up to so many columns are multiplied by dot products instead
  int64_t few_terms;  // up to so many packed rows' outer products take less time than mirroring half of what they add

  // dst[r][c] = src[row + r, column + c], row length ld; zeros up to whole lanes and whole row tiles. Pairs start at
  // `column`; the last one of an odd number of columns ends in a zero.
  void (*pack_rows)(const Rows& src, int64_t row, int64_t rows, int64_t column, int64_t columns, T* dst, int64_t ld);

  // The transpose, for multiply's b: rows row.. of src become the columns of panels [2 * lanes][packed columns], the
  // last one maybe of lanes columns. scratch holds lanes * kTileLd; at most kPanel packed columns.
  void (*pack_columns)(const Rows& src, int64_t row, int64_t rows, int64_t column, int64_t columns, T* dst, T* scratch);

  // c[i][j] (+)= sum_k a[i][k] b[j][k]: a's rows `stride` bytes apart, from pack_rows or, when their number is a
  // multiple of row_tile, as they lie; b from pack_columns; k ascending. depth counts packed numbers, at most kPanel.
  void (*multiply)(const void* a, int64_t stride, int64_t rows, const T* b, int64_t columns, int64_t depth, T* c,
                   int64_t ldc, bool add, const Fetch& fetch);

  // The same for a strip of up to kPanelsPerStrip panels: c[i][j] (+)= sum_k a[row + i][column + k] b[j][k], k < width.
  // a's columns are neighbours in memory; b's panels follow each other; `next` is what will be read next of as many
  // rows. Null where multiply takes a strip panel by panel.
  void (*multiply_strip)(const Rows& a, int64_t row, int64_t rows, int64_t column, int64_t width, const T* b,
                         int64_t columns, T* c, int64_t ldc, bool add, const char* next);

  // Operands of outer: dst[r][c] = src[row + r, column + c], a pair being two rows' numbers; zeros up to whole lanes,
  // and in the last pair of an odd number of rows.
  void (*pack_terms)(const Rows& src, int64_t row, int64_t rows, int64_t column, int64_t columns, T* dst, int64_t ld);

  // c[i][j] (+)= sum_k a[k][i] b[k][j]: both from pack_terms; k ascending. depth counts packed rows.
  void (*outer)(const T* a, int64_t lda, int64_t rows, const T* b, int64_t ldb, int64_t columns, int64_t depth, T* c,
                int64_t ldc, bool add);

  // sums[i][j][lane] (+)= sum over a's columns column + k of a[row + i, column + k] b[j][k], packed number k / terms =
  // lane modulo lanes, in chains of kDotChain. a's columns are neighbours in memory, and of `dtype` where terms > 1; b
  // comes from pack_rows, its `width` a power of 2 up to kFew; whole kDotRuns of packed columns, but for the last. sums
  // has room for whole multiples of kDotRows rows. Null: those few columns are multiplied as the dtype T has it.
  void (*dot)(const Rows& a, int64_t row, int64_t rows, int64_t column, int64_t columns, const T* b, int64_t ldb,
              int64_t width, T* sums, bool add);
};

// Rows kept as factors, see factored.h.
template <typename T>
struct FactorKernels {
  // dst[r][a * columns + x] = sum_c u[r * rank + c][a] v[r * rank + c][x] for a < outs, x < columns; c ascending.
  // Writes whole lanes of x, and reads as many; 1 <= rank <= kMostRank.
  void (*rebuild)(const T* u, int64_t ldu, const T* v, int64_t ldv, int64_t rank, int64_t rows, int64_t outs,
                  int64_t columns, T* dst, int64_t ld);

  // out[r][q] (+)= sum_c sum_i t[r * rank + c][q * size + i] u[r * rank + c][i], i = lane modulo lanes; then the lanes.
  void (*contract)(const T* t, int64_t ldt, const T* u, int64_t ldu, int64_t rank, int64_t rows, int64_t queries,
                   int64_t size, T* out, int64_t ldo, bool add);

  // The leading singular vectors of `lanes` matrices at a time, number i of lane l at [i * lanes + l]: q [width][k_in]
  // orthonormal (or 0, where g has not enough), y [width][k_out] = g q orthogonal, in no order. Subspace iteration from
  // start [width][k_in], then one-sided Jacobi; a fixed number of each. Every array is aligned to the vector.
  void (*subspace)(const T* g, int64_t k_out, int64_t k_in, const T* start, int64_t width, int iterations, int sweeps,
                   T* y, T* q);
};

struct KernelSet {
  Products<float> f32;
  Products<double> f64;
  FactorKernels<float> factors_f32;
  FactorKernels<double> factors_f64;
};

// The table for the instruction set in use: the fastest this machine has, or the one LOGRA_KERNELS_ISA names. Throws
// std::invalid_argument when that one is unknown or missing here.
template <typename T>
const Products<T>& kernels();

template <typename T>
const FactorKernels<T>& factor_kernels();

// The kernels for products of rows of these two dtypes.
template <typename T>
const Products<T>& products(Dtype a, Dtype b);

const char* isa_name();

// The sets this machine can run, slowest first.
std::vector<std::string> supported_isas();

}  // namespace lgk
