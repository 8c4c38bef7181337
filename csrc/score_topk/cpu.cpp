#include "score_topk/cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/buffer.h"
#include "common/product.h"
#include "encoded/product.h"

namespace lgk::score_topk {
namespace {

constexpr int64_t kQueries = 256;          // scored at a time
constexpr int64_t kBlockScores = 1 << 20;  // scores held at a time
constexpr int64_t kLeastRows = 512;
constexpr int64_t kMostRows = 16384;
constexpr int64_t kSlack = 512;  // candidates beyond k that are gathered before the worst are dropped

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Type = uint32_t;
};
template <>
struct Bits<double> {
  using Type = uint64_t;
};

// Scores as integers: the better the score, the larger the key; the same key for 0 and -0 and one for every NaN.
template <typename T>
struct Key {
  using Type = typename Bits<T>::Type;
  static constexpr Type kNan = std::numeric_limits<Type>::max();
  static constexpr Type kSign = Type{1} << (8 * sizeof(Type) - 1);

  static Type of(T score, bool largest) {
    if (score != score) return kNan;
    const T positive_zero = score + T{0};
    Type bits;
    std::memcpy(&bits, &positive_zero, sizeof(bits));
    const Type ascending = bits & kSign ? ~bits : bits | kSign;
    return largest ? ascending : ~ascending;
  }

  static T score(Type key, bool largest) {
    if (key == kNan) return std::numeric_limits<T>::quiet_NaN();
    const Type ascending = largest ? key : ~key;
    const Type bits = ascending & kSign ? ascending & ~kSign : ~ascending;
    T score;
    std::memcpy(&score, &bits, sizeof(score));
    return score;
  }
};

template <typename T>
struct Candidate {
  typename Key<T>::Type key;
  int64_t row;
  bool operator<(const Candidate& other) const { return key != other.key ? key > other.key : row < other.row; }
};

// The best candidates of one query so far. Rows arrive in ascending order, so one that ties with the worst kept is
// worse.
template <typename T>
struct Best {
  Candidate<T>* list;
  int64_t count;
  bool full;  // k have been kept, and `worst` is the last of them
  typename Key<T>::Type worst;

  void offer(T score, int64_t row, const Shape& shape, int64_t capacity) {
    const auto key = Key<T>::of(score, shape.largest);
    if (full && key <= worst) return;
    list[count++] = {key, row};
    if (count == capacity) keep(shape.k);
  }

  void keep(int64_t k) {
    if (count > k) std::nth_element(list, list + k - 1, list + count);
    full = count >= k;
    count = std::min(count, k);
    if (full) worst = list[k - 1].key;
  }
};

// The candidates of a block of queries, and the scores of a block of rows for them.
template <typename T>
struct Selection {
  const Shape& shape;
  int64_t capacity, block_rows;
  Buffer<Candidate<T>> candidates;
  Buffer<Best<T>> best;
  Buffer<T> scores;

  void reset(int64_t queries) const {
    for (int64_t q = 0; q < queries; ++q) best.data()[q] = {candidates.data() + q * capacity, 0, false, 0};
  }

  void offer(int64_t q, int64_t row, int64_t rows, const Rows& row_scale) const {
    const T* from = scores.data() + q * block_rows;
    const T* scale = static_cast<const T*>(row_scale.data);
    for (int64_t i = 0; i < rows; ++i) {
      const T score = scale == nullptr ? from[i] : from[i] * scale[row_scale.offset(row + i)];
      best.data()[q].offer(score, row + i, shape, capacity);
    }
  }

  void write(int64_t q, T* values, int64_t* indices) const {
    Best<T>& kept = best.data()[q];
    kept.keep(shape.k);
    std::sort(kept.list, kept.list + shape.k);
    for (int64_t i = 0; i < shape.k; ++i) {
      values[i] = Key<T>::score(kept.list[i].key, shape.largest);
      indices[i] = kept.list[i].row;
    }
  }
};

// multiply(row, count of rows, query, count of queries, output) gives the scores of a block of rows.
template <typename T, class Multiply>
void select(const Multiply& multiply, const Rows& row_scale, T* values, int64_t* indices, const Shape& shape,
            int n_threads) {
  if (shape.queries == 0 || shape.rows == 0) return;
  const int64_t widest = std::min(shape.queries, kQueries);
  const int64_t block_rows = std::min(shape.rows, std::max(kLeastRows, std::min(kMostRows, kBlockScores / widest)));
  const int64_t slack = std::min(shape.rows - shape.k, std::max(shape.k, kSlack));
  const int64_t capacity = shape.k + std::max<int64_t>(slack, 1);
  const Selection<T> selection = {shape,
                                  capacity,
                                  block_rows,
                                  Buffer<Candidate<T>>(widest * capacity),
                                  Buffer<Best<T>>(widest),
                                  Buffer<T>(widest * block_rows)};
  for (int64_t q0 = 0; q0 < shape.queries; q0 += kQueries) {
    const int64_t count = std::min(kQueries, shape.queries - q0);
    selection.reset(count);
    for (int64_t row = 0; row < shape.rows; row += block_rows) {
      const int64_t here = std::min(block_rows, shape.rows - row);
      multiply(row, here, q0, count, Output<T>{selection.scores.data(), 1, block_rows});
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
      for (int64_t q = 0; q < count; ++q) selection.offer(q, row, here, row_scale);
    }
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
    for (int64_t q = 0; q < count; ++q) selection.write(q, values + (q0 + q) * shape.k, indices + (q0 + q) * shape.k);
  }
}

}  // namespace

template <typename T>
void score_topk(const Rows& queries, const Rows& rows, const Rows& row_scale, T* values, int64_t* indices, Shape shape,
                int n_threads) {
  const auto multiply = [&](int64_t row, int64_t count, int64_t query, int64_t n, Output<T> scores) {
    multiply_rows<T>(rows.from(row), count, queries.from(query), n, shape.d, scores, n_threads);
  };
  select<T>(multiply, row_scale, values, indices, shape, n_threads);
}

void score_encoded(const Rows& queries, const EncodedRows& rows, const Rows& row_scale, float* values, int64_t* indices,
                   Shape shape, int digits, int n_threads) {
  const auto multiply = [&](int64_t row, int64_t count, int64_t query, int64_t n, Output<float> scores) {
    multiply_encoded(rows.from(row), count, queries.from(query), n, shape.d, scores, digits, n_threads);
  };
  select<float>(multiply, row_scale, values, indices, shape, n_threads);
}

template void score_topk<float>(const Rows&, const Rows&, const Rows&, float*, int64_t*, Shape, int);
template void score_topk<double>(const Rows&, const Rows&, const Rows&, double*, int64_t*, Shape, int);

}  // namespace lgk::score_topk
