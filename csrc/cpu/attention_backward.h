// Attention backward: tiles of scores are made anew, and weights from them and lse.
#pragma once
#include "cpu/attention_tile.h"

namespace fastseq::FASTSEQ_ISA {

// Tiles of queries whose gradients are one task, where tasks are split by queries.
constexpr int64_t kChunkTiles = 4;

// Queries of a tile, which sums over queries are made of.
template <typename T>
constexpr int64_t kBackwardQueries = FASTSEQ_VECTOR_BYTES == 64 ? 2 * kPanel<T> : 48;

template <typename T>
struct AttentionBackwardPass : Attention<T, AttentionBackward<T>, kBackwardQueries<T>> {
  using Base = Attention<T, AttentionBackward<T>, kBackwardQueries<T>>;
  using Base::E, Base::Ev, Base::group, Base::H, Base::Hk, Base::kStride, Base::L, Base::S, Base::value_width,
      Base::width;
  using typename Base::Sequence;
  using typename Base::Tile;

  // A task is what one thread does: the sequences and heads that add to the same bias, in order. Where these are fewer
  // than threads, each of their tiles of keys is a task, and then, since those add to the same queries, so is each
  // chunk of queries, with scores made a second time.
  int64_t sample_groups, head_groups;
  bool split;
  int64_t padded_queries;  // of a head, in whole tiles

  AttentionBackwardPass(const AttentionBackward<T>& call, int threads) : Base(call) {
    sample_groups = this->dbias && !this->d_n ? std::min<int64_t>(1, this->sequences) : this->sequences;
    head_groups = this->dbias && !this->d_h ? std::min<int64_t>(1, Hk) : Hk;
    split = sample_groups * head_groups < threads && !(this->dbias && !this->d_s);
    padded_queries = std::max<int64_t>(1, this->blocks(this->longest_q)) * kStride;
  }

  // A member's scratch.
  struct Desk {
    T *q, *dout;              // packed tiles of queries, scaled, and of out's gradients, of the heads that share keys,
    T *q_rows, *dout_rows;    // and as the right-hand side of products over queries
    T *base, *share, *delta;  // weights are exp(score - base) * share, and delta is dout . out - dlse
    T *k, *v, *k_rows, *zeros;  // a tile of keys and values, copied if need be, and packed; a row of padding
    const T *keys, *values;
    bool keys_finite;
    T *dq, *dk, *dv;                         // sums
    T *scores, *dscores, *slopes, *factors;  // of a tile
    T* out;                                  // packed
    T *largest, *weight, *shrink;            // of its queries
    int64_t sequence = -1, head = -1;        // whose queries are packed
  };

  Desk desk(Pieces<T>& pieces) const {
    Desk desk{};
    const int64_t queries = group * padded_queries, scores = kTileKeys * kStride;
    desk.q = pieces.take(queries * E);
    desk.dout = pieces.take(queries * Ev);
    desk.q_rows = pieces.take(queries * width);
    desk.dout_rows = pieces.take(queries * value_width);
    for (T** of_each : {&desk.base, &desk.share, &desk.delta}) *of_each = pieces.take(queries);
    desk.k = pieces.take(kTileKeys * E);
    desk.v = pieces.take(kTileKeys * Ev);
    desk.k_rows = pieces.take(kTileKeys * width);
    desk.zeros = pieces.take(E);
    desk.dq = pieces.take(this->dq.data ? queries * width : 0);
    desk.dk = pieces.take(kTileKeys * width);
    desk.dv = pieces.take(kTileKeys * value_width);
    desk.scores = pieces.take(scores);
    desk.dscores = pieces.take(scores);
    desk.slopes = pieces.take(this->softcap ? scores : 0);
    desk.factors = pieces.take(this->dropout ? scores : 0);
    desk.out = pieces.take(kStride * Ev);
    for (T** of_each : {&desk.largest, &desk.weight, &desk.shrink}) *of_each = pieces.take(kStride);
    return desk;
  }

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    this->lay_out_desks(pieces, members, [&](Pieces<T>& of_one) { desk(of_one); });
    return pieces.count;
  }

  void run(int rank, Team&) const {
    Pieces<T> mine = this->desk_at(rank);
    Desk desk = this->desk(mine);
    std::fill_n(desk.zeros, E, T(0));
    const int64_t groups = sample_groups * head_groups, chunk = kChunkTiles * kStride;
    const int64_t tiles = split ? (this->longest_k + kTileKeys - 1) / kTileKeys : 1;
    const int64_t chunks = split && this->dq.data ? (this->longest_q + chunk - 1) / chunk : 0;
    const int64_t first_part = groups * tiles, second_part = this->sequences * Hk * chunks;
    for (int64_t task; (task = this->next.fetch_add(1, std::memory_order_relaxed)) < first_part + second_part;) {
      if (task >= first_part) {
        const int64_t at = task - first_part, first = at % chunks * chunk;
        const Sequence seq = this->sequence(at / chunks / Hk);
        chunk_of_queries(desk, seq, at / chunks % Hk, first, std::min(seq.L, first + chunk));
        continue;
      }
      const int64_t samples = this->sequences / sample_groups, heads = Hk / head_groups, at = task / tiles;
      for (int64_t i = 0; i < samples; ++i)
        for (int64_t j = 0; j < heads; ++j)
          keys_of(desk, this->sequence(at / head_groups * samples + i), at % head_groups * heads + j,
                  split ? task % tiles : -1);
    }
  }

  // Gradients of a head's keys, of all of them and of the queries, or of one tile of keys.
  void keys_of(Desk& my, const Sequence& seq, int64_t head, int64_t only) const {
    const int64_t first = std::max<int64_t>(0, only) * kTileKeys,
                  last = only < 0 ? seq.S : std::min(seq.S, first + kTileKeys);
    if (only >= 0 && first >= last) return;
    pack_heads(my, seq, head);
    const bool with_queries = only < 0 && this->dq.data;
    for (int64_t g = 0; with_queries && g < group; ++g)
      std::fill_n(queries_of(my.dq, width, g, 0), seq.L * width, T(0));
    for (int64_t s = first; s < last; s += kTileKeys) {
      const int64_t count = std::min(kTileKeys, last - s);
      std::fill_n(my.dk, count * width, T(0));
      std::fill_n(my.dv, count * value_width, T(0));
      const int64_t from = this->first_query(seq, s), to = this->end_query(seq, s + count);
      if (from < to && this->padded_keys(seq, s, count) < count) {
        pack_tile(my, seq, head, s, count);
        for (int64_t g = 0; g < group; ++g)
          for (int64_t i = from / kStride * kStride; i < to; i += kStride)
            tile_backward(my, seq, g, {head * group + g, i, std::min(kStride, seq.L - i), s, count}, true,
                          with_queries);
      }
      write(this->dk, my.dk, width, E, seq.sample, head, seq.k0 + s, count, this->scale);
      write(this->dv, my.dv, value_width, Ev, seq.sample, head, seq.k0 + s, count, T(1));
    }
    if (with_queries) write_queries(my, seq, head, 0, seq.L);
  }

  // Gradients of queries [l, end) that share a head of keys.
  void chunk_of_queries(Desk& my, const Sequence& seq, int64_t head, int64_t l, int64_t end) const {
    if (l >= end) return;
    pack_heads(my, seq, head);
    for (int64_t g = 0; g < group; ++g) std::fill_n(queries_of(my.dq, width, g, l), (end - l) * width, T(0));
    const int64_t first = this->first_key(seq, l) / kTileKeys * kTileKeys, last = this->end_key(seq, end - 1);
    for (int64_t s = first; s < last; s += kTileKeys) {
      const int64_t count = std::min(kTileKeys, seq.S - s);
      if (this->padded_keys(seq, s, count) == count) continue;
      pack_tile(my, seq, head, s, count);
      for (int64_t g = 0; g < group; ++g)
        for (int64_t i = l; i < end; i += kStride)
          tile_backward(my, seq, g, {head * group + g, i, std::min(kStride, end - i), s, count}, false, true);
    }
    write_queries(my, seq, head, l, end);
  }

  // What there is of query l of the g-th head that shares keys, so many elements wide.
  T* queries_of(T* all, int64_t elements, int64_t g, int64_t l) const {
    return all + (g * padded_queries + l) * elements;
  }

  void write(const Heads& to, const T* from, int64_t stride, int64_t count, int64_t sample, int64_t head, int64_t place,
             int64_t rows, T by) const {
    if (to.data) Base::write(to, from, stride, count, sample, head, place, rows, [&](int64_t) { return by; });
  }

  void write_queries(Desk& my, const Sequence& seq, int64_t head, int64_t l, int64_t end) const {
    for (int64_t g = 0; g < group; ++g)
      write(this->dq, queries_of(my.dq, width, g, l), width, E, seq.sample, head * group + g, seq.q0 + l, end - l,
            this->scale);
  }

  // All queries of the heads that share a head of keys, and what belongs to them.
  void pack_heads(Desk& my, const Sequence& seq, int64_t head) const {
    if (my.sequence == seq.index && my.head == head) return;
    my.sequence = seq.index, my.head = head;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = head * group + g;
      pack_rows(this->q, E, seq, h, queries_of(my.q_rows, width, g, 0));
      pack_rows(this->dout, Ev, seq, h, queries_of(my.dout_rows, value_width, g, 0));
      for (int64_t l = 0; l < seq.L; l += kStride) {
        const Tile tile{h, l, std::min(kStride, seq.L - l), 0, 0};
        T* dout = queries_of(my.dout, Ev, g, l);
        this->pack_queries(this->q, E, seq, tile, this->scale, queries_of(my.q, E, g, l));
        this->pack_queries(this->dout, Ev, seq, tile, 1, dout);
        this->pack_queries(this->out, Ev, seq, tile, 1, my.out);
        for (int64_t i = 0; i < tile.width(); i += kLanes<T>) {
          const int64_t panel = i / kPanel<T> * kPanel<T> * Ev + i % kPanel<T>;
          Vec<T> total{};  // in the order of products with values, which it cancels where one weight is 1
          for (int64_t e = 0; e < Ev; ++e)
            total += load(dout + panel + e * kPanel<T>) * load(my.out + panel + e * kPanel<T>);
          store(queries_of(my.delta, 1, g, l + i), total);
        }
      }
      for (int64_t l = 0; this->dlse && l < seq.L; ++l)
        *queries_of(my.delta, 1, g, l) -= this->dlse[this->lse_at(seq, h, l)];
    }
    relate(my, seq, head);
  }

  void pack_rows(const Heads& from, int64_t K, const Sequence& seq, int64_t h, T* to) const {
    const Columns<T> columns{K};
    with_stored<T>(this->stored, [&](auto element) {
      using Element = decltype(element);
      const auto row = [&](int64_t l) -> const Element* {
        return from.template row<Element>(seq.sample, h, seq.q0 + l);
      };
      fastseq::FASTSEQ_ISA::pack_rows<T, Element>(columns, 0, columns.panels(), row, seq.L, to);
    });
  }

  // What weights are taken relative to: lse, but where that is large, as with masks of large numbers, nothing is left
  // in it of the sum's logarithm. There the largest score and the sum are made anew.
  void relate(Desk& my, const Sequence& seq, int64_t head) const {
    constexpr T kLarge = sizeof(T) == 4 ? T(64) : T(1024);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t l = 0; l < seq.L; l += kStride) {
        Tile tile{head * group + g, l, std::min(kStride, seq.L - l), 0, 0};
        const T* lse = this->lse + this->lse_at(seq, tile.h, l);
        T *base = queries_of(my.base, 1, g, l), *share = queries_of(my.share, 1, g, l);
        std::fill_n(base, kStride, T(0));
        std::fill_n(share, kStride, T(0));
        bool any = false;
        for (int64_t r = 0; r < tile.queries; ++r) {
          if (lse[r] == Base::kMinusInfinity) continue;
          base[r] = lse[r], share[r] = 1;
          any = any || std::abs(lse[r]) > kLarge;
        }
        if (!any) continue;
        std::fill_n(my.largest, kStride, Base::kMinusInfinity);
        std::fill_n(my.weight, kStride, T(0));
        for (int64_t s = 0; s < seq.S; s += kTileKeys) {
          tile.s = s, tile.keys = std::min(kTileKeys, seq.S - s);
          if (!this->narrow(seq, tile) || this->left_out(seq, tile)) continue;
          const T* keys = this->rows_of(this->k, E, seq, head, tile.s, tile.keys, my.k);
          this->multiply(seq, tile, keys, E, queries_of(my.q, E, g, l), my.scores);
          this->finish_scores(seq, tile, my.scores);
          this->softmax(tile, my.scores, my.largest, my.weight, my.shrink, false);
        }
        for (int64_t r = 0; r < tile.queries; ++r)
          if (std::abs(lse[r]) > kLarge && lse[r] != Base::kMinusInfinity)
            base[r] = my.largest[r], share[r] = 1 / my.weight[r];
      }
  }

  void pack_tile(Desk& my, const Sequence& seq, int64_t head, int64_t s, int64_t count) const {
    my.keys = this->rows_of(this->k, E, seq, head, s, count, my.k);
    my.values = this->rows_of(this->v, Ev, seq, head, s, count, my.v);
    this->pack_keys(this->k, E, seq, head, s, count, my.zeros, my.k_rows);
    my.keys_finite = this->all_finite(this->packed_panels(my.k_rows, count), width / kPanel<T>, count);
  }

  // What the queries and the keys of a tile, whole as it was packed, give each other.
  void tile_backward(Desk& my, const Sequence& seq, int64_t g, const Tile& packed, bool with_keys,
                     bool with_queries) const {
    Tile tile = packed;
    if (!this->narrow(seq, tile) || this->left_out(seq, tile)) return;
    const int64_t l = tile.l, j = tile.s - packed.s;
    // As in forward, to the bit: scores that differ in rounding would make weights that do not sum to one.
    this->multiply(seq, tile, my.keys + j * E, E, queries_of(my.q, E, g, l), my.scores);
    this->multiply(seq, tile, my.values + j * Ev, Ev, queries_of(my.dout, Ev, g, l), my.dscores);
    if (!this->is_whole(seq, tile)) this->finish_scores(seq, tile, my.scores, this->softcap ? my.slopes : nullptr);
    if (this->dropout) this->draw_tile(seq, tile, my.factors);
    for (int64_t i = 0; i < tile.queries; i += kLanes<T>) weigh(my, g, tile, i);
    if (this->dbias && with_keys) add_to_bias(seq, tile, my.dscores);
    for (int64_t r = 0; this->softcap && r < tile.keys; ++r)
      for (int64_t u = r * kStride; u < r * kStride + tile.width(); u += kLanes<T>) {
        const Vec<T> ds = load(my.dscores + u);
        // Where a product was not made, the slope is that of anything.
        store(my.dscores + u, ds == T(0) ? ds : ds * load(my.slopes + u));
      }
    if (with_keys && this->dv.data)
      add_queries(seq, tile, my.scores, queries_of(my.dout_rows, value_width, g, 0), my.dv + j * value_width,
                  value_width);
    if (with_keys && this->dk.data)
      add_queries(seq, tile, my.dscores, queries_of(my.q_rows, width, g, 0), my.dk + j * width, width);
    if (with_queries)
      this->add_keys(seq, tile, my.dscores, this->packed_panels(my.k_rows, packed.keys).from(j),
                     queries_of(my.dq, width, g, l), width, my.keys_finite);
  }

  // Of a vector of queries: scores become weights, and products of values and out's gradients become the scores'.
  void weigh(Desk& my, int64_t g, const Tile& tile, int64_t i) const {
    constexpr T kLog2E = T(1.44269504088896340736);
    const auto of_queries = [&](T* all) { return load(queries_of(all, 1, g, tile.l + i)); };
    const Vec<T> base = of_queries(my.base), share = of_queries(my.share), delta = of_queries(my.delta);
    for (int64_t r = 0; r < tile.keys; ++r) {
      T *score = my.scores + r * kStride + i, *d = my.dscores + r * kStride + i;
      const Vec<T> p = exp2<T, true>((load(score) - base) * kLog2E) * share;
      Vec<T> kept = p, dp = load(d);
      if (this->dropout) {
        const Vec<T> factor = load(my.factors + r * kStride + i);
        kept *= factor, dp *= factor;
      }
      store(score, kept);
      // What is left out may stand opposite anything, NaN too.
      store(d, p == T(0) ? Vec<T>{} : p * (dp - delta));
    }
  }

  // The bias's gradient is that of the scores, summed over what it does not tell apart. Lanes beyond the last query
  // hold zeros.
  void add_to_bias(const Sequence& seq, const Tile& tile, const T* dscores) const {
    const auto at = [&](int64_t i, int64_t j) {
      return this->dbias + seq.sample * this->d_n + tile.h * this->d_h + (tile.l + i) * this->d_l +
             (tile.s + j) * this->d_s;
    };
    if (this->d_l && this->d_s)
      return this->in_rows(tile, dscores, [&](int64_t i, int64_t j, int lanes, Vec<T> ds) {
        T* to = at(i, j);
        store(to, load(to, lanes) + ds, lanes);
      });
    for (int64_t j = 0; this->d_s && j < tile.keys; ++j) {
      Vec<T> total{};
      for (int64_t i = 0; i < tile.queries; i += kLanes<T>) total += load(dscores + j * kStride + i);
      *at(0, j) += sum<T>(total);
    }
    for (int64_t i = 0; !this->d_s && i < tile.queries; i += kLanes<T>) {
      Vec<T> total{};
      for (int64_t j = 0; j < tile.keys; ++j) total += load(dscores + j * kStride + i);
      for (int r = 0; r < kLanes<T> && i + r < tile.queries; ++r) *at(i + r, 0) += total[r];
    }
  }

  // sums[keys][stride] += a tile times packed rows of queries, of a head with seq.L of them.
  void add_queries(const Sequence& seq, const Tile& tile, const T* left, const T* packed, T* sums,
                   int64_t stride) const {
    for (int64_t p = 0; p < stride / kPanel<T>; ++p)
      this->in_tiles(tile.keys, [&](int64_t from, int64_t to) {
        const int64_t first = std::max(tile.l, this->first_query(seq, tile.s + from));
        const int64_t end = std::min(tile.l + tile.queries, this->end_query(seq, tile.s + to));
        if (first >= end) return;
        const T* panel = packed + (p * seq.L + first) * kPanel<T>;
        tile_rows<T>(to - from, end - first, {left + from * kStride + first - tile.l, kStride}, panel,
                     sums + from * stride + p * kPanel<T>, stride, true, panel);
      });
  }
};

}  // namespace fastseq::FASTSEQ_ISA
