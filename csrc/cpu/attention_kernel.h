// Scaled dot product attention on the CPU. Formulas: fastseq/reference/attention.py.
//
// Scores exist a tile at a time: some queries times kTileKeys keys, in the cache. Forward keeps for each query the
// largest score so far, the sum of exp(score - largest) and the sum of values so weighted, and rescales them when a
// larger score comes (online softmax, Milakov and Gimelshein 2018; Dao et al. 2022). Backward makes the tiles anew from
// lse. Tiles whose every key is left out are not computed.
//
// What a row of out or of a gradient is summed up from, and in which order, depends on nothing but shapes: results are
// the same bits whatever the number of threads.
#pragma once
#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/pass.h"

namespace fastseq::FASTSEQ_ISA {

// Keys of a tile, which is also the period of dropout's numbers.
constexpr int64_t kTileKeys = 128;
// Queries of a tile. With these, scores take 24 KB.
constexpr int64_t kBlockQueries = 8 * kTileRows;
// Packed keys and values that one tile after the other reads stay in the L2 cache.
constexpr int64_t kPackedBytes = 256 * 1024;
// Queries that share a packing of keys and values: so many that packing hardly counts.
constexpr int64_t kChunkQueries = 8 * kBlockQueries, kChunkQueriesBackward = 4 * kBlockQueries;
// Multiply-adds that are worth a thread.
constexpr int64_t kAttentionWorkPerThread = 192 * 1024;

// What both passes know about sequences, and the scores' way from products to what softmax takes.
template <typename T, typename Call>
struct Attention : Call {
  using Call::E, Call::Ev, Call::H, Call::Hk, Call::L, Call::S;

  struct Sequence {
    int64_t index, sample, q0, k0, L, S, offset;
  };
  struct Keys {  // of a tile
    int64_t first, count;
    int64_t width() const { return (count + kPanel<T> - 1) / kPanel<T> * kPanel<T>; }
    int64_t end() const { return first + count; }
  };

  static constexpr T kMinusInfinity = -__builtin_inf();

  int64_t width = padded(E), value_width = padded(Ev), group = Hk ? H / Hk : 0;
  int64_t longest_q = L, longest_k = S;
  bool bare = !this->softcap && !this->slopes && !this->bias && !this->allowed;  // only bounds and padding
  mutable std::atomic<int64_t> next{0};                                          // task to be done

  explicit Attention(const Call& call) : Call(call) {
    if (!this->ends_q) return;
    longest_q = longest_k = 0;
    for (int64_t i = 0; i < this->sequences; ++i) {
      longest_q = std::max(longest_q, this->ends_q[i + 1] - this->ends_q[i]);
      longest_k = std::max(longest_k, this->ends_k[i + 1] - this->ends_k[i]);
    }
  }

  static int64_t padded(int64_t count) { return Columns<T>{count}.panels() * kPanel<T>; }

  int team_size(const Threads& threads) const {
    const int64_t work = this->sequences * H * longest_q * longest_k * (E + Ev);
    const int64_t useful = work / kAttentionWorkPerThread + 1;
    return int(std::min<int64_t>({threads.count, Team::kMost, useful}));
  }

  Sequence sequence(int64_t i) const {
    Sequence seq{i, i, 0, 0, L, S, 0};
    if (this->ends_q) {
      seq.sample = 0, seq.q0 = this->ends_q[i], seq.k0 = this->ends_k[i];
      seq.L = this->ends_q[i + 1] - seq.q0, seq.S = this->ends_k[i + 1] - seq.k0;
    }
    if (this->bottom_right) seq.offset = seq.S - seq.L;
    return seq;
  }

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

  const bool* padding_of(const Sequence& seq) const { return this->padding ? this->padding + seq.sample * S : nullptr; }
  int64_t padded_keys(const Sequence& seq, const Keys& keys) const {
    const bool* padding = padding_of(seq);
    int64_t count = 0;
    for (int64_t s = keys.first; padding && s < keys.end(); ++s) count += padding[s];
    return count;
  }

  void scaled_query(const Sequence& seq, int64_t h, int64_t l, T* to) const {
    const T* from = this->q.row(seq.sample, h, seq.q0 + l);
    for (int64_t e = 0; e < E; ++e) to[e] = from[e] * this->scale;
  }

  // How many keys of a tile products with row r of queries [i, end) look at, in whole panels: up to the last one that
  // any row of its tile sees, and what a tile of transposed rows takes more.
  int64_t seen_width(const Sequence& seq, int64_t i, int64_t end, int64_t r, const Keys& keys) const {
    const int64_t last = std::min(end, i + r / kTileRows * kTileRows + kTileRows) - 1;
    const int64_t count = end_key(seq, last) - keys.first;
    return count <= 0 ? 0 : std::min(keys.width(), Keys{0, count + kTileRows - 1}.width());
  }

  // Whether softmax can take the products of a tile as they are.
  bool is_whole(const Sequence& seq, int64_t l, int64_t end, const Keys& keys) const {
    return bare && keys.count == keys.width() && keys.first >= first_key(seq, end - 1) &&
           keys.end() <= end_key(seq, l) && padded_keys(seq, keys) == 0;
  }

  int64_t mask_at(const Sequence& seq, int64_t h, int64_t l, int64_t s) const {
    return seq.sample * this->m_n + h * this->m_h + l * this->m_l + s * this->m_s;
  }

  // Whether the boolean mask leaves nothing of a tile.
  bool masked_out(const Sequence& seq, int64_t h, int64_t l, int64_t end, const Keys& keys) const {
    if (!this->allowed) return false;
    const int64_t columns = this->m_s ? keys.count : 1;
    for (; l < end; ++l) {
      const bool* row = this->allowed + mask_at(seq, h, l, keys.first);
      bool any = false;
      for (int64_t j = 0; j < columns; ++j) any |= row[j];
      if (any) return false;
      if (!this->m_l) break;
    }
    return true;
  }

  // Turns scaled products into scores: softcap, biases, then -inf for what is left out and for what fills up the last
  // panel. `slope`, if given, gets the softcap's derivative.
  void finish_scores(const Sequence& seq, int64_t h, int64_t l, const Keys& keys, T* score, T* slope = nullptr) const {
    const int64_t count = keys.count, filled = keys.width();
    if (!bare) {
      if (this->softcap) {
        for (int64_t j = 0; j < filled; j += kLanes<T>) {
          const Vec<T> t = tanh<T>(load(score + j) / this->softcap);
          store(score + j, t * this->softcap);
          if (slope) store(slope + j, T(1) - t * t);
        }
      }
      if (this->slopes) {
        const T by = this->slopes[h];
        const int32_t ahead = int32_t(keys.first - l - seq.offset);
        for (int32_t j = 0; j < int32_t(count); ++j) score[j] -= by * T(std::abs(ahead + j));
      }
      const int64_t at = mask_at(seq, h, l, keys.first);
      if (const T* bias = this->bias ? this->bias + at : nullptr) {
        // Not a sum with -inf, which a NaN in a key that is left out would survive.
        const Vec<T> never = kMinusInfinity - Vec<T>{};
        for (int64_t j = 0; j < count; j += kLanes<T>) {
          const int lanes = int(std::min<int64_t>(kLanes<T>, count - j));
          const Vec<T> more = this->m_s ? load(bias + j, lanes) : *bias - Vec<T>{}, sum = load(score + j) + more;
          store(score + j, more == never ? never : sum);
        }
      }
      if (const bool* allowed = this->allowed ? this->allowed + at : nullptr) {
        if (this->m_s)
          for (int64_t j = 0; j < count; ++j) score[j] = allowed[j] ? score[j] : kMinusInfinity;
        else if (!*allowed)
          std::fill_n(score, count, kMinusInfinity);
      }
    }
    if (const bool* padding = padding_of(seq)) {
      padding += keys.first;
      for (int64_t j = 0; j < count; ++j) score[j] = padding[j] ? kMinusInfinity : score[j];
    }
    const int64_t from = std::min(count, std::max<int64_t>(0, first_key(seq, l) - keys.first));
    const int64_t to = std::min(count, std::max(from, end_key(seq, l) - keys.first));
    std::fill(score, score + from, kMinusInfinity);
    std::fill(score + to, score + filled, kMinusInfinity);
  }

  // products[rows][kTileKeys] = left[rows][K] times the packed tile of keys, where the bounds leave something.
  void multiply_keys(const Sequence& seq, int64_t l, int64_t rows, const Keys& keys, Left<T> left, int64_t K,
                     const T* packed, T* products) const {
    const int64_t panels = keys.width() / kPanel<T>;
    for (int64_t q = 0; q < panels; ++q) {
      const int64_t s = keys.first + q * kPanel<T>;
      const T* panel = packed + q * K * kPanel<T>;
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const int64_t height = std::min<int64_t>(kTileRows, rows - i);
        if (s >= end_key(seq, l + i + height - 1) || s + kPanel<T> <= first_key(seq, l + i)) continue;
        tile_rows<T>(height, K, {left.data + i * left.stride, left.stride}, panel,
                     products + i * kTileKeys + q * kPanel<T>, kTileKeys, false, panel + K * kPanel<T>);
      }
    }
  }

  // sums[rows][stride] += left[rows][kTileKeys] times a packed tile's rows, for the keys that the bounds leave to
  // queries [l, l + rows). Panels are `gap` apart. Where they may hold infinities or NaN, a 0 on the left leaves these
  // out.
  void add_rows(const Sequence& seq, int64_t l, int64_t rows, const Keys& keys, const T* left, const T* packed,
                int64_t gap, T* sums, int64_t stride, bool finite) const {
    for (int64_t p = 0; p < stride / kPanel<T>; ++p)
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t height = std::min<int64_t>(kTileRows, rows - r);
        const int64_t from = std::max<int64_t>(0, first_key(seq, l + r) - keys.first);
        const int64_t to = std::min(keys.count, end_key(seq, l + r + height - 1) - keys.first);
        if (from >= to) continue;
        const T *some = left + r * kTileKeys + from, *panel = packed + p * gap + from * kPanel<T>;
        T* out = sums + r * stride + p * kPanel<T>;
        if (finite)
          tile_rows<T>(height, to - from, {some, kTileKeys}, panel, out, stride, true, panel);
        else
          add_but_zeros(height, to - from, some, panel, out, stride);
      }
  }

  static void add_but_zeros(int64_t rows, int64_t count, const T* left, const T* panel, T* sums, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < count; ++j)
        for (int u = 0; left[r * kTileKeys + j] != 0 && u < kPanel<T>; ++u)
          sums[r * stride + u] += left[r * kTileKeys + j] * panel[j * kPanel<T> + u];
  }

  // Whether packed elements are all finite.
  static bool all_finite(const T* packed, int64_t count) {
    Vec<T> product{};
    for (int64_t u = 0; u < count; u += kLanes<T>) product += load(packed + u) * T(0);
    return sum<T>(product) == 0;
  }

  // 128 keys' factors of dropout for a query.
  void draw_kept(const Sequence& seq, int64_t h, int64_t l, int64_t first_key, T* factors) const {
    constexpr int kCounters = 16, kRounds = 7;
    uint32_t x[4][kCounters];
    for (int i = 0; i < kCounters; ++i) {
      x[0][i] = uint32_t(first_key / kTileKeys * kCounters + i);
      x[1][i] = uint32_t(l);
      x[2][i] = uint32_t(seq.index * H + h);
      x[3][i] = 0;
    }
    uint32_t key_low = uint32_t(this->seed), key_high = uint32_t(this->seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kCounters; ++i) {
        const uint64_t even = uint64_t(x[0][i]) * 0xD2511F53u, odd = uint64_t(x[2][i]) * 0xCD9E8D57u;
        x[0][i] = uint32_t(odd >> 32) ^ x[1][i] ^ key_low;
        x[1][i] = uint32_t(odd);
        x[2][i] = uint32_t(even >> 32) ^ x[3][i] ^ key_high;
        x[3][i] = uint32_t(even);
      }
      key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
    }
    for (int half = 0; half < 8; ++half)
      for (int i = 0; i < kCounters; ++i) {
        const uint32_t drawn = half % 2 ? x[half / 2][i] >> 16 : x[half / 2][i] & 0xffff;
        factors[half * kCounters + i] = drawn < this->dropped ? T(0) : this->kept;
      }
  }
};

// Queries on their way through the keys: what forward keeps of each.
template <typename T>
struct AttentionRows : Attention<T, AttentionForward<T>> {
  using Base = Attention<T, AttentionForward<T>>;
  using Base::Base;
  using Base::E, Base::Ev, Base::H, Base::L, Base::value_width;
  using typename Base::Keys;
  using typename Base::Sequence;

  struct Progress {
    T *q, *sums, *largest, *weight;  // scaled; values, scores, and exp(score - largest) summed up

    static Progress take(Pieces<T>& pieces, int64_t rows, const AttentionRows& of) {
      return {pieces.take(rows * of.E), pieces.take(rows * of.value_width), pieces.take(rows), pieces.take(rows)};
    }
  };

  void start(Progress& my, int64_t row, const Sequence& seq, int64_t h, int64_t l) const {
    this->scaled_query(seq, h, l, my.q + row * E);
    std::fill_n(my.sums + row * value_width, value_width, T(0));
    my.weight[row] = 0, my.largest[row] = Base::kMinusInfinity;
  }

  // Scores become exp(score - largest), and what was summed up so far is rescaled if there is a new largest one.
  void softmax(Progress& my, int64_t row, T* score, int64_t filled, bool whole) const {
    Vec<T> high = load(score);
    for (int64_t j = kLanes<T>; j < filled; j += kLanes<T>) high = larger<T>(high, load(score + j));
    T lanes[kLanes<T>];
    store(lanes, high);
    T top = my.largest[row];
    for (const T lane : lanes) top = std::max(top, lane);
    const T base = raise(my, row, top);
    constexpr T kLog2E = T(1.44269504088896340736);
    const auto weigh = [&](auto may_vanish) __attribute__((always_inline)) {
      Vec<T> total{};
      for (int64_t j = 0; j < filled; j += kLanes<T>) {
        const Vec<T> p = exp2<T, may_vanish>((load(score + j) - base) * kLog2E);
        store(score + j, p);
        total += p;
      }
      my.weight[row] += sum<T>(total);
    };
    if (whole)
      weigh(std::false_type());
    else
      weigh(std::true_type());
  }

  // Sets the largest score of a row; returns what scores are to be taken relative to.
  FASTSEQ_INLINE T raise(Progress& my, int64_t row, T top) const {
    const T before = my.largest[row], base = top == Base::kMinusInfinity ? T(0) : top;
    if (top == before) return base;
    if (before == Base::kMinusInfinity) {  // nothing has been summed up
      my.largest[row] = top;
      return base;
    }
    const T shrink = exp<T>((before - base) - Vec<T>{})[0];
    my.largest[row] = top;
    my.weight[row] *= shrink;
    T* sums = my.sums + row * value_width;
    for (int64_t u = 0; u < value_width; u += kLanes<T>) store(sums + u, load(sums + u) * shrink);
    return base;
  }

  // Writes out and lse of a query whose keys have all been added.
  void finish(const Progress& my, int64_t row, const Sequence& seq, int64_t h, int64_t l) const {
    const T weight = my.weight[row], inverse = weight == 0 ? T(0) : T(1) / weight;
    const T lse = weight == 0 ? Base::kMinusInfinity : my.largest[row] + std::log(weight);
    this->lse[(seq.sample * H + h) * L + seq.q0 + l] = lse;
    T* to = this->out.row(seq.sample, h, seq.q0 + l);
    for (int64_t e = 0; e < Ev; ++e) to[e] = my.sums[row * value_width + e] * inverse;
  }
};

template <typename T>
struct AttentionForwardPass : AttentionRows<T> {
  using Base = AttentionRows<T>;
  using Base::E, Base::Ev, Base::H, Base::L, Base::S, Base::value_width;
  using typename Base::Keys;
  using typename Base::Progress;
  using typename Base::Sequence;

  static constexpr int64_t kMostTiles = 64;  // of a packing
  enum class Finite : char { kUnknown, kYes, kNo };

  bool average = this->wanted == Weights::kAverage;
  int64_t chunk, chunks;  // queries of a task, and tasks of a sequence and head
  int64_t packed_keys;    // of a packing
  int64_t desk_size;      // elements of a member's scratch
  T *desks, *zeros;       // all members' one after the other, and a row of zeros

  AttentionForwardPass(const AttentionForward<T>& call, int threads) : Base(call) {
    const int64_t bytes = (E + value_width) * sizeof(T) * kTileKeys;
    packed_keys = std::min(kMostTiles, std::max<int64_t>(1, kPackedBytes / bytes)) * kTileKeys;
    packed_keys = std::min(packed_keys, (this->longest_k + kTileKeys - 1) / kTileKeys * kTileKeys);
    // As many tasks as make threads end at about the same time.
    const int64_t wanted = 4 * threads, heads = std::max<int64_t>(1, this->sequences * (average ? 1 : H));
    const int64_t blocks = std::max<int64_t>(1, (this->longest_q + kBlockQueries - 1) / kBlockQueries);
    const int64_t tasks = std::min(blocks, (wanted + heads - 1) / heads);
    chunk = average ? kBlockQueries : std::min(kChunkQueries, (blocks + tasks - 1) / tasks * kBlockQueries);
    chunks = (this->longest_q + chunk - 1) / chunk;
  }

  int64_t tiled_keys() const { return (S + kTileKeys - 1) / kTileKeys * kTileKeys; }

  // A member's scratch.
  struct Desk {
    Progress rows;              // of a chunk
    T *k, *v;                   // keys and values, packed
    T *scores, *factors;        // of a tile; dropout's of a row
    T* raw;                     // all scores of a chunk, for the average
    int64_t keys;               // packed now
    Finite finite[kMostTiles];  // whether the values of each tile are
  };

  Desk desk(Pieces<T>& pieces) const {
    Desk desk{};
    desk.rows = Progress::take(pieces, chunk, *this);
    desk.k = pieces.take(packed_keys * E);
    desk.v = pieces.take(packed_keys * value_width);
    desk.scores = pieces.take(kBlockQueries * kTileKeys);
    desk.factors = pieces.take(kTileKeys);
    desk.raw = pieces.take(average ? chunk * tiled_keys() : 0);
    return desk;
  }

  int64_t lay_out(T* start, int members) {
    Pieces<T> one{nullptr}, pieces{start};
    desk(one);
    desk_size = one.count;
    desks = pieces.take(members * desk_size);
    zeros = pieces.take(Ev);
    return pieces.count;
  }

  void run(int rank, Team& team) const {
    if (rank == 0) std::fill_n(zeros, Ev, T(0));
    team.barrier(rank, 0, team.size());
    Pieces<T> mine{desks + rank * desk_size};
    Desk desk = this->desk(mine);
    const int64_t heads = average ? 1 : H, per_chunk = this->sequences * heads;
    for (int64_t task; (task = this->next.fetch_add(1, std::memory_order_relaxed)) < chunks * per_chunk;) {
      const Sequence seq = this->sequence(task % per_chunk / heads);
      // Those at the end first: causal ones are the longest.
      const int64_t l = (chunks - 1 - task / per_chunk) * chunk, end = std::min(seq.L, l + chunk);
      if (l >= end) continue;
      if (average)
        for (int64_t h = 0; h < H; ++h) attend(desk, seq, h, l, end);
      else
        attend(desk, seq, task % heads, l, end);
    }
  }

  void attend(Desk& my, const Sequence& seq, int64_t h, int64_t l, int64_t end) const {
    for (int64_t i = l; i < end; ++i) this->start(my.rows, i - l, seq, h, i);
    const bool all = this->weights;  // every score is wanted, if only to see that it is none
    const int64_t first = all ? 0 : this->first_key(seq, l) / kTileKeys * kTileKeys;
    const int64_t last = all ? seq.S : this->end_key(seq, end - 1);
    for (int64_t s = first; s < last; s += packed_keys) {
      pack(my, seq, h, s, std::min(last, s + packed_keys));
      for (int64_t i = l; i < end; i += kBlockQueries)
        for (int64_t t = s; t < std::min(last, s + packed_keys); t += kTileKeys)
          add_tile(my, seq, h, l, i, std::min(end, i + kBlockQueries), s,
                   {t, std::min(kTileKeys, std::min(last, s + packed_keys) - t)});
    }
    for (int64_t i = l; i < end; ++i) finish(my, seq, h, l, i);
  }

  // Keys and values [s, end) of a head.
  void pack(Desk& my, const Sequence& seq, int64_t h, int64_t s, int64_t end) const {
    const int64_t head = h / this->group;
    my.keys = end - s;
    const Columns<T> keys{my.keys};
    pack_transposed(keys, 0, keys.panels(), this->k.row(seq.sample, head, seq.k0 + s), this->k.l, E, my.k);
    const bool* padding = this->padding_of(seq);
    const auto value = [&](int64_t j) {
      return padding && padding[s + j] ? zeros : this->v.row(seq.sample, head, seq.k0 + s + j);
    };
    const Columns<T> columns{Ev};
    pack_rows<T>(columns, 0, columns.panels(), value, my.keys, my.v);
    std::fill_n(my.finite, kMostTiles, Finite::kUnknown);
  }

  // Whether the values of a tile of packed keys are finite. Looked up when somebody first leaves one of them out.
  bool is_finite(Desk& my, int64_t tile) const {
    Finite& finite = my.finite[tile];
    if (finite == Finite::kUnknown) {
      const int64_t from = tile * kTileKeys, to = std::min(my.keys, from + kTileKeys);
      bool all = true;
      for (int64_t p = 0; p < value_width / kPanel<T>; ++p)
        all = all && this->all_finite(my.v + (p * my.keys + from) * kPanel<T>, (to - from) * kPanel<T>);
      finite = all ? Finite::kYes : Finite::kNo;
    }
    return finite == Finite::kYes;
  }

  // Adds a tile of keys to queries [i, end), of a packing that begins at key `packed`; l is the chunk's first query.
  void add_tile(Desk& my, const Sequence& seq, int64_t h, int64_t l, int64_t i, int64_t end, int64_t packed,
                const Keys& keys) const {
    const int64_t rows = end - i;
    if (!this->weights) {
      if (keys.first >= this->end_key(seq, end - 1) || keys.end() <= this->first_key(seq, i)) return;
      if (this->padded_keys(seq, keys) == keys.count || this->masked_out(seq, h, i, end, keys)) return;
    }
    this->multiply_keys(seq, i, rows, keys, {my.rows.q + (i - l) * E, E}, E, my.k + (keys.first - packed) * E,
                        my.scores);
    const bool whole = this->is_whole(seq, i, end, keys);
    for (int64_t r = 0; r < rows; ++r) {
      T* score = my.scores + r * kTileKeys;
      if (!whole) this->finish_scores(seq, h, i + r, keys, score);
      if (this->weights) memcpy(weights_row(my, seq, h, l, i + r) + keys.first, score, keys.count * sizeof(T));
      const int64_t seen = whole ? keys.width() : this->seen_width(seq, i, end, r, keys);
      if (seen == 0) continue;
      this->softmax(my.rows, i + r - l, score, seen, whole);
      if (this->dropped) {
        this->draw_kept(seq, h, i + r, keys.first, my.factors);
        for (int64_t j = 0; j < seen; ++j) score[j] *= my.factors[j];
      }
    }
    const int64_t at = keys.first - packed;
    this->add_rows(seq, i, rows, keys, my.scores, my.v + at * kPanel<T>, my.keys * kPanel<T>,
                   my.rows.sums + (i - l) * value_width, value_width, whole || is_finite(my, at / kTileKeys));
  }

  // Where raw scores of query i go.
  T* weights_row(Desk& my, const Sequence& seq, int64_t h, int64_t l, int64_t i) const {
    return average ? my.raw + (i - l) * tiled_keys() : this->weights + ((seq.sample * H + h) * L + i) * S;
  }

  void finish(Desk& my, const Sequence& seq, int64_t h, int64_t l, int64_t i) const {
    Base::finish(my.rows, i - l, seq, h, i);
    if (!this->weights) return;
    const T weight = my.rows.weight[i - l], base = weight == 0 ? T(0) : my.rows.largest[i - l];
    const T inverse = weight == 0 ? T(0) : T(1) / weight;
    T* row = weights_row(my, seq, h, l, i);
    for (int64_t s = 0; s < S; s += kTileKeys) {
      const int64_t count = std::min(kTileKeys, S - s);
      for (int64_t j = 0; j < count; j += kLanes<T>) {
        const int lanes = int(std::min<int64_t>(kLanes<T>, count - j));
        store(row + s + j, exp<T>(load(row + s + j, lanes) - base) * inverse, lanes);
      }
      if (!this->dropped) continue;
      this->draw_kept(seq, h, i, s, my.factors);
      for (int64_t j = 0; j < count; ++j) row[s + j] *= my.factors[j];
    }
    if (!average) return;
    T* mean = this->weights + (seq.sample * L + i) * S;
    for (int64_t s = 0; s < S; ++s) mean[s] = (h ? mean[s] : T(0)) + row[s] / T(H);
  }
};

// Few queries, as in decoding: keys and values are read once, where they are. Splits of the keys are tasks of their own
// where there are few heads, as many as shapes say; their sums are merged in order.
template <typename T>
struct AttentionFewQueriesPass : AttentionRows<T> {
  using Base = AttentionRows<T>;
  using Base::E, Base::Ev, Base::group, Base::Hk, Base::value_width;
  using typename Base::Keys;
  using typename Base::Progress;
  using typename Base::Sequence;

  static constexpr int64_t kMostRows = 8, kTasks = 32, kLeastKeys = 4 * kTileKeys;

  int64_t rows, splits, split_keys, desk_size, part_size;
  T *desks, *parts;

  static bool serves(const Attention<T, AttentionForward<T>>& call) {
    return call.group * call.longest_q <= kMostRows && !call.weights;
  }

  AttentionFewQueriesPass(const AttentionForward<T>& call, int) : Base(call) {
    rows = group * this->longest_q;
    const int64_t heads = std::max<int64_t>(1, this->sequences * Hk), keys = std::max<int64_t>(1, this->longest_k);
    splits = std::max<int64_t>(1, std::min((kTasks + heads - 1) / heads, keys / kLeastKeys));
    split_keys = ((keys + splits - 1) / splits + kTileKeys - 1) / kTileKeys * kTileKeys;
    splits = (keys + split_keys - 1) / split_keys;
  }

  struct Desk {
    Progress rows;
    T *scores, *factors;
  };

  Desk desk(Pieces<T>& pieces) const {
    Desk desk{};
    desk.rows = Progress::take(pieces, rows, *this);
    desk.scores = pieces.take(kTileKeys);
    desk.factors = pieces.take(kTileKeys);
    return desk;
  }

  int64_t lay_out(T* start, int members) {
    Pieces<T> one{nullptr}, part{nullptr}, pieces{start};
    desk(one);
    desk_size = one.count;
    Progress::take(part, rows, *this);
    part_size = part.count;
    desks = pieces.take(members * desk_size);
    parts = pieces.take(splits > 1 ? this->sequences * Hk * splits * part_size : 0);
    return pieces.count;
  }

  Progress part(int64_t head, int64_t split) const {
    Pieces<T> pieces{parts + (head * splits + split) * part_size};
    return Progress::take(pieces, rows, *this);
  }

  void run(int rank, Team& team) const {
    Pieces<T> mine{desks + rank * desk_size};
    Desk desk = this->desk(mine);
    const int64_t heads = this->sequences * Hk;
    for (int64_t task; (task = this->next.fetch_add(1, std::memory_order_relaxed)) < heads * splits;) {
      const int64_t at = task / splits;
      if (splits > 1) desk.rows = part(at, task % splits);
      attend(desk, this->sequence(at / Hk), at % Hk, task % splits * split_keys);
    }
    if (splits == 1) return;
    team.barrier(rank, 0, team.size());
    for (int64_t at = share(heads, rank, team.size()); at < share(heads, rank + 1, team.size()); ++at) merge(at);
  }

  template <typename Body>
  void each_row(const Sequence& seq, int64_t head, const Body& body) const {
    for (int64_t g = 0; g < group; ++g)
      for (int64_t l = 0; l < seq.L; ++l) body(g * seq.L + l, head * group + g, l);
  }

  void attend(Desk& my, const Sequence& seq, int64_t head, int64_t s) const {
    if (seq.L == 0) return;
    each_row(seq, head, [&](int64_t row, int64_t h, int64_t l) { this->start(my.rows, row, seq, h, l); });
    const int64_t last = std::min(s + split_keys, this->end_key(seq, seq.L - 1));
    for (s = std::max(s, this->first_key(seq, 0) / kTileKeys * kTileKeys); s < last; s += kTileKeys) {
      const Keys keys{s, std::min(kTileKeys, last - s)};
      const int64_t padded = this->padded_keys(seq, keys);
      if (padded == keys.count) continue;
      const T *k = this->k.row(seq.sample, head, seq.k0 + s), *v = this->v.row(seq.sample, head, seq.k0 + s);
      const bool whole = this->is_whole(seq, 0, seq.L, keys), finite = whole || rows_finite(v, keys.count);
      each_row(seq, head, [&](int64_t row, int64_t h, int64_t l) {
        std::fill_n(my.scores, keys.width(), T(0));
        const T* q = my.rows.q + row * E;
        int64_t j = 0;
        for (; j + 4 <= keys.count; j += 4) dot_rows<4>(k + j * this->k.l, this->k.l, q, E, my.scores + j);
        for (; j < keys.count; ++j) dot_rows<1>(k + j * this->k.l, 0, q, E, my.scores + j);
        if (!whole) this->finish_scores(seq, h, l, keys, my.scores);
        this->softmax(my.rows, row, my.scores, keys.width(), whole);
        if (this->dropped) {
          this->draw_kept(seq, h, l, s, my.factors);
          for (int64_t i = 0; i < keys.count; ++i) my.scores[i] *= my.factors[i];
        }
        T* sums = my.rows.sums + row * value_width;
        if (finite) return multiply_row<T>(my.scores, v, this->v.l, keys.count, 0, Ev, sums, true);
        for (int64_t i = 0; i < keys.count; ++i)  // a weight of 0 leaves out a value that may be infinite or NaN
          for (int64_t e = 0; my.scores[i] != 0 && e < Ev; ++e) sums[e] += my.scores[i] * v[i * this->v.l + e];
      });
    }
    if (splits > 1) return;
    each_row(seq, head, [&](int64_t row, int64_t h, int64_t l) { this->finish(my.rows, row, seq, h, l); });
  }

  bool rows_finite(const T* v, int64_t count) const {
    T product = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t e = 0; e < Ev; ++e) product += v[i * this->v.l + e] * T(0);
    return product == 0;
  }

  void merge(int64_t at) const {
    const Sequence seq = this->sequence(at / Hk);
    Progress all = part(at, 0);
    each_row(seq, at % Hk, [&](int64_t row, int64_t h, int64_t l) {
      for (int64_t i = 1; i < splits; ++i) {
        Progress more = part(at, i);
        const T top = std::max(all.largest[row], more.largest[row]);
        this->raise(all, row, top), this->raise(more, row, top);
        all.weight[row] += more.weight[row];
        for (int64_t u = 0; u < value_width; ++u) all.sums[row * value_width + u] += more.sums[row * value_width + u];
      }
      this->finish(all, row, seq, h, l);
    });
  }
};

template <typename T>
struct AttentionBackwardPass : Attention<T, AttentionBackward<T>> {
  using Base = Attention<T, AttentionBackward<T>>;
  using Base::E, Base::Ev, Base::group, Base::H, Base::Hk, Base::L, Base::S, Base::value_width, Base::width;
  using typename Base::Keys;
  using typename Base::Sequence;

  // A task is what one thread does: the sequences and heads that add to the same bias, in order. Where these are fewer
  // than threads, each of their tiles of keys is a task, and then, since those add to the same queries, so is each
  // chunk of queries, with scores made a second time.
  int64_t sample_groups, head_groups;
  bool split;
  int64_t desk_size;  // elements of a member's scratch
  T *desks, *zeros;   // all members' one after the other, and a row of zeros

  AttentionBackwardPass(const AttentionBackward<T>& call, int threads) : Base(call) {
    sample_groups = this->dbias && !this->d_n ? std::min<int64_t>(1, this->sequences) : this->sequences;
    head_groups = this->dbias && !this->d_h ? std::min<int64_t>(1, Hk) : Hk;
    split = sample_groups * head_groups < threads && !(this->dbias && !this->d_s);
  }

  int64_t queries() const { return std::max<int64_t>(1, group * this->longest_q); }

  // A member's scratch.
  struct Desk {
    T *k_transposed, *v_transposed, *k_rows;  // a tile of keys and values, packed
    T *q_rows, *dout_rows, *delta;            // all queries of the heads that share one of keys
    T *base, *share;                          // their weights are exp(score - base) * share
    T *dq, *dk, *dv;                          // sums
    bool keys_finite;
    T *q, *scores, *dscores, *factors, *slope;  // of a tile; of a row
    int64_t sequence = -1, head = -1;           // whose queries are packed
  };

  Desk desk(Pieces<T>& pieces) const {
    Desk desk{};
    desk.k_transposed = pieces.take(kTileKeys * E);
    desk.v_transposed = pieces.take(kTileKeys * Ev);
    desk.k_rows = pieces.take(kTileKeys * width);
    desk.q_rows = pieces.take(queries() * width);
    desk.dout_rows = pieces.take(queries() * value_width);
    desk.delta = pieces.take(queries());
    desk.base = pieces.take(queries());
    desk.share = pieces.take(queries());
    desk.dq = pieces.take(this->dq.data ? queries() * width : 0);
    desk.dk = pieces.take(kTileKeys * width);
    desk.dv = pieces.take(kTileKeys * value_width);
    desk.q = pieces.take(kBlockQueries * E);
    desk.scores = pieces.take(kBlockQueries * kTileKeys);
    desk.dscores = pieces.take(kBlockQueries * kTileKeys);
    desk.factors = pieces.take(kTileKeys);
    desk.slope = pieces.take(kTileKeys);
    return desk;
  }

  int64_t lay_out(T* start, int members) {
    Pieces<T> one{nullptr}, pieces{start};
    desk(one);
    desk_size = one.count;
    desks = pieces.take(members * desk_size);
    zeros = pieces.take(E);
    return pieces.count;
  }

  void run(int rank, Team& team) const {
    if (rank == 0) std::fill_n(zeros, E, T(0));
    team.barrier(rank, 0, team.size());
    Pieces<T> mine{desks + rank * desk_size};
    Desk desk = this->desk(mine);
    const int64_t groups = sample_groups * head_groups;
    const int64_t tiles = split ? (this->longest_k + kTileKeys - 1) / kTileKeys : 1;
    const int64_t chunks =
        split && this->dq.data ? (this->longest_q + kChunkQueriesBackward - 1) / kChunkQueriesBackward : 0;
    const int64_t first_part = groups * tiles, second_part = this->sequences * Hk * chunks;
    for (int64_t task; (task = this->next.fetch_add(1, std::memory_order_relaxed)) < first_part + second_part;) {
      if (task >= first_part) {
        const int64_t at = task - first_part;
        chunk_of_queries(desk, this->sequence(at / chunks / Hk), at / chunks % Hk, at % chunks * kChunkQueriesBackward);
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
  void keys_of(Desk& my, const Sequence& seq, int64_t head, int64_t tile) const {
    const int64_t first = std::max<int64_t>(0, tile) * kTileKeys,
                  last = tile < 0 ? seq.S : std::min(seq.S, first + kTileKeys);
    if (tile >= 0 && first >= last) return;
    pack_queries(my, seq, head);
    const bool with_queries = tile < 0 && this->dq.data;
    if (with_queries) std::fill_n(my.dq, group * seq.L * width, T(0));
    for (int64_t s = first; s < last; s += kTileKeys) {
      const Keys keys{s, std::min(kTileKeys, last - s)};
      std::fill_n(my.dk, keys.count * width, T(0));
      std::fill_n(my.dv, keys.count * value_width, T(0));
      const int64_t from = this->first_query(seq, s), to = this->end_query(seq, keys.end());
      if (from < to && this->padded_keys(seq, keys) < keys.count) {
        pack_keys(my, seq, head, keys);
        for (int64_t g = 0; g < group; ++g)
          for (int64_t i = from / kBlockQueries * kBlockQueries; i < to; i += kBlockQueries)
            tile_backward(my, seq, head, g, i, std::min(seq.L, i + kBlockQueries), keys, true,
                          with_queries ? my.dq + g * seq.L * width : nullptr);
      }
      write(this->dk, my.dk, width, E, seq.sample, head, seq.k0 + s, keys.count);
      write(this->dv, my.dv, value_width, Ev, seq.sample, head, seq.k0 + s, keys.count);
    }
    for (int64_t g = 0; with_queries && g < group; ++g)
      write(this->dq, my.dq + g * seq.L * width, width, E, seq.sample, head * group + g, seq.q0, seq.L);
  }

  // Gradients of the queries from i on that share a head of keys.
  void chunk_of_queries(Desk& my, const Sequence& seq, int64_t head, int64_t i) const {
    const int64_t end = std::min(seq.L, i + kChunkQueriesBackward);
    if (i >= end) return;
    pack_queries(my, seq, head);
    for (int64_t g = 0; g < group; ++g) std::fill_n(my.dq + (g * seq.L + i) * width, (end - i) * width, T(0));
    const int64_t first = this->first_key(seq, i) / kTileKeys * kTileKeys, last = this->end_key(seq, end - 1);
    for (int64_t s = first; s < last; s += kTileKeys) {
      const Keys keys{s, std::min(kTileKeys, seq.S - s)};
      if (this->padded_keys(seq, keys) == keys.count) continue;
      pack_keys(my, seq, head, keys);
      for (int64_t g = 0; g < group; ++g)
        for (int64_t b = i; b < end; b += kBlockQueries)
          tile_backward(my, seq, head, g, b, std::min(end, b + kBlockQueries), keys, false, my.dq + g * seq.L * width);
    }
    for (int64_t g = 0; g < group; ++g)
      write(this->dq, my.dq + (g * seq.L + i) * width, width, E, seq.sample, head * group + g, seq.q0 + i, end - i);
  }

  static void write(const Heads<T>& to, const T* from, int64_t stride, int64_t count, int64_t sample, int64_t head,
                    int64_t row, int64_t rows) {
    for (int64_t r = 0; to.data && r < rows; ++r)
      memcpy(to.row(sample, head, row + r), from + r * stride, count * sizeof(T));
  }

  // Queries and gradients of out as the right-hand side of products over queries, and delta = dout . out - dlse.
  void pack_queries(Desk& my, const Sequence& seq, int64_t head) const {
    if (my.sequence == seq.index && my.head == head) return;
    my.sequence = seq.index, my.head = head;
    const Columns<T> q{E}, values{Ev};
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = head * group + g;
      const auto query = [&](int64_t l) { return this->q.row(seq.sample, h, seq.q0 + l); };
      const auto gradient = [&](int64_t l) { return this->dout.row(seq.sample, h, seq.q0 + l); };
      pack_rows<T>(q, 0, q.panels(), query, seq.L, my.q_rows + g * seq.L * width);
      pack_rows<T>(values, 0, values.panels(), gradient, seq.L, my.dout_rows + g * seq.L * value_width);
      for (int64_t l = 0; l < seq.L; ++l) {
        const T *a = gradient(l), *b = this->out.row(seq.sample, h, seq.q0 + l);
        T total = 0;  // in the order of products with values, which it cancels where one weight is 1
        for (int64_t e = 0; e < Ev; ++e) total = std::fma(a[e], b[e], total);
        my.delta[g * seq.L + l] = total - (this->dlse ? this->dlse[lse_at(seq, h, l)] : T(0));
      }
    }
    relate(my, seq, head);
  }

  // What weights are taken relative to: lse, but where that is large, as with masks of large numbers, nothing is left
  // in it of the sum's logarithm. There the largest score and the sum are made anew.
  void relate(Desk& my, const Sequence& seq, int64_t head) const {
    constexpr T kLarge = sizeof(T) == 4 ? T(64) : T(1024);
    bool any = false;
    for (int64_t row = 0; row < group * seq.L; ++row) {
      const T lse = this->lse[lse_at(seq, head * group + row / seq.L, row % seq.L)];
      const bool large = std::abs(lse) > kLarge && lse != Base::kMinusInfinity;
      my.base[row] = large || lse == Base::kMinusInfinity ? Base::kMinusInfinity : lse;
      my.share[row] = large ? T(0) : T(1);
      any = any || large;
    }
    for (int64_t s = 0; any && s < seq.S; s += kTileKeys) {
      const Keys keys{s, std::min(kTileKeys, seq.S - s)};
      pack_keys(my, seq, head, keys);
      for (int64_t row = 0; row < group * seq.L; ++row) {
        const int64_t h = head * group + row / seq.L, l = row % seq.L;
        T &top = my.base[row], &sum = my.share[row];
        const T lse = this->lse[lse_at(seq, h, l)];
        if (!(std::abs(lse) > kLarge) || lse == Base::kMinusInfinity) continue;
        this->scaled_query(seq, h, l, my.q);
        this->multiply_keys(seq, l, 1, keys, {my.q, E}, E, my.k_transposed, my.scores);
        this->finish_scores(seq, h, l, keys, my.scores);
        const T before = top;
        for (int64_t j = 0; j < keys.count; ++j) top = std::max(top, my.scores[j]);
        if (top == Base::kMinusInfinity) continue;
        sum *= std::exp(before - top);
        for (int64_t j = 0; j < keys.count; ++j) sum += std::exp(my.scores[j] - top);
      }
    }
    for (int64_t row = 0; row < group * seq.L; ++row) {
      if (my.base[row] == Base::kMinusInfinity) my.base[row] = 0;
      my.share[row] = 1 / my.share[row];
    }
  }

  int64_t lse_at(const Sequence& seq, int64_t h, int64_t l) const { return (seq.sample * H + h) * L + seq.q0 + l; }

  void pack_keys(Desk& my, const Sequence& seq, int64_t head, const Keys& keys) const {
    const Columns<T> columns{keys.count}, features{E};
    const bool* padding = this->padding_of(seq);
    const auto key = [&](int64_t j) {
      return padding && padding[keys.first + j] ? zeros : this->k.row(seq.sample, head, seq.k0 + keys.first + j);
    };
    pack_transposed(columns, 0, columns.panels(), this->k.row(seq.sample, head, seq.k0 + keys.first), this->k.l, E,
                    my.k_transposed);
    pack_transposed(columns, 0, columns.panels(), this->v.row(seq.sample, head, seq.k0 + keys.first), this->v.l, Ev,
                    my.v_transposed);
    pack_rows<T>(features, 0, features.panels(), key, keys.count, my.k_rows);
    my.keys_finite = this->all_finite(my.k_rows, keys.count * width);
  }

  // What queries [i, end) and a tile of keys give each other.
  void tile_backward(Desk& my, const Sequence& seq, int64_t head, int64_t g, int64_t i, int64_t end, const Keys& keys,
                     bool with_keys, T* dq) const {
    const int64_t h = head * group + g, rows = end - i;
    if (keys.first >= this->end_key(seq, end - 1) || keys.end() <= this->first_key(seq, i)) return;
    if (this->masked_out(seq, h, i, end, keys)) return;
    // As in forward, to the bit: scores that differ in rounding would make weights that do not sum to one.
    for (int64_t r = 0; r < rows; ++r) this->scaled_query(seq, h, i + r, my.q + r * E);
    this->multiply_keys(seq, i, rows, keys, {my.q, E}, E, my.k_transposed, my.scores);
    this->multiply_keys(seq, i, rows, keys, {this->dout.row(seq.sample, h, seq.q0 + i), this->dout.l}, Ev,
                        my.v_transposed, my.dscores);
    for (int64_t r = 0; r < rows; ++r)
      row_backward(my, seq, h, g, i + r, keys, with_keys, r, this->seen_width(seq, i, end, r, keys));
    if (with_keys && (this->dk.data || this->dv.data)) {
      for (int64_t j = 0; j < keys.count; j += kTileRows) {
        const int64_t height = std::min<int64_t>(kTileRows, keys.count - j), s = keys.first + j;
        const int64_t from = std::max(i, this->first_query(seq, s)),
                      to = std::min(end, this->end_query(seq, s + height));
        if (from >= to) continue;
        const int64_t at = (from - i) * kTileKeys + j;
        add_outer(my.scores + at, height, to - from, my.dout_rows + g * seq.L * value_width, seq.L, from,
                  my.dv + j * value_width, value_width);
        add_outer(my.dscores + at, height, to - from, my.q_rows + g * seq.L * width, seq.L, from, my.dk + j * width,
                  width);
      }
    }
    if (dq)
      this->add_rows(seq, i, rows, keys, my.dscores, my.k_rows, keys.count * kPanel<T>, dq + i * width, width,
                     my.keys_finite);
  }

  // sums[rows][stride] += left^T, [count][kTileKeys], times packed rows from `first` on.
  void add_outer(const T* left, int64_t rows, int64_t count, const T* packed, int64_t in_all, int64_t first, T* sums,
                 int64_t stride) const {
    for (int64_t p = 0; p < stride / kPanel<T>; ++p) {
      const T* panel = packed + (p * in_all + first) * kPanel<T>;
      tile_rows<T, true>(rows, count, {left, kTileKeys}, panel, sums + p * kPanel<T>, stride, true, panel);
    }
  }

  // Row r of the tile: scores become weights, and products with values the gradient of products with keys.
  void row_backward(Desk& my, const Sequence& seq, int64_t h, int64_t g, int64_t l, const Keys& keys, bool with_bias,
                    int64_t r, int64_t filled) const {
    T *score = my.scores + r * kTileKeys, *d = my.dscores + r * kTileKeys;
    this->finish_scores(seq, h, l, keys, score, this->softcap ? my.slope : nullptr);
    const T base = my.base[g * seq.L + l], share = my.share[g * seq.L + l], delta = my.delta[g * seq.L + l];
    if (this->dropped) this->draw_kept(seq, h, l, keys.first, my.factors);
    for (int64_t j = 0; j < filled; j += kLanes<T>) {
      const Vec<T> p = exp<T>(load(score + j) - base) * share;
      Vec<T> kept = p, dp = load(d + j);
      if (this->dropped) kept *= load(my.factors + j), dp *= load(my.factors + j);
      // What is left out may stand opposite anything, NaN too.
      const Vec<T> ds = p == T(0) ? Vec<T>{} : p * (dp - delta);
      store(score + j, kept);
      store(d + j, ds);
    }
    if (this->dbias && with_bias) {
      T* to = this->dbias + seq.sample * this->d_n + h * this->d_h + l * this->d_l + keys.first * this->d_s;
      const int64_t count = std::min(keys.count, filled);
      if (this->d_s)
        for (int64_t j = 0; j < count; ++j) to[j] += d[j];
      else
        for (int64_t j = 0; j < count; ++j) *to += d[j];
    }
    for (int64_t j = 0; j < filled; j += kLanes<T>) {
      const Vec<T> ds = load(d + j) * this->scale;
      // Where a product was not made, the slope is that of anything.
      store(d + j, this->softcap ? (ds == T(0) ? ds : ds * load(my.slope + j)) : ds);
    }
  }
};

template <typename Pass, typename T, typename Call>
void run_attention(const Call& call, const Threads& threads) {
  Pass pass(call, threads.count);
  run_pass<Pass, T>(pass, threads);
}

template <typename T>
void attention_forward(const AttentionForward<T>& call, Threads threads) {
  if (AttentionFewQueriesPass<T>::serves(Attention<T, AttentionForward<T>>(call)))
    run_attention<AttentionFewQueriesPass<T>, T>(call, threads);
  else
    run_attention<AttentionForwardPass<T>, T>(call, threads);
}

template <typename T>
void attention_backward(const AttentionBackward<T>& call, Threads threads) {
  run_attention<AttentionBackwardPass<T>, T>(call, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
