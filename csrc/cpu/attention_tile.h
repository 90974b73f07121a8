// Scaled dot product attention on the CPU: what all passes know about sequences, masks and tiles of scores. Formulas:
// fastseq/reference/attention.py.
//
// Scores exist a tile at a time: [kTileKeys][kStride] of keys and queries, in the cache. Queries are the vectors'
// lanes, so that a maximum or a sum over keys needs nothing but vectors, and keys are read where they are.
//
// What a row of out or of a gradient is summed up from, and in which order, depends on nothing but shapes: results are
// the same bits whatever the number of threads.
#pragma once
#include "cpu/attention.h"
#include "cpu/dropout_kernel.h"
#include "cpu/gemm.h"
#include "cpu/pass.h"

namespace fastseq::FASTSEQ_ISA {

// Keys of a tile: as many as dropout draws for at once.
constexpr int64_t kTileKeys = 128;
// Multiply-adds that are worth a thread.
constexpr int64_t kAttentionWorkPerThread = 192 * 1024;

// kQueries: queries of a tile, whole panels of them.
template <typename T, typename Call, int64_t kQueries>
struct Attention : Call {
  using Call::E, Call::Ev, Call::H, Call::Hk, Call::L, Call::S;

  struct Sequence {
    int64_t index, sample, q0, k0, L, S, offset;
  };
  // Queries [l, l + queries) of a head and keys [s, s + keys).
  struct Tile {
    int64_t h, l, queries, s, keys;
    int64_t width() const { return (queries + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  };

  static constexpr T kMinusInfinity = -__builtin_inf();
  static constexpr int64_t kStride = kQueries;

  int64_t width = padded(E), value_width = padded(Ev), group = Hk ? H / Hk : 0;
  int64_t longest_q = L, longest_k = S;
  bool bare = !this->softcap && !this->slopes && !this->bias && !this->allowed;  // only bounds and padding
  mutable std::atomic<int64_t> next{0};                                          // task to be done
  int64_t desk_size;                                                             // elements of a member's scratch
  T* desks;                                                                      // all members' one after the other

  explicit Attention(const Call& call) : Call(call) {
    if (!this->ends_q) return;
    longest_q = longest_k = 0;
    for (int64_t i = 0; i < this->sequences; ++i) {
      longest_q = std::max(longest_q, this->ends_q[i + 1] - this->ends_q[i]);
      longest_k = std::max(longest_k, this->ends_k[i + 1] - this->ends_k[i]);
    }
  }

  static int64_t padded(int64_t count) { return Columns<T>{count}.panels() * kPanel<T>; }

  // Tiles of queries that `count` queries take.
  static int64_t blocks(int64_t count) { return (count + kStride - 1) / kStride; }

  int team_size(const Threads& threads) const {
    const int64_t work = this->sequences * H * longest_q * longest_k * (E + Ev);
    const int64_t useful = work / kAttentionWorkPerThread + 1;
    return int(std::min<int64_t>({threads.count, Team::kMost, useful}));
  }

  // Lays out a desk, which is what desk_of(pieces) takes, for each member.
  template <typename DeskOf>
  void lay_out_desks(Pieces<T>& pieces, int members, const DeskOf& desk_of) {
    Pieces<T> one{nullptr};
    desk_of(one);
    desk_size = one.count;
    desks = pieces.take(members * desk_size);
  }
  Pieces<T> desk_at(int rank) const { return {desks + rank * desk_size}; }

  Sequence sequence(int64_t i) const {
    Sequence seq{i, i, 0, 0, L, S, 0};
    if (this->ends_q) {
      seq.sample = 0, seq.q0 = this->ends_q[i], seq.k0 = this->ends_k[i];
      seq.L = this->ends_q[i + 1] - seq.q0, seq.S = this->ends_k[i + 1] - seq.k0;
    }
    if (this->bottom_right) seq.offset = seq.S - seq.L;
    return seq;
  }

  int64_t lse_at(const Sequence& seq, int64_t h, int64_t l) const { return (seq.sample * H + h) * L + seq.q0 + l; }

  // The keys [first_key, end_key) that the bounds leave to query l.
  int64_t first_key(const Sequence& seq, int64_t l) const {
    return this->left < 0 ? 0 : std::min(seq.S, std::max<int64_t>(0, l + seq.offset - this->left));
  }
  int64_t end_key(const Sequence& seq, int64_t l) const {
    return this->right < 0 ? seq.S : std::min(seq.S, std::max<int64_t>(0, l + seq.offset + this->right + 1));
  }
  // The queries [first_query, end_query) to which they leave some of the keys [first, end).
  int64_t first_query(const Sequence& seq, int64_t first) const {
    return this->right < 0 ? 0 : std::min(seq.L, std::max<int64_t>(0, first - seq.offset - this->right));
  }
  int64_t end_query(const Sequence& seq, int64_t end) const {
    return this->left < 0 ? seq.L : std::min(seq.L, std::max<int64_t>(0, end - seq.offset + this->left));
  }

  // Leaves in a tile the keys that some of its queries see, as far as the bounds say; returns whether there are any.
  bool narrow(const Sequence& seq, Tile& tile) const {
    const int64_t first = std::max(tile.s, first_key(seq, tile.l));
    const int64_t end = std::min(tile.s + tile.keys, end_key(seq, tile.l + tile.queries - 1));
    tile.s = first, tile.keys = end - first;
    return first < end;
  }

  const bool* padding_of(const Sequence& seq) const { return this->padding ? this->padding + seq.sample * S : nullptr; }
  int64_t padded_keys(const Sequence& seq, int64_t s, int64_t count) const {
    const bool* padding = padding_of(seq);
    return padding ? std::count(padding + s, padding + s + count, true) : 0;
  }

  int64_t mask_at(const Sequence& seq, int64_t h, int64_t l, int64_t s) const {
    return seq.sample * this->m_n + h * this->m_h + l * this->m_l + s * this->m_s;
  }

  // Whether the padding or a boolean mask leaves nothing of a tile.
  bool left_out(const Sequence& seq, const Tile& tile) const {
    if (padded_keys(seq, tile.s, tile.keys) == tile.keys) return true;
    if (!this->allowed) return false;
    const int64_t columns = this->m_s ? tile.keys : 1, rows = this->m_l ? tile.queries : 1;
    for (int64_t l = tile.l; l < tile.l + rows; ++l)
      if (memchr(this->allowed + mask_at(seq, tile.h, l, tile.s), true, columns)) return false;
    return true;
  }

  // Whether softmax can take a tile's products as they are.
  bool is_whole(const Sequence& seq, const Tile& tile) const {
    return bare && first_query(seq, tile.s + tile.keys - 1) <= tile.l &&
           end_query(seq, tile.s + 1) >= tile.l + tile.queries && padded_keys(seq, tile.s, tile.keys) == 0;
  }

  // Queries, or what else has their layout, as the packed right-hand side of a tile's products, times `by`.
  void pack_queries(const Heads& from, int64_t K, const Sequence& seq, const Tile& tile, T by, T* to) const {
    const Columns<T> queries{tile.queries};
    with_stored<T>(this->stored, [&](auto element) {
      const auto* first = from.template row<decltype(element)>(seq.sample, tile.h, seq.q0 + tile.l);
      pack_transposed(queries, 0, queries.panels(), first, from.l, K, to);
    });
    for (int64_t i = 0; by != 1 && i < queries.panels() * kPanel<T> * K; i += kLanes<T>)
      store(to + i, load(to + i) * by);
  }

  // Rows of keys or values, K wide, one after the other: where they are, or in `to`.
  const T* rows_of(const Heads& from, int64_t K, const Sequence& seq, int64_t head, int64_t s, int64_t count,
                   T* to) const {
    if (this->stored == Stored::kSame && from.l == K) return from.template row<const T>(seq.sample, head, seq.k0 + s);
    with_stored<T>(this->stored, [&](auto element) {
      for (int64_t j = 0; j < count; ++j) {
        const auto* row = from.template row<decltype(element)>(seq.sample, head, seq.k0 + s + j);
        for (int64_t e = 0; e < K; e += kLanes<T>) {
          const int lanes = int(std::min<int64_t>(kLanes<T>, K - e));
          store(to + j * K + e, load_as<T>(row + e, lanes), lanes);
        }
      }
    });
    return to;
  }

  // The same as the packed right-hand side of products over keys. Those that are padding become `zeros`.
  void pack_keys(const Heads& from, int64_t K, const Sequence& seq, int64_t head, int64_t s, int64_t count,
                 const T* zeros, T* to) const {
    const Columns<T> columns{K};
    const bool* padding = padding_of(seq);
    with_stored<T>(this->stored, [&](auto element) {
      using Element = decltype(element);
      const auto row = [&](int64_t j) -> const Element* {
        return padding && padding[s + j] ? reinterpret_cast<const Element*>(zeros)
                                         : from.template row<Element>(seq.sample, head, seq.k0 + s + j);
      };
      pack_rows<T, Element>(columns, 0, columns.panels(), row, count, to);
    });
  }

  // Rows of sums, `stride` apart, times factor(row), as rows of an output.
  template <typename Factor>
  void write(const Heads& to, const T* from, int64_t stride, int64_t count, int64_t sample, int64_t head, int64_t place,
             int64_t rows, const Factor& factor) const {
    with_stored<T>(this->stored, [&](auto element) {
      for (int64_t r = 0; r < rows; ++r) {
        auto* row = to.template row<decltype(element)>(sample, head, place + r);
        const T by = factor(r);
        for (int64_t e = 0; e < count; e += kLanes<T>)
          store_as<T>(row + e, load(from + r * stride + e) * by, int(std::min<int64_t>(kLanes<T>, count - e)));
      }
    });
  }

  // Calls body(from, to) on `count` rows in tiles of as equal a height as possible.
  template <typename Body>
  static FASTSEQ_INLINE void in_tiles(int64_t count, const Body& body) {
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    for (int64_t i = 0; i < tiles; ++i) body(count * i / tiles, count * (i + 1) / tiles);
  }

  // Rows that are to come into the L2 cache while something else is multiplied, a line of each of them after the other.
  struct Ahead {
    struct Piece {
      const T* data;
      int64_t row, rows, width;
    };
    static constexpr int kPieces = 4;
    Piece pieces[kPieces];
    int piece;
    int64_t row, column;  // of the next line

    // The lines of so many rows.
    Panel<T> take(int64_t count, const T* otherwise) {
      for (; piece < kPieces; ++piece, column = 0) {
        const Piece& of = pieces[piece];
        if (column < of.width) {
          const Panel<T> lines{of.data + row * of.row + column, of.row};
          row += count;
          if (row >= of.rows) row = 0, column += kLine<T>;
          return lines;
        }
      }
      return {otherwise, kLine<T>};
    }
  };

  // products[keys][kStride] = rows[keys][K] times packed queries, where the bounds leave something.
  void multiply(const Sequence& seq, const Tile& tile, const T* rows, int64_t K, const T* packed, T* products,
                Ahead* ahead = nullptr) const {
    in_tiles(tile.keys, [&](int64_t from, int64_t to) {
      const int64_t first = first_query(seq, tile.s + from) - tile.l;
      const int64_t end = std::min(tile.queries, end_query(seq, tile.s + to) - tile.l);
      for (int64_t i = std::max<int64_t>(0, first) / kPanel<T> * kPanel<T>; i < end; i += kPanel<T>)
        tile_rows<T>(to - from, K, {rows + from * K, K}, packed + i * K, products + from * kStride + i, kStride, false,
                     ahead ? ahead->take(K, packed + i * K) : Panel<T>{packed + i * K, kLine<T>});
    });
  }

  // Keys or values as the right-hand side of products over keys: panels of their columns, `gap` apart.
  struct Panels {
    const T* data;
    int64_t gap, row;  // between panels and between keys
    Panel<T> at(int64_t p, int64_t key) const { return {data + p * gap + key * row, row}; }
    Panels from(int64_t key) const { return {data + key * row, gap, row}; }
  };
  static Panels packed_panels(const T* packed, int64_t keys) { return {packed, keys * kPanel<T>, kPanel<T>}; }

  // sums[queries][stride] += a tile, transposed, times its keys or values, where the bounds leave something. Where they
  // may hold infinities or NaN, a 0 on the left leaves these out.
  void add_keys(const Sequence& seq, const Tile& tile, const T* left, const Panels& right, T* sums, int64_t stride,
                bool finite) const {
    for (int64_t p = 0; p < stride / kPanel<T>; ++p)
      in_tiles(tile.queries, [&](int64_t from, int64_t to) {
        const int64_t first = std::max<int64_t>(0, first_key(seq, tile.l + from) - tile.s);
        const int64_t end = std::min(tile.keys, end_key(seq, tile.l + to - 1) - tile.s);
        if (first >= end) return;
        const T* some = left + first * kStride + from;
        const Panel<T> panel = right.at(p, first);
        T* out = sums + from * stride + p * kPanel<T>;
        if (finite)
          tile_rows<T, true>(to - from, end - first, {some, kStride}, panel, out, stride, true, panel.data);
        else
          add_but_zeros(to - from, end - first, some, panel, out, stride);
      });
  }

  static void add_but_zeros(int64_t rows, int64_t count, const T* left, Panel<T> panel, T* sums, int64_t stride) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t r = 0; r < rows; ++r)
        for (int u = 0; left[j * kStride + r] != 0 && u < kPanel<T>; ++u)
          sums[r * stride + u] += left[j * kStride + r] * panel.data[j * panel.stride + u];
  }

  // Whether so many keys' elements are all finite.
  static bool all_finite(const Panels& of, int64_t panels, int64_t keys) {
    Vec<T> product{};
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t j = 0; j < keys; ++j)
        for (int v = 0; v < kPanelVectors; ++v) product += load(of.at(p, j).data + v * kLanes<T>) * T(0);
    return sum<T>(product) == 0;
  }

  // Turns scaled products into scores: softcap, biases, then -inf for what is left out. `slopes`, if given, gets the
  // softcap's derivative.
  void finish_scores(const Sequence& seq, const Tile& tile, T* scores, T* slopes = nullptr) const {
    const int64_t width = tile.width();
    for (int64_t j = 0; this->softcap && j < tile.keys; ++j)
      for (int64_t i = j * kStride; i < j * kStride + width; i += kLanes<T>) {
        const Vec<T> t = tanh<T>(load(scores + i) / this->softcap);
        store(scores + i, t * this->softcap);
        if (slopes) store(slopes + i, T(1) - t * t);
      }
    if (this->slopes) {
      const T by = this->slopes[tile.h];
      for (int64_t j = 0; j < tile.keys; ++j) {
        const int32_t ahead = int32_t(tile.s + j - tile.l - seq.offset);
        for (int32_t i = 0; i < int32_t(width); ++i) scores[j * kStride + i] -= by * T(std::abs(ahead - i));
      }
    }
    if (this->bias || this->allowed) add_mask(seq, tile, scores);
    if (const bool* padding = padding_of(seq))
      for (int64_t j = 0; j < tile.keys; ++j)
        if (padding[tile.s + j]) std::fill_n(scores + j * kStride, width, kMinusInfinity);
    for (int64_t j = 0; j < tile.keys; ++j) {
      T* row = scores + j * kStride;
      const int64_t from = std::min(width, std::max<int64_t>(0, first_query(seq, tile.s + j) - tile.l));
      const int64_t to = std::min(width, std::max(from, end_query(seq, tile.s + j + 1) - tile.l));
      std::fill(row, row + from, kMinusInfinity);
      std::fill(row + to, row + width, kMinusInfinity);
    }
  }

  // Boolean masks as numbers to be added: -inf where a key is left out.
  static FASTSEQ_INLINE Vec<T> as_numbers(const bool* seen) {
    typename Simd<T>::Int lanes[kLanes<T>];
    for (int k = 0; k < kLanes<T>; ++k) lanes[k] = seen[k];
    typename Simd<T>::IntVec vector;
    memcpy(&vector, lanes, sizeof vector);
    return vector != 0 ? Vec<T>{} : kMinusInfinity - Vec<T>{};
  }

  // Some keys of a row of the mask as numbers to be added; `at` as mask_at says.
  FASTSEQ_INLINE Vec<T> mask_row(int64_t at, int keys) const {
    if (this->bias) return this->m_s ? load(this->bias + at, keys) : this->bias[at] - Vec<T>{};
    bool seen[kLanes<T>] = {};
    for (int k = 0; k < keys; ++k) seen[k] = this->allowed[at + k * this->m_s];
    return as_numbers(seen);
  }

  void add_mask(const Sequence& seq, const Tile& tile, T* scores) const {
    constexpr int n = kLanes<T>;
    const Vec<T> never = kMinusInfinity - Vec<T>{};
    in_squares(tile, [&](int64_t i, int rows, int64_t j, int keys) {
      const int64_t at = mask_at(seq, tile.h, tile.l + i, tile.s + j), gap = this->m_l;
      const auto add = [&](int count, const auto& of_key) __attribute__((always_inline)) {
        for (int k = 0; k < count; ++k) {
          T* score = scores + (j + k) * kStride + i;
          const Vec<T> more = of_key(k);
          // Not a sum with -inf, which a NaN in a key that is left out would survive.
          store(score, more == never ? never : load(score) + more);
        }
      };
      const auto add_turned = [&](int count, const auto& row) __attribute__((always_inline)) {
        Vec<T> square[n];
        for (int r = 0; r < n; ++r) square[r] = row(r);
        transpose<T>(square);
        add(count, [&](int k) { return square[k]; });
      };
      if (!gap) {
        const Vec<T> same = mask_row(at, keys);
        add(keys, [&](int k) { return same[k] - Vec<T>{}; });
      } else if (rows < n || keys < n || !this->m_s) {
        add_turned(keys, [&](int r) { return r < rows ? mask_row(at + r * gap, keys) : Vec<T>{}; });
      } else if (this->bias) {
        add_turned(n, [&](int r) { return load(this->bias + at + r * gap); });
      } else {
        add_turned(n, [&](int r) { return as_numbers(this->allowed + at + r * gap); });
      }
    });
  }

  // Calls body(query, queries, key, keys) on squares of a tile, kLanes wide and high but at its ends.
  template <typename Body>
  static FASTSEQ_INLINE void in_squares(const Tile& tile, const Body& body) {
    for (int64_t i = 0; i < tile.queries; i += kLanes<T>)
      for (int64_t j = 0; j < tile.keys; j += kLanes<T>)
        body(i, int(std::min<int64_t>(kLanes<T>, tile.queries - i)), j,
             int(std::min<int64_t>(kLanes<T>, tile.keys - j)));
  }

  // Calls put(query, key, lanes, vector) with vectors of keys of each query of a tile.
  template <typename Put>
  static FASTSEQ_INLINE void in_rows(const Tile& tile, const T* scores, const Put& put) {
    in_squares(tile, [&](int64_t i, int rows, int64_t j, int keys) {
      Vec<T> square[kLanes<T>];
      for (int k = 0; k < kLanes<T>; ++k) square[k] = k < keys ? load(scores + (j + k) * kStride + i) : Vec<T>{};
      transpose<T>(square);
      for (int r = 0; r < rows; ++r) put(i + r, j, keys, square[r]);
    });
  }

  // A step of the online softmax: scores become exp(score - largest), with largest[queries] and the sums
  // weight[queries] brought up to date. Returns whether earlier sums have to be multiplied by shrink[queries].
  bool softmax(const Tile& tile, T* scores, T* largest, T* weight, T* shrink, bool whole) const {
    constexpr T kLog2E = T(1.44269504088896340736);
    bool shrinks = false;
    for (int64_t i = 0; i < tile.queries; i += kLanes<T>) {
      T* column = scores + i;
      constexpr int kChains = 4;  // a maximum's latency
      Vec<T> highs[kChains];
      for (int c = 0; c < kChains; ++c) highs[c] = load(column);
      int64_t j = 0;
      for (; j + kChains <= tile.keys; j += kChains)
        for (int c = 0; c < kChains; ++c) highs[c] = larger<T>(highs[c], load(column + (j + c) * kStride));
      for (; j < tile.keys; ++j) highs[0] = larger<T>(highs[0], load(column + j * kStride));
      const Vec<T> before = load(largest + i), never = kMinusInfinity - Vec<T>{};
      const Vec<T> top = larger<T>(before, larger<T>(larger<T>(highs[0], highs[1]), larger<T>(highs[2], highs[3])));
      const Vec<T> base = top == never ? Vec<T>{} : top;
      bool vanishes = !whole;  // or if every score of a query has overflowed
      for (int r = 0; r < kLanes<T>; ++r) vanishes |= top[r] == kMinusInfinity;
      const Vec<T> shrunk = exp2<T, true>((before - base) * kLog2E);
      const auto weigh = [&](auto may_vanish) __attribute__((always_inline)) {
        Vec<T> total{};
        for (int64_t k = 0; k < tile.keys; ++k) {
          const Vec<T> p = exp2<T, may_vanish>((load(column + k * kStride) - base) * kLog2E);
          store(column + k * kStride, p);
          total += p;
        }
        return total;
      };
      const Vec<T> total = vanishes ? weigh(std::true_type()) : weigh(std::false_type());
      store(shrink + i, shrunk);
      for (int r = 0; r < kLanes<T>; ++r) shrinks |= shrink[i + r] != 1 && weight[i + r] != 0;
      store(largest + i, top);
      store(weight + i, load(weight + i) * shrunk + total);
    }
    return shrinks;
  }

  // The head's weights among all matrices that dropout is drawn for.
  uint32_t matrix(const Sequence& seq, int64_t h) const { return uint32_t(seq.index * H + h); }

  // Dropout's factors of a tile.
  void draw_tile(const Sequence& seq, const Tile& tile, T* factors) const {
    static_assert(kStride % kCounters == 0 && kTileKeys == kDrawn);
    const int64_t first = tile.s / kTileKeys * kTileKeys;
    for (int64_t counter = 0; counter < kCounters; ++counter)
      for (int64_t i = 0; i < tile.queries; i += kCounters) {
        Draws<T> draws;
        for (int k = 0; k < kCounters; ++k) {
          draws.columns[k] = uint32_t(first / kTileKeys * kCounters + counter);
          draws.rows[k] = uint32_t(tile.l + i + k);
        }
        draw(this->dropout, matrix(seq, tile.h), draws);
        for (int half = 0; half < kHalves; ++half) {
          const int64_t j = first + half * kCounters + counter - tile.s;
          if (j >= 0 && j < tile.keys) std::copy_n(draws.factors[half], kCounters, factors + j * kStride + i);
        }
      }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
