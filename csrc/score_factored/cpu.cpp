#include "score_factored/cpu.h"

#include <omp.h>

#include <algorithm>

#include "common/amx.h"
#include "common/buffer.h"
#include "common/few.h"
#include "common/kernels.h"
#include "common/threads.h"
#include "encoded/kernels.h"

namespace lgk::score_factored {
namespace {

constexpr int64_t kQueries = 256;  // scored at a time
constexpr int64_t kGroup =
    1 << 19;  // packed numbers of the queries' layers that are scored at a time, unless one has more
constexpr int64_t kTileVectors = 96;     // factors of a tile of rows that are multiplied, or rows that are rebuilt
constexpr int64_t kStagedVectors = 384;  // factors of a tile of rows that is rebuilt
constexpr int64_t kTileColumns = 128;    // columns of a layer's queries that make a block

// A part of one layer, in packed numbers of the queries from `packed` on.
struct Panel {
  int64_t query, queries;  // the queries it multiplies
  int64_t out, outs;       // k_out's part
  int64_t in, ins;         // k_in's part
  int64_t depth;           // packed numbers that are summed
  int64_t packed;
};

struct LayerPlan {
  FactoredLayer layer;
  std::vector<Panel> panels;
};

// Layers whose packed queries are held at the same time.
struct Group {
  std::vector<LayerPlan> layers;
  std::vector<std::pair<size_t, size_t>> tasks;  // layer and panel of each piece of packing
  int64_t packed = 0;
};

// Scratch of a thread.
template <typename T>
struct Tile {
  T *pack, *u, *v, *a, *product, *scores, *decoded;
};

// One layer's factors of a tile of rows: numbers from `column` on in rows from `row` on.
struct Part {
  Rows factors;
  int64_t column, row;
};

// What both ways of scoring share.
template <typename T>
struct Base {
  static constexpr int64_t kStride = kTileLd * sizeof(T);  // bytes from row to row of a tile that is multiplied

  const Products<T>& kernels;
  const FactorKernels<T>& factor_kernels;
  const Products<T>& products;
  Rows queries, factors;
  const EncodedRows* encoded;  // in place of `factors`, if there are any
  const Factored& layers;
  int64_t n_queries, tile_rows;

  int64_t padded(int64_t count) const { return round_up(count, products.lanes); }
  int64_t ld(int64_t count) const { return padded(count) + kernels.lanes; }
  int64_t vectors() const { return tile_rows * layers.rank; }
  int64_t score_ld() const { return ld(n_queries); }

  // Codes are decoded from whole bytes on.
  static constexpr int64_t kWhole = 8;
  int64_t decoded_ld(const FactoredLayer& layer) const {
    return encoded == nullptr ? 0 : padded(layers.rank * (layer.k_out + layer.k_in) + kWhole);
  }

  Part part(const FactoredLayer& layer, int64_t row, int64_t rows, T* scratch) const {
    if (encoded == nullptr) return {factors, layer.factor, row};
    const int64_t ahead = layer.factor % kWhole, n = ahead + layers.rank * (layer.k_out + layer.k_in);
    float* decoded = reinterpret_cast<float*>(scratch);
    for (int64_t r = 0; r < rows; ++r) {
      encoded_kernels().decode(*encoded, row + r, layer.factor - ahead, n, decoded + r * decoded_ld(layer));
    }
    return {matrix(decoded, Dtype::kF32, decoded_ld(layer), 1), ahead, 0};
  }

  // `rank` vectors of one side of a layer for each of a tile's rows.
  Rows vectors_of(const Part& part, int64_t column, int64_t size) const {
    return vectors_in(part.factors, part.column + column, layers.rank, size);
  }

  // The same, widened, in rows of `ld`.
  void stage(const Part& part, int64_t column, int64_t size, int64_t rows, T* dst) const {
    kernels.pack_rows(vectors_of(part, column, size), part.row * layers.rank, rows * layers.rank, 0, size, dst,
                      ld(size));
  }
};

// T = Q_l v, then S += T . u.
template <typename T>
struct Contracted : Base<T> {
  using Base<T>::products, Base<T>::layers, Base<T>::kStride;

  int64_t block_queries(const FactoredLayer& layer) const { return std::max<int64_t>(1, kTileColumns / layer.k_out); }
  int64_t product_columns(const FactoredLayer& layer) const {
    return std::min(this->n_queries, block_queries(layer)) * layer.k_out;
  }
  int64_t a_size(const FactoredLayer& layer) const {
    return ceil_div(layer.k_in, kPanel * products.terms) * round_up(this->vectors(), products.row_tile) * kTileLd;
  }
  int64_t v_size(const FactoredLayer&) const { return 0; }

  void plan(const FactoredLayer& layer, std::vector<Panel>& panels, int64_t& packed) const {
    const int64_t step = block_queries(layer), panel = kPanel * products.terms;
    for (int64_t q = 0; q < this->n_queries; q += step) {
      const int64_t count = std::min(step, this->n_queries - q);
      for (int64_t k = 0; k < layer.k_in; k += panel) {
        const int64_t here = std::min(panel, layer.k_in - k), depth = ceil_div(here, products.terms);
        panels.push_back({q, count, 0, layer.k_out, k, here, depth, packed});
        packed += this->padded(count * layer.k_out) * depth;
      }
    }
  }

  void pack(const FactoredLayer& layer, const Panel& panel, T* dst, T* scratch) const {
    const Rows from = columns_from(this->queries, layer.column);
    const Rows outs = {from.data,         from.dtype, layer.k_out, from.row_stride, layer.k_in * from.column_stride,
                       from.column_stride};
    products.pack_columns(outs, panel.query * layer.k_out, panel.queries * layer.k_out, panel.in, panel.ins, dst,
                          scratch);
  }

  void score(const LayerPlan& plan, const T* packed, int64_t row, int64_t rows, const Tile<T>& tile, bool add) const {
    const FactoredLayer& layer = plan.layer;
    const int64_t rank = layers.rank, count = rows * rank, step = kPanel * products.terms;
    const int64_t a_panel = round_up(count, products.row_tile) * kTileLd;
    const Part part = this->part(layer, row, rows, tile.decoded);
    const Rows v = this->vectors_of(part, rank * layer.k_out, layer.k_in);
    this->stage(part, 0, layer.k_out, rows, tile.u);
    for (int64_t k = 0; k < layer.k_in; k += step) {
      products.pack_rows(v, part.row * rank, count, k, std::min(step, layer.k_in - k), tile.a + k / step * a_panel,
                         kTileLd);
    }
    const int64_t product_ld = this->ld(product_columns(layer));
    for (const Panel& panel : plan.panels) {
      products.multiply(tile.a + panel.in / step * a_panel, kStride, count, packed + panel.packed,
                        panel.queries * layer.k_out, panel.depth, tile.product, product_ld, panel.in > 0, Fetch{});
      if (panel.in + panel.ins < layer.k_in) continue;
      this->factor_kernels.contract(tile.product, product_ld, tile.u, this->ld(layer.k_out), rank, rows, panel.queries,
                                    layer.k_out, tile.scores + panel.query, this->score_ld(), add);
    }
  }
};

// A tile of rows is rebuilt a panel at a time and multiplied by the queries: as tiles, or, for a few of them, by dot
// products whose lanes are summed once a layer.
template <typename T, bool kByDots>
struct Rebuilt : Base<T> {
  using Base<T>::layers, Base<T>::kernels, Base<T>::n_queries, Base<T>::kStride;

  int64_t width() const {
    int64_t width = 1;
    while (width < n_queries) width *= 2;
    return width;
  }
  int64_t product_columns(const FactoredLayer&) const { return kByDots ? width() * kernels.lanes : n_queries; }
  int64_t packed_size(int64_t depth) const {
    return kByDots ? round_up(width(), kernels.row_tile) * this->padded(depth) : this->padded(n_queries) * depth;
  }
  int64_t a_size(const FactoredLayer&) const { return round_up(this->tile_rows, kernels.row_tile) * kTileLd; }
  int64_t v_size(const FactoredLayer& layer) const { return padded_vectors() * this->ld(layer.k_in); }
  int64_t padded_vectors() const { return round_up(this->vectors(), kernels.row_tile); }

  // Several whole rows of G where they fill vectors, else one row or a part of it.
  void plan(const FactoredLayer& layer, std::vector<Panel>& panels, int64_t& packed) const {
    const bool whole = layer.k_in % kernels.lanes == 0 && layer.k_in <= kPanel;
    const int64_t outs = whole ? kPanel / layer.k_in : 1;
    for (int64_t i = 0; i < layer.k_out; i += outs) {
      const int64_t count = std::min(outs, layer.k_out - i);
      for (int64_t k = 0; k < layer.k_in; k += kPanel) {
        const int64_t here = std::min(kPanel, layer.k_in - k);
        panels.push_back({0, n_queries, i, count, k, here, count * here, packed});
        packed += packed_size(count * here);
      }
    }
  }

  void pack(const FactoredLayer& layer, const Panel& panel, T* dst, T* scratch) const {
    const int64_t column = layer.column + panel.out * layer.k_in + panel.in, ld = this->padded(panel.depth);
    if (kByDots) {
      kernels.pack_rows(this->queries, 0, n_queries, column, panel.depth, dst, ld);
      std::fill(dst + n_queries * ld, dst + width() * ld, T{0});
    } else {
      kernels.pack_columns(this->queries, 0, n_queries, column, panel.depth, dst, scratch);
    }
  }

  void multiply(const Panel& panel, const T* packed, int64_t rows, const Tile<T>& tile, bool add) const {
    if (kByDots) {
      const Dtype dtype = sizeof(T) == sizeof(double) ? Dtype::kF64 : Dtype::kF32;
      kernels.dot(matrix(tile.a, dtype, kTileLd, 1), 0, rows, 0, panel.depth, packed, this->padded(panel.depth),
                  width(), tile.product, add);
    } else {
      kernels.multiply(tile.a, kStride, rows, packed, n_queries, panel.depth, tile.product, this->score_ld(), add,
                       Fetch{});
    }
  }

  // A row's scores by this layer.
  const T* scores_of(const Tile<T>& tile, int64_t r) const {
    if (!kByDots) return tile.product + r * this->score_ld();
    T* sums = tile.product + r * width() * kernels.lanes;
    for (int64_t q = 0; q < n_queries; ++q) sums[q] = sum_of_lanes(sums + q * kernels.lanes, kernels.lanes);
    return sums;
  }

  void score(const LayerPlan& plan, const T* packed, int64_t row, int64_t rows, const Tile<T>& tile, bool add) const {
    const FactoredLayer& layer = plan.layer;
    const int64_t ldu = this->ld(layer.k_out), ldv = this->ld(layer.k_in), ld = this->score_ld();
    const Part part = this->part(layer, row, rows, tile.decoded);
    this->stage(part, 0, layer.k_out, rows, tile.u);
    this->stage(part, layers.rank * layer.k_out, layer.k_in, rows, tile.v);
    for (const Panel& panel : plan.panels) {
      this->factor_kernels.rebuild(tile.u + panel.out, ldu, tile.v + panel.in, ldv, layers.rank, rows, panel.outs,
                                   panel.ins, tile.a, kTileLd);
      multiply(panel, packed + panel.packed, rows, tile, panel.packed > plan.panels[0].packed);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = scores_of(tile, r);
      T* to = tile.scores + r * ld;
      for (int64_t q = 0; q < n_queries; ++q) to[q] = add ? to[q] + from[q] : from[q];
    }
  }
};

template <class Way>
std::vector<Group> plan_groups(const Way& way) {
  std::vector<Group> groups(1);
  for (const FactoredLayer& layer : way.layers.layers) {
    if (layer.size() == 0) continue;
    if (groups.back().packed > 0 && groups.back().packed + layer.size() * way.n_queries > kGroup) groups.emplace_back();
    Group& group = groups.back();
    group.layers.push_back({layer, {}});
    way.plan(layer, group.layers.back().panels, group.packed);
    for (size_t panel = 0; panel < group.layers.back().panels.size(); ++panel) {
      group.tasks.push_back({group.layers.size() - 1, panel});
    }
  }
  return groups;
}

// out [queries, rows] (+)= scores [rows][queries]
template <typename T>
void write_scores(const T* scores, int64_t ld, int64_t rows, int64_t queries, T* out, int64_t out_ld, bool add) {
  for (int64_t q = 0; q < queries; ++q) {
    T* to = out + q * out_ld;
    for (int64_t r = 0; r < rows; ++r) to[r] = add ? to[r] + scores[r * ld + q] : scores[r * ld + q];
  }
}

template <typename T, class Way>
void run(const Way& way, T* out, int64_t n_rows, int n_threads) {
  const std::vector<Group> groups = plan_groups(way);
  int64_t packed_size = 0, u_size = 0, v_size = 0, a_size = 0, columns = 0, decoded_ld = 0;
  for (const Group& group : groups) {
    packed_size = std::max(packed_size, group.packed);
    for (const LayerPlan& plan : group.layers) {
      const int64_t vectors = round_up(way.vectors(), way.kernels.row_tile);
      u_size = std::max(u_size, vectors * way.ld(plan.layer.k_out));
      v_size = std::max(v_size, way.v_size(plan.layer));
      a_size = std::max(a_size, way.a_size(plan.layer));
      decoded_ld = std::max(decoded_ld, way.decoded_ld(plan.layer));
      columns = std::max(columns, way.product_columns(plan.layer));
    }
  }
  const int64_t pack_size = way.kernels.lanes * kTileLd;
  const int64_t product_size = round_up(way.vectors(), way.kernels.row_tile) * way.ld(columns);
  const int64_t score_size = round_up(way.tile_rows, way.kernels.row_tile) * way.score_ld();
  const int64_t decoded_size = way.tile_rows * decoded_ld;
  const int64_t size =
      round_up(pack_size + u_size + v_size + a_size + product_size + score_size + decoded_size, kCacheLine);
  const Buffer<T> packed(packed_size), scratch(size * n_threads);
  std::fill_n(scratch.data(), size * n_threads, T{0});

#pragma omp parallel num_threads(n_threads)
  {
    const TileScope tiles;
    T* mine = scratch.data() + size * omp_get_thread_num();
    Tile<T> tile;
    tile.pack = mine;
    tile.u = tile.pack + pack_size;
    tile.v = tile.u + u_size;
    tile.a = tile.v + v_size;
    tile.product = tile.a + a_size;
    tile.scores = tile.product + product_size;
    tile.decoded = tile.scores + score_size;
    for (const Group& group : groups) {
#pragma omp for schedule(static)
      for (size_t task = 0; task < group.tasks.size(); ++task) {
        const LayerPlan& plan = group.layers[group.tasks[task].first];
        const Panel& panel = plan.panels[group.tasks[task].second];
        way.pack(plan.layer, panel, packed.data() + panel.packed, tile.pack);
      }
#pragma omp for schedule(dynamic)
      for (int64_t row = 0; row < n_rows; row += way.tile_rows) {
        const int64_t rows = std::min(way.tile_rows, n_rows - row);
        for (size_t l = 0; l < group.layers.size(); ++l)
          way.score(group.layers[l], packed.data(), row, rows, tile, l > 0);
        write_scores(tile.scores, way.score_ld(), rows, way.n_queries, out + row, n_rows, &group != &groups[0]);
      }
    }
  }
}

// Whether v is multiplied first: the flops of that grow with the rank, those of rebuilding do not grow with the
// queries.
bool contracts(int64_t queries, int64_t rank) {
  // multiply-adds of a query that rebuilding a number once costs, measured; less where few queries take dot products
  const int64_t rebuild_cost = queries <= kFew ? 8 : 12;
  return rank == 1 || queries * (rank - 1) <= rebuild_cost;
}

template <typename T>
void score(const Rows& queries, const Rows& factors, const EncodedRows* encoded, const Factored& layers, T* out,
           Shape shape, int n_threads) {
  if (shape.queries == 0 || shape.rows == 0) return;
  if (layers.columns == 0) {
    std::fill_n(out, shape.queries * shape.rows, T{0});
    return;
  }
  n_threads = threads_for(double(shape.rows) * layers.columns * std::min(shape.queries, kQueries), n_threads);
  for (int64_t q = 0; q < shape.queries; q += kQueries) {
    const int64_t count = std::min(kQueries, shape.queries - q);
    const bool contracted = contracts(count, layers.rank);
    const Products<T>& products = contracted ? lgk::products<T>(queries.dtype, factors.dtype) : kernels<T>();
    const int64_t vectors = contracted ? kTileVectors : std::min(kStagedVectors, kTileVectors * layers.rank);
    const int64_t most = std::max(products.row_tile, vectors / layers.rank / products.row_tile * products.row_tile);
    const int64_t tile_rows = std::min(most, round_up(ceil_div(shape.rows, n_threads), products.row_tile));
    const Base<T> base = {kernels<T>(), factor_kernels<T>(), products, queries.from(q), factors, encoded, layers, count,
                          tile_rows};
    T* to = out + q * shape.rows;
    if (contracted) {
      run<T>(Contracted<T>{base}, to, shape.rows, n_threads);
    } else if (count <= kFew) {
      run<T>(Rebuilt<T, true>{base}, to, shape.rows, n_threads);
    } else {
      run<T>(Rebuilt<T, false>{base}, to, shape.rows, n_threads);
    }
  }
}

}  // namespace

template <typename T>
void score_factored(const Rows& queries, const Rows& factors, const Factored& layers, T* out, Shape shape,
                    int n_threads) {
  score<T>(queries, factors, nullptr, layers, out, shape, n_threads);
}

void score_encoded(const Rows& queries, const EncodedRows& factors, const Factored& layers, float* out, Shape shape,
                   int n_threads) {
  score<float>(queries, matrix(nullptr, Dtype::kF32, 0, 1), &factors, layers, out, shape, n_threads);
}

template void score_factored<float>(const Rows&, const Rows&, const Factored&, float*, Shape, int);
template void score_factored<double>(const Rows&, const Rows&, const Factored&, double*, Shape, int);

}  // namespace lgk::score_factored
