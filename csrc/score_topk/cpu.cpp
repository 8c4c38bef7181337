#include "score_topk/cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/buffer.h"
#include "common/check.h"
#include "common/product.h"
#include "common/threads.h"
#include "encoded/queries.h"

namespace lgk::score_topk {
namespace {

constexpr int64_t kQueries = 256;          // scored at a time
constexpr int64_t kBlockScores = 1 << 20;  // scores held at a time
constexpr int64_t kLeastRows = 512;
constexpr int64_t kMostRows = 16384;
constexpr int64_t kGlance = 16;  // scores that are compared before they are looked at one by one
constexpr int64_t kSlack = 128;  // candidates beyond k that are gathered before the worst are dropped

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

  void offer(T score, int64_t row, int64_t k, bool largest, int64_t capacity) {
    const auto key = Key<T>::of(score, largest);
    if (full && key <= worst) return;
    list[count++] = {key, row};
    if (count == capacity) keep(k);
  }

  void keep(int64_t k) {
    if (count > k) std::nth_element(list, list + k - 1, list + count);
    full = k > 0 && count >= k;
    count = std::min(count, k);
    if (full) worst = list[k - 1].key;
  }
};

}  // namespace

// The best candidates of every query, and the scores of a block of rows for some of them.
template <typename T>
struct Ranking {
  int64_t queries, k, capacity;
  bool largest;
  Buffer<Candidate<T>> candidates;
  Buffer<Best<T>> best;

  Ranking(int64_t queries, int64_t k, int64_t most_rows, bool largest)
      : queries(queries),
        k(k),
        capacity(k + std::max<int64_t>(1, std::min(most_rows - k, slack(queries, k)))),
        largest(largest),
        candidates(queries * capacity),
        best(queries) {
    for (int64_t q = 0; q < queries; ++q) best.data()[q] = {candidates.data() + q * capacity, 0, false, 0};
  }

  static int64_t slack(int64_t queries, int64_t k) {
    return std::max(k, kSlack * kQueries / std::max(queries, kQueries));
  }

  // multiply(row, count of rows, query, count of queries, output) gives the scores of rows of a block that starts with
  // row number `first` of all.
  template <class Multiply>
  void add(const Multiply& multiply, int64_t first, int64_t rows, const Rows& row_scale, int n_threads) {
    if (queries == 0 || rows == 0) return;
    const int64_t widest = std::min(queries, kQueries);
    const int64_t block_rows = std::min(rows, std::max(kLeastRows, std::min(kMostRows, kBlockScores / widest)));
    const Buffer<T> scores(widest * block_rows);
    for (int64_t q0 = 0; q0 < queries; q0 += kQueries) {
      const int64_t count = std::min(kQueries, queries - q0);
      for (int64_t row = 0; row < rows; row += block_rows) {
        const int64_t here = std::min(block_rows, rows - row);
        multiply(row, here, q0, count, Output<T>{scores.data(), 1, block_rows});
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(double(here) * count, n_threads))
        for (int64_t q = 0; q < count; ++q) {
          offer(best.data()[q0 + q], scores.data() + q * block_rows, row, first + row, here, row_scale);
        }
      }
    }
  }

  void write(int64_t found, T* values, int64_t* indices, int n_threads) const {
    if (queries == 0) return;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(double(found) * queries, n_threads))
    for (int64_t q = 0; q < queries; ++q) {
      Best<T>& kept = best.data()[q];
      kept.keep(k);
      std::sort(kept.list, kept.list + found);
      for (int64_t i = 0; i < found; ++i) {
        values[q * found + i] = Key<T>::score(kept.list[i].key, largest);
        indices[q * found + i] = kept.list[i].row;
      }
    }
  }

 private:
  void offer(Best<T>& to, T* scores, int64_t row, int64_t number, int64_t rows, const Rows& row_scale) const {
    const T* scale = static_cast<const T*>(row_scale.data);
    for (int64_t i = 0; scale != nullptr && i < rows; ++i) scores[i] *= scale[row_scale.offset(row + i)];
    for (int64_t i = 0; i < rows; i += kGlance) {
      const int64_t end = std::min(rows, i + kGlance);
      if (to.full && none_better(scores + i, end - i, Key<T>::score(to.worst, largest))) continue;
      for (int64_t x = i; x < end; ++x) to.offer(scores[x], number + x, k, largest, capacity);
    }
  }

  bool none_better(const T* scores, int64_t n, T worst) const {
    int better = 0;  // or NaN
    for (int64_t i = 0; i < n; ++i) better |= largest ? !(scores[i] <= worst) : !(scores[i] >= worst);
    return better == 0;
  }
};

namespace {

template <typename T>
auto products(const Rows& rows, const Rows& queries, int64_t d, int n_threads) {
  return [=](int64_t row, int64_t count, int64_t query, int64_t n, Output<T> scores) {
    multiply_rows<T>(rows.from(row), count, queries.from(query), n, d, scores, n_threads);
  };
}

auto products(const Rows& rows, const LaidOut<float>& queries, int n_threads) {
  return [=, &queries](int64_t row, int64_t count, int64_t query, int64_t n, Output<float> scores) {
    queries.multiply(rows.from(row), count, query, n, scores, n_threads);
  };
}

auto products(const EncodedRows& rows, const EncodedQueries& queries, int n_threads) {
  return [=, &queries](int64_t row, int64_t count, int64_t query, int64_t n, Output<float> scores) {
    queries.multiply(rows.from(row), count, query, n, scores, n_threads);
  };
}

}  // namespace

template <typename T>
void score_topk(const Rows& queries, const Rows& rows, const Rows& row_scale, T* values, int64_t* indices, Shape shape,
                int n_threads) {
  Ranking<T> ranking(shape.queries, shape.k, shape.rows, shape.largest);
  ranking.add(products<T>(rows, queries, shape.d, n_threads), 0, shape.rows, row_scale, n_threads);
  ranking.write(shape.k, values, indices, n_threads);
}

void score_encoded(const Rows& queries, const EncodedRows& rows, const Rows& row_scale, float* values, int64_t* indices,
                   Shape shape, int digits, int n_threads) {
  const EncodedQueries laid_out(queries, shape.queries, shape.d, rows.encoding, digits, n_threads);
  Ranking<float> ranking(shape.queries, shape.k, shape.rows, shape.largest);
  ranking.add(products(rows, laid_out, n_threads), 0, shape.rows, row_scale, n_threads);
  ranking.write(shape.k, values, indices, n_threads);
}

template void score_topk<float>(const Rows&, const Rows&, const Rows&, float*, int64_t*, Shape, int);
template void score_topk<double>(const Rows&, const Rows&, const Rows&, double*, int64_t*, Shape, int);

Search::Search(const Rows& queries, Shape shape)
    : queries_(queries),
      shape_(shape),
      ranking_(std::make_unique<Ranking<float>>(shape.queries, shape.k, shape.rows, shape.largest)) {}
Search::~Search() = default;

void Search::add(const Rows& rows, int64_t count, const Rows& row_scale, int n_threads) {
  if (plain_ == nullptr) {
    plain_ = std::make_unique<LaidOut<float>>(queries_, shape_.queries, shape_.d, rows.number(), n_threads);
  }
  ranking_->add(products(rows, *plain_, n_threads), rows_, count, row_scale, n_threads);
  rows_ += count;
}

void Search::add(const EncodedRows& rows, int64_t count, const Rows& row_scale, int digits, int n_threads) {
  if (laid_out_ == nullptr) {
    laid_out_ = std::make_unique<EncodedQueries>(queries_, shape_.queries, shape_.d, rows.encoding, digits, n_threads);
    encoding_ = rows.encoding;
  }
  LGK_CHECK(rows.encoding.code == encoding_.code && rows.encoding.block == encoding_.block,
            "score_topk: the rows of a search must all have one format");
  ranking_->add(products(rows, *laid_out_, n_threads), rows_, count, row_scale, n_threads);
  rows_ += count;
}

void Search::write(float* values, int64_t* indices, int n_threads) const {
  ranking_->write(found(), values, indices, n_threads);
}

}  // namespace lgk::score_topk
