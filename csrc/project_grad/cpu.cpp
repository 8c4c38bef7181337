#include "project_grad/cpu.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "common/amx.h"
#include "common/block.h"
#include "common/buffer.h"
#include "common/kernels.h"
#include "common/threads.h"

namespace lgk::project_grad {
namespace {

// Numbers of a thread's share of a block of projected positions: what is left of an L2 cache of 1 MiB beside an A tile.
constexpr int64_t kTileNumbers = 49152;
// Positions, counted from a sample's start, whose panels are summed before they are added to G.
constexpr int64_t kPositions = 4 * kPanel;
constexpr int64_t kOuterRows = 48;  // rows of G that make a task
constexpr int64_t kPairRows = 128;  // the same of pairs, which are packed once a task, with samples for all threads

template <typename T>
T weight_at(const Rows& weights, int64_t r) {
  return static_cast<const T*>(weights.data)[weights.offset(r)];
}

// One side's projection, packed once a call, and the block of projected positions it fills.
template <typename T>
struct Projector {
  const Products<T>& kernels;
  Side side;
  int64_t d, k;
  Block<T> projection;
  T* block;

  Projector(const Side& side, int64_t d, int64_t k)
      : kernels(lgk::kernels<T>()),
        side(side),
        d(d),
        k(k),
        projection{products<T>(side.positions.number(), side.projection.dtype), side.projection, 0, k, 0, d, nullptr} {}

  int64_t ld() const { return round_up(k, kernels.lanes) + kernels.lanes; }
  int64_t packed_size() const { return side.has_projection ? projection.packed_size() : 0; }
  int64_t pack_tasks() const { return side.has_projection ? projection.pack_tasks() : 0; }
  int64_t scratch_size(int64_t rows) const { return side.has_projection ? projection.scratch_size(rows) : 0; }
  int64_t work() const { return side.has_projection ? d * k : k; }

  // The block as bf16.
  Rows rounded() const {
    Rows rows = matrix(block, Dtype::kF32, ld(), 1);
    rows.rounded = true;
    return rows;
  }

  // Positions start .. start + rows - 1 into rows at.. of the block, weighed. One of weight 0 counts as zeros, whatever
  // it holds.
  void project(int64_t start, int64_t rows, int64_t at, const Rows& weights, bool weigh, T* scratch) const {
    T* to = block + at * ld();
    if (!side.has_projection) {
      kernels.pack_rows(side.positions, start, rows, 0, k, to, ld());
    } else if (d == 0) {
      std::fill_n(to, rows * ld(), T{0});
    } else {
      projection.multiply(side.positions, start, rows, scratch, to, ld());
    }
    if (weights.data == nullptr) return;
    for (int64_t r = 0; r < rows; ++r) {
      const T w = weight_at<T>(weights, start + r);
      for (int64_t j = 0; j < k && weigh; ++j) to[r * ld() + j] *= w;
      if (w == 0) std::fill_n(to + r * ld(), k, T{0});
    }
  }
};

// Whole runs of kPositions of one sample, or its end. The first part of a sample writes its G, so that an empty sample
// needs a part too.
struct Part {
  int64_t sample, start, count;
  bool first;
};

// Parts in the order of positions, and where each block of them starts.
struct Plan {
  std::vector<Part> parts;
  std::vector<size_t> blocks;
};

Plan make_plan(const Shape& shape, int64_t capacity) {
  Plan plan;
  int64_t used = 0;
  plan.blocks.push_back(0);
  for (int64_t n = 0; n < shape.samples; ++n) {
    int64_t at = shape.start(n);
    const int64_t first = at, end = shape.start(n + 1);
    do {
      int64_t room = (capacity - used) / kPositions * kPositions;
      if (end - at <= capacity - used) room = end - at;
      if (room > 0 || at == end) plan.parts.push_back({n, at, room, at == first});
      at += room;
      used += room;
      if (at < end) {
        plan.blocks.push_back(plan.parts.size());
        used = 0;
      }
    } while (at < end);
  }
  plan.blocks.push_back(plan.parts.size());
  return plan;
}

// Adds up the outer products of a block of projected positions: as they are, or rounded to bf16 if `products` takes
// pairs.
template <typename T>
struct Accumulator {
  const Projector<T>&x, &dy;
  const Products<T>& products;
  T* out;
  bool add_to_out;
  int64_t most_depth;  // of a panel

  bool pairs() const { return products.terms > 1; }
  int64_t most_rows() const { return std::min(dy.k, pairs() ? kPairRows : kOuterRows); }
  int64_t task_rows(int64_t parts, int n_threads) const {
    return std::min(most_rows(), parts >= 2 * n_threads ? kPairRows : kOuterRows);
  }
  int64_t left_ld() const { return round_up(most_rows(), products.lanes) + products.lanes; }
  int64_t sums_size() const { return (most_rows() + products.row_tile) * x.ld(); }
  int64_t scratch_size() const { return sums_size() + (pairs() ? most_depth * (left_ld() + x.ld()) : 0); }

  // Rows row.. of the part's G. `at` is the part's first row in the blocks.
  void add(const Part& part, int64_t at, int64_t row, int64_t rows, T* sum) const {
    T* g = out + (part.sample * dy.k + row) * x.k;
    if (part.count == 0 && !add_to_out) std::fill_n(g, rows * x.k, T{0});
    const bool fits = rows % products.row_tile == 0 && x.k % products.lanes == 0;
    for (int64_t start = 0; start < part.count; start += kPositions) {
      const int64_t end = std::min(part.count, start + kPositions);
      const bool store = part.first && start == 0 && !add_to_out;
      if (store && fits) {
        sum_run(at + start, end - start, row, rows, g, x.k, sum + sums_size());
        continue;
      }
      sum_run(at + start, end - start, row, rows, sum, x.ld(), sum + sums_size());
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < x.k; ++j) g[i * x.k + j] = sum[i * x.ld() + j] + (store ? T{0} : g[i * x.k + j]);
      }
    }
  }

 private:
  // to[i][j] = sum_t dy[row + i][t] x[j][t] over positions at.. of the blocks.
  void sum_run(int64_t at, int64_t positions, int64_t row, int64_t rows, T* to, int64_t ld, T* packed) const {
    const int64_t step = kPanel * products.terms;
    const T *left = dy.block + at * dy.ld() + row, *right = x.block + at * x.ld();
    for (int64_t t = 0; t < positions; t += step) {
      const int64_t here = std::min(step, positions - t);
      if (!pairs()) {
        products.outer(left + t * dy.ld(), dy.ld(), rows, right + t * x.ld(), x.ld(), x.k, here, to, ld, t > 0);
        continue;
      }
      T* packed_x = packed + most_depth * left_ld();
      products.pack_terms(dy.rounded(), at + t, here, row, rows, packed, left_ld());
      products.pack_terms(x.rounded(), at + t, here, 0, x.k, packed_x, x.ld());
      products.outer(packed, left_ld(), rows, packed_x, x.ld(), x.k, ceil_div(here, products.terms), to, ld, t > 0);
    }
  }
};

// Of two sides in bf16. One that came projected may be fp32, which is rounded beside one that is projected in bf16.
template <typename T>
const Products<T>& outer_products(const Side& x, const Side& dy) {
  const auto number = [](const Side& side, const Side& other) {
    if (side.has_projection) return side.projection.dtype;
    return other.has_projection ? beside(side.positions, other.projection).number() : side.positions.dtype;
  };
  return lgk::products<T>(number(x, dy), number(dy, x));
}

// Run by every thread of a parallel region, or by the only one outside of any: there the runtime's calls would take as
// long as a tiny layer.
template <typename F>
void share_tasks(int64_t tasks, int n_threads, F run) {
  if (n_threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) run(task);
    return;
  }
#pragma omp for schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) run(task);
}

template <typename T>
int64_t tile_step(const Projector<T>& x, const Projector<T>& dy) {
  return std::max(x.projection.products.tile_step, dy.projection.products.tile_step);
}

template <typename T>
void run_block(const Projector<T>& x, const Projector<T>& dy, const Rows& weights, const Accumulator<T>& sums,
               const Part* parts, int64_t count, T* scratch, int n_threads) {
  const int64_t start = parts[0].start, positions = parts[count - 1].start + parts[count - 1].count - start;
  const int64_t tile = tile_rows(positions, tile_step(x, dy), n_threads), tiles = ceil_div(positions, tile);
  const bool dy_first = dy.work() > x.work();  // the larger tasks first, so that the threads end together
  share_tasks(2 * tiles, n_threads, [&](int64_t task) {
    const int64_t at = task % tiles * tile, rows = std::min(tile, positions - at);
    const bool is_dy = (task < tiles) == dy_first;
    (is_dy ? dy : x).project(start + at, rows, at, weights, is_dy, scratch);
  });
  const int64_t rows = sums.task_rows(count, n_threads), tasks = ceil_div(dy.k, rows);
  share_tasks(count * tasks, n_threads, [&](int64_t task) {
    const Part& part = parts[task / tasks];
    const int64_t row = task % tasks * rows;
    sums.add(part, part.start - start, row, std::min(rows, dy.k - row), scratch);
  });
}

}  // namespace

template <typename T>
void project_grad(const Side& x_side, const Side& dy_side, const Rows& weights, T* out, Shape shape, int n_threads) {
  if (shape.samples == 0 || shape.k_in == 0 || shape.k_out == 0) return;
  const Products<T>& kernels = lgk::kernels<T>();
  const int64_t positions = shape.start(shape.samples) - shape.start(0);
  n_threads =
      threads_for(double(positions) * (double(shape.d_in) * shape.k_in + double(shape.d_out) * shape.k_out), n_threads);
  Projector<T> x(x_side, shape.d_in, shape.k_in), dy(dy_side, shape.d_out, shape.k_out);
  const int64_t share = std::max(kPositions, kTileNumbers / (x.ld() + dy.ld()) / kernels.row_tile * kernels.row_tile);
  const int64_t capacity = std::min(share * n_threads, positions);
  const Plan plan = make_plan(shape, capacity);

  // one allocation: a tiny layer's time is its library calls
  const auto whole_lines = [](int64_t numbers) { return round_up(numbers, kCacheLine / int64_t{sizeof(T)}); };
  const Accumulator<T> sums = {x, dy, outer_products<T>(x_side, dy_side), out, shape.add, std::min(kPanel, capacity)};
  const int64_t tile = round_up(std::min(kMostTileRows, capacity), tile_step(x, dy));
  const int64_t scratch_size =
      whole_lines(std::max({x.scratch_size(tile), dy.scratch_size(tile), sums.scratch_size()}));
  const int64_t block_rows = capacity + kernels.row_tile;
  const Buffer<T> memory(whole_lines(x.packed_size()) + whole_lines(dy.packed_size()) +
                         whole_lines(block_rows * x.ld()) + whole_lines(block_rows * dy.ld()) +
                         scratch_size * n_threads);
  x.projection.packed = memory.data();
  dy.projection.packed = x.projection.packed + whole_lines(x.packed_size());
  x.block = dy.projection.packed + whole_lines(dy.packed_size());
  dy.block = x.block + whole_lines(block_rows * x.ld());
  T* scratch = dy.block + whole_lines(block_rows * dy.ld());

  const auto work = [&](int thread) {
    const TileScope tiles;
    T* mine = scratch + scratch_size * thread;
    share_tasks(x.pack_tasks() + dy.pack_tasks(), n_threads, [&](int64_t task) {
      task < x.pack_tasks() ? x.projection.pack(task, mine) : dy.projection.pack(task - x.pack_tasks(), mine);
    });
    for (size_t block = 0; block + 1 < plan.blocks.size(); ++block) {
      const int64_t first = plan.blocks[block], count = plan.blocks[block + 1] - first;
      if (count > 0) run_block(x, dy, weights, sums, plan.parts.data() + first, count, mine, n_threads);
    }
  };
  if (n_threads == 1) return work(0);
#pragma omp parallel num_threads(n_threads)
  work(omp_get_thread_num());
}

template void project_grad<float>(const Side&, const Side&, const Rows&, float*, Shape, int);
template void project_grad<double>(const Side&, const Side&, const Rows&, double*, Shape, int);

}  // namespace lgk::project_grad
