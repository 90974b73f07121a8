// Attention forward. Of each query there are the largest score so far, the sum of exp(score - largest) and the sum of
// values so weighted, which are rescaled when a larger score comes (online softmax, Milakov and Gimelshein 2018; Dao et
// al. 2022). Tiles whose every key is left out are not computed.
#pragma once
#include "cpu/attention_tile.h"

namespace fastseq::FASTSEQ_ISA {

// Packed keys and values that one tile of queries after the other reads stay in the L2 cache.
constexpr int64_t kPackedBytes = 256 * 1024;
// Tiles of queries that share a packing of keys and values: so many that packing hardly counts. Where there are no more
// than a few, values are better read where they are: if one lies behind the other, or they would share few of the sets
// of the L1 cache.
constexpr int64_t kSharingTiles = 8, kFewTiles = 4;

// Queries of a tile. Scores take 24 KB of the L1 cache, 16 KB with AVX-512.
template <typename T>
constexpr int64_t kForwardQueries = FASTSEQ_VECTOR_BYTES == 64 ? kPanel<T> : 48;

// Queries on their way through the keys.
template <typename T>
struct AttentionRows : Attention<T, AttentionForward<T>, kForwardQueries<T>> {
  using Base = Attention<T, AttentionForward<T>, kForwardQueries<T>>;
  using Base::Base;
  using Base::Ev, Base::value_width;
  using typename Base::Sequence;

  struct Progress {
    T *sums, *largest, *weight;  // of values, scores, and exp(score - largest) summed up

    static Progress take(Pieces<T>& pieces, int64_t rows, const AttentionRows& of) {
      return {pieces.take(rows * of.value_width), pieces.take(rows), pieces.take(rows)};
    }
    void start(int64_t rows, int64_t value_width) const {
      std::fill_n(sums, rows * value_width, T(0));
      std::fill_n(largest, rows, Base::kMinusInfinity);
      std::fill_n(weight, rows, T(0));
    }
  };

  FASTSEQ_INLINE void shrink_sums(T* sums, T by) const {
    for (int64_t u = 0; u < value_width; u += kLanes<T>) store(sums + u, load(sums + u) * by);
  }

  // Writes out and lse of queries whose keys have all been added: those from l on are in rows from `row` on.
  void finish(const Progress& my, int64_t row, const Sequence& seq, int64_t h, int64_t l, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) {
      const T weight = my.weight[row + r];
      this->lse[this->lse_at(seq, h, l + r)] =
          weight == 0 ? Base::kMinusInfinity : my.largest[row + r] + std::log(weight);
    }
    const auto inverse = [&](int64_t r) { return my.weight[row + r] == 0 ? T(0) : 1 / my.weight[row + r]; };
    this->write(this->out, my.sums + row * value_width, value_width, Ev, seq.sample, h, seq.q0 + l, count, inverse);
  }
};

template <typename T>
struct AttentionForwardPass : AttentionRows<T> {
  using Base = AttentionRows<T>;
  using Base::E, Base::Ev, Base::H, Base::kStride, Base::L, Base::S, Base::value_width;
  using typename Base::Ahead;
  using typename Base::Panels;
  using typename Base::Progress;
  using typename Base::Sequence;
  using typename Base::Tile;

  static constexpr int64_t kMostTiles = 64;  // of a packing
  enum class Finite : char { kUnknown, kYes, kNo };

  bool average = this->wanted == Weights::kAverage;
  int64_t chunk, chunks;  // queries of a task, and tasks of a sequence and head
  int64_t packed_keys;    // of a packing
  bool in_place;          // whether values are read where they are

  AttentionForwardPass(const AttentionForward<T>& call, int threads) : Base(call) {
    const int64_t bytes = (E + value_width) * sizeof(T) * kTileKeys;
    packed_keys = std::min(kMostTiles, std::max<int64_t>(1, kPackedBytes / bytes)) * kTileKeys;
    packed_keys = std::min(packed_keys, (this->longest_k + kTileKeys - 1) / kTileKeys * kTileKeys);
    // As many tasks as make threads end at about the same time.
    const int64_t wanted = 4 * threads, heads = std::max<int64_t>(1, this->sequences * (average ? 1 : H));
    const int64_t blocks = std::max<int64_t>(1, this->blocks(this->longest_q));
    const int64_t tasks = std::min(blocks, (wanted + heads - 1) / heads);
    chunk = average ? kStride : std::min(kSharingTiles, (blocks + tasks - 1) / tasks) * kStride;
    chunks = (this->longest_q + chunk - 1) / chunk;
    in_place = chunk <= kFewTiles * kStride && this->stored == Stored::kSame && Ev == value_width && this->v.l == Ev &&
               !this->padding;
  }

  int64_t tiled_keys() const { return (S + kTileKeys - 1) / kTileKeys * kTileKeys; }

  // A member's scratch.
  struct Desk {
    T* q;              // a chunk's queries, packed and scaled
    Progress rows;     // of a chunk
    T *k, *v, *zeros;  // copied keys and packed values; a row of padding
    Ahead ahead;       // the next task's
    const T* keys;     // those of now, as they are or copied, and
    Panels values;     // their values
    int64_t count;
    T *scores, *factors, *shrink;  // of a tile
    T* raw;                        // all scores of a chunk, for the average
    Finite finite[kMostTiles];     // whether the values of each tile are
  };

  Desk desk(Pieces<T>& pieces) const {
    Desk desk{};
    desk.q = pieces.take(chunk * E);
    desk.rows = Progress::take(pieces, chunk, *this);
    desk.k = pieces.take(packed_keys * E);
    desk.v = pieces.take(in_place ? 0 : packed_keys * value_width);
    desk.zeros = pieces.take(Ev);
    desk.scores = pieces.take(kTileKeys * kStride);
    desk.factors = pieces.take(this->dropout ? kTileKeys * kStride : 0);
    desk.shrink = pieces.take(kStride);
    desk.raw = pieces.take(average ? chunk * tiled_keys() : 0);
    return desk;
  }

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    this->lay_out_desks(pieces, members, [&](Pieces<T>& of_one) { desk(of_one); });
    return pieces.count;
  }

  void run(int rank, Team& team) const {
    Pieces<T> mine = this->desk_at(rank);
    Desk desk = this->desk(mine);
    std::fill_n(desk.zeros, Ev, T(0));
    const int64_t heads = average ? 1 : H, per_chunk = this->sequences * heads;
    for (int64_t task; (task = this->next.fetch_add(1, std::memory_order_relaxed)) < chunks * per_chunk;) {
      const Sequence seq = this->sequence(task % per_chunk / heads);
      // Those at the end first: causal ones are the longest.
      const int64_t l = (chunks - 1 - task / per_chunk) * chunk, end = std::min(seq.L, l + chunk);
      if (l >= end) continue;
      desk.ahead = of_task(task + team.size());
      if (average)
        for (int64_t h = 0; h < H; ++h) attend(desk, seq, h, l, end);
      else
        attend(desk, seq, task % heads, l, end);
    }
  }

  // What a task reads and writes, to be fetched while the one before it multiplies. It pays for short sequences, each a
  // task, that do not stay in the L2 cache: 10 to 15 %.
  Ahead of_task(int64_t task) const {
    constexpr int64_t kMostBytes = 64 * 1024;
    Ahead ahead{};
    const bool simple = chunks == 1 && !average && !this->ends_q && this->stored == Stored::kSame;
    if (!simple || task >= this->sequences * H) return ahead;
    const int64_t sample = task / H, h = task % H, head = h / this->group;
    const auto add = [&](int i, const Heads& from, int64_t count, int64_t width, int64_t of_head) {
      if (count * width * int64_t(sizeof(T)) > kMostBytes) return;
      ahead.pieces[i] = {from.template row<const T>(sample, of_head, 0), from.l, count, width};
    };
    add(0, this->q, L, E, h), add(1, this->k, S, E, head), add(2, this->v, S, Ev, head), add(3, this->out, L, Ev, h);
    return ahead;
  }

  // Queries [l, end) of a head.
  void attend(Desk& my, const Sequence& seq, int64_t h, int64_t l, int64_t end) const {
    my.rows.start(chunk, value_width);
    const auto tile_of = [&](int64_t i) { return Tile{h, i, std::min(kStride, end - i), 0, 0}; };
    for (int64_t i = l; i < end; i += kStride)
      this->pack_queries(this->q, E, seq, tile_of(i), this->scale, my.q + (i - l) * E);
    const bool all = this->weights;  // every score is wanted, if only to see that it is none
    const int64_t first = all ? 0 : this->first_key(seq, l) / kTileKeys * kTileKeys;
    // Whole tiles: what a tile holds, and so how it is added, must not depend on where a chunk of queries ends.
    const int64_t tiles = (this->end_key(seq, end - 1) + kTileKeys - 1) / kTileKeys;
    const int64_t last = all ? seq.S : std::min(seq.S, tiles * kTileKeys);
    for (int64_t s = first; s < last; s += packed_keys) {
      const int64_t packed_end = std::min(last, s + packed_keys);
      pack(my, seq, h / this->group, s, packed_end);
      for (int64_t i = l; i < end; i += kStride)
        for (int64_t t = s; t < packed_end; t += kTileKeys) {
          Tile tile = tile_of(i);
          tile.s = t, tile.keys = std::min(kTileKeys, packed_end - t);
          if (all || (this->narrow(seq, tile) && !this->left_out(seq, tile))) add_tile(my, seq, tile, i - l, s);
        }
    }
    this->finish(my.rows, 0, seq, h, l, end - l);
    for (int64_t i = l; all && i < end; ++i) finish_weights(my, seq, h, l, i);
  }

  // Keys and values [s, end) of a head, packed or where they are.
  void pack(Desk& my, const Sequence& seq, int64_t head, int64_t s, int64_t end) const {
    my.count = end - s;
    my.keys = this->rows_of(this->k, E, seq, head, s, my.count, my.k);
    if (in_place) {
      my.values = {this->v.template row<const T>(seq.sample, head, seq.k0 + s), kPanel<T>, this->v.l};
    } else {
      this->pack_keys(this->v, Ev, seq, head, s, my.count, my.zeros, my.v);
      my.values = this->packed_panels(my.v, my.count);
    }
    std::fill_n(my.finite, kMostTiles, Finite::kUnknown);
  }

  // Whether the values of a tile of packed keys are finite. Looked up when somebody first leaves one of them out.
  bool is_finite(Desk& my, int64_t tile) const {
    Finite& finite = my.finite[tile];
    if (finite == Finite::kUnknown) {
      const int64_t from = tile * kTileKeys, to = std::min(my.count, from + kTileKeys);
      const bool all = this->all_finite(my.values.from(from), value_width / kPanel<T>, to - from);
      finite = all ? Finite::kYes : Finite::kNo;
    }
    return finite == Finite::kYes;
  }

  // Adds a tile of keys to its queries, the chunk's from `row` on, of a packing that begins at key `packed`.
  void add_tile(Desk& my, const Sequence& seq, const Tile& tile, int64_t row, int64_t packed) const {
    const int64_t at = tile.s - packed;
    this->multiply(seq, tile, my.keys + at * E, E, my.q + row * E, my.scores, &my.ahead);
    const bool whole = this->is_whole(seq, tile);
    if (!whole) this->finish_scores(seq, tile, my.scores);
    if (this->weights)
      this->in_rows(tile, my.scores, [&](int64_t i, int64_t j, int lanes, Vec<T> scores) {
        store(weights_row(my, seq, tile.h, row + i, tile.l + i) + tile.s + j, scores, lanes);
      });
    T* sums = my.rows.sums + row * value_width;
    if (this->softmax(tile, my.scores, my.rows.largest + row, my.rows.weight + row, my.shrink, whole))
      for (int64_t r = 0; r < tile.queries; ++r)
        if (my.shrink[r] != 1) this->shrink_sums(sums + r * value_width, my.shrink[r]);
    if (this->dropout) {
      this->draw_tile(seq, tile, my.factors);
      for (int64_t j = 0; j < tile.keys; ++j)
        for (int64_t i = j * kStride; i < j * kStride + tile.width(); i += kLanes<T>)
          store(my.scores + i, load(my.scores + i) * load(my.factors + i));
    }
    this->add_keys(seq, tile, my.scores, my.values.from(at), sums, value_width, whole || is_finite(my, at / kTileKeys));
  }

  // Where raw scores of query l go, which is the chunk's in `row`.
  T* weights_row(Desk& my, const Sequence& seq, int64_t h, int64_t row, int64_t l) const {
    return average ? my.raw + row * tiled_keys() : this->weights + ((seq.sample * H + h) * L + l) * S;
  }

  // Raw scores of query i become weights.
  void finish_weights(Desk& my, const Sequence& seq, int64_t h, int64_t l, int64_t i) const {
    const T weight = my.rows.weight[i - l], base = weight == 0 ? T(0) : my.rows.largest[i - l];
    const T inverse = weight == 0 ? T(0) : T(1) / weight;
    T* row = weights_row(my, seq, h, i - l, i);
    T factors[kTileKeys];
    for (int64_t s = 0; s < S; s += kTileKeys) {
      const int64_t count = std::min(kTileKeys, S - s);
      for (int64_t j = 0; j < count; j += kLanes<T>) {
        const int lanes = int(std::min<int64_t>(kLanes<T>, count - j));
        store(row + s + j, exp<T>(load(row + s + j, lanes) - base) * inverse, lanes);
      }
      if (!this->dropout) continue;
      draw_row(this->dropout, this->matrix(seq, h), i, s, factors);
      for (int64_t j = 0; j < count; ++j) row[s + j] *= factors[j];
    }
    if (!average) return;
    T* mean = this->weights + (seq.sample * L + i) * S;
    for (int64_t s = 0; s < S; ++s) mean[s] = (h ? mean[s] : T(0)) + row[s] / T(H);
  }
};

}  // namespace fastseq::FASTSEQ_ISA
