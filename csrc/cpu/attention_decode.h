// Attention forward of few queries, as in decoding: keys and values are read once, where they are, and keys are the
// vectors' lanes. Splits of the keys are tasks of their own where there are few heads, as many as shapes say; their
// sums are merged in order.
#pragma once
#include "cpu/attention_forward.h"

namespace fastseq::FASTSEQ_ISA {

template <typename T>
struct AttentionDecodePass : AttentionRows<T> {
  using Base = AttentionRows<T>;
  using Base::E, Base::Ev, Base::group, Base::Hk, Base::value_width;
  using typename Base::Progress;
  using typename Base::Sequence;
  using typename Base::Tile;

  static constexpr int64_t kMostRows = 8, kTasks = 32, kKeys = 4 * kTileKeys;

  int64_t rows, splits, split_keys, part_size;
  T* parts;

  static bool serves(const AttentionRows<T>& call) { return call.group * call.longest_q <= kMostRows && !call.weights; }

  AttentionDecodePass(const AttentionForward<T>& call, int) : Base(call) {
    rows = group * this->longest_q;
    const int64_t heads = std::max<int64_t>(1, this->sequences * Hk), keys = std::max<int64_t>(1, this->longest_k);
    splits = std::max<int64_t>(1, std::min((kTasks + heads - 1) / heads, keys / kKeys));
    split_keys = ((keys + splits - 1) / splits + kTileKeys - 1) / kTileKeys * kTileKeys;
    splits = (keys + split_keys - 1) / split_keys;
  }

  struct Desk {
    T* q;  // scaled
    Progress rows;
    T *scores, *factors;
  };

  Desk desk(Pieces<T>& pieces) const {
    Desk desk{};
    desk.q = pieces.take(rows * E);
    desk.rows = Progress::take(pieces, rows, *this);
    desk.scores = pieces.take(kKeys);
    desk.factors = pieces.take(this->dropout ? kKeys : 0);
    return desk;
  }

  int64_t lay_out(T* start, int members) {
    Pieces<T> part{nullptr}, pieces{start};
    this->lay_out_desks(pieces, members, [&](Pieces<T>& of_one) { desk(of_one); });
    Progress::take(part, rows, *this);
    part_size = part.count;
    parts = pieces.take(splits > 1 ? this->sequences * Hk * splits * part_size : 0);
    return pieces.count;
  }

  Progress part(int64_t head, int64_t split) const {
    Pieces<T> pieces{parts + (head * splits + split) * part_size};
    return Progress::take(pieces, rows, *this);
  }

  void run(int rank, Team& team) const {
    Pieces<T> mine = this->desk_at(rank);
    Desk desk = this->desk(mine);
    const int64_t heads = this->sequences * Hk;
    for (int64_t task; (task = this->next.fetch_add(1, std::memory_order_relaxed)) < heads * splits;) {
      const int64_t at = task / splits;
      if (splits > 1) desk.rows = part(at, task % splits);
      with_stored<T>(this->stored, [&](auto element) {
        attend<decltype(element)>(desk, this->sequence(at / Hk), at % Hk, task % splits * split_keys);
      });
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

  template <typename Element>
  void attend(Desk& my, const Sequence& seq, int64_t head, int64_t s) const {
    if (seq.L == 0) return;
    my.rows.start(rows, value_width);
    each_row(seq, head, [&](int64_t row, int64_t h, int64_t l) {
      const Element* q = this->q.template row<Element>(seq.sample, h, seq.q0 + l);
      for (int64_t e = 0; e < E; ++e) my.q[row * E + e] = value_of<T>(q + e) * this->scale;
    });
    const int64_t last = std::min(s + split_keys, this->end_key(seq, seq.L - 1));
    for (s = std::max(s, this->first_key(seq, 0) / kTileKeys * kTileKeys); s < last; s += kKeys) {
      const int64_t count = std::min(kKeys, last - s);
      if (this->padded_keys(seq, s, count) == count) continue;
      const Element* k = this->k.template row<Element>(seq.sample, head, seq.k0 + s);
      const Element* v = this->v.template row<Element>(seq.sample, head, seq.k0 + s);
      const bool whole = this->is_whole(seq, {head, 0, seq.L, s, count}), finite = whole || rows_finite(v, count);
      each_row(seq, head, [&](int64_t row, int64_t h, int64_t l) {
        dot_each<T>(k, this->k.l, my.q + row * E, E, count, my.scores);
        if (!whole) finish_scores(seq, h, l, s, count, my.scores);
        softmax(my.rows, row, my.scores, count);
        if (this->dropout) {
          for (int64_t i = 0; i < count; i += kTileKeys)
            draw_row(this->dropout, this->matrix(seq, h), l, s + i, my.factors + i);
          for (int64_t i = 0; i < count; ++i) my.scores[i] *= my.factors[i];
        }
        T* sums = my.rows.sums + row * value_width;
        if (finite) return multiply_row<T>(my.scores, v, this->v.l, count, 0, Ev, sums, true);
        for (int64_t i = 0; i < count; ++i)  // a weight of 0 leaves out a value that may be infinite or NaN
          for (int64_t e = 0; my.scores[i] != 0 && e < Ev; ++e)
            sums[e] += my.scores[i] * value_of<T>(v + i * this->v.l + e);
      });
    }
    if (splits == 1) finish_rows(my.rows, seq, head);
  }

  void finish_rows(const Progress& progress, const Sequence& seq, int64_t head) const {
    each_row(seq, head, [&](int64_t row, int64_t h, int64_t l) { this->finish(progress, row, seq, h, l, 1); });
  }

  template <typename Element>
  bool rows_finite(const Element* v, int64_t count) const {
    T product = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t e = 0; e < Ev; ++e) product += value_of<T>(v + i * this->v.l + e) * T(0);
    return product == 0;
  }

  // What Attention::finish_scores does, for one query.
  void finish_scores(const Sequence& seq, int64_t h, int64_t l, int64_t s, int64_t count, T* score) const {
    const bool* padding = this->padding_of(seq);
    const int64_t first = this->first_key(seq, l), end = this->end_key(seq, l), at = this->mask_at(seq, h, l, s);
    const T slope = this->slopes ? this->slopes[h] : T(0);
    const int64_t ahead = s - l - seq.offset;
    for (int64_t j = 0; j < count; j += kLanes<T>) {
      const int lanes = int(std::min<int64_t>(kLanes<T>, count - j));
      Vec<T> scores = load(score + j);
      if (this->softcap) scores = tanh<T>(scores / this->softcap) * this->softcap;
      store(score + j, scores);
      for (int i = 0; slope != 0 && i < lanes; ++i) score[j + i] -= slope * T(std::abs(int32_t(ahead + j + i)));
      if (this->bias || this->allowed) {
        const Vec<T> never = Base::kMinusInfinity - Vec<T>{}, more = this->mask_row(at + j * this->m_s, lanes);
        store(score + j, more == never ? never : load(score + j) + more);
      }
      for (int i = 0; i < lanes; ++i)
        if ((padding && padding[s + j + i]) || s + j + i < first || s + j + i >= end)
          score[j + i] = Base::kMinusInfinity;
    }
  }

  // A step of the online softmax of one row: its scores, followed by room for a vector, become exp(score - largest).
  void softmax(Progress& my, int64_t row, T* score, int64_t count) const {
    constexpr T kLog2E = T(1.44269504088896340736);
    const int64_t filled = (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    std::fill(score + count, score + filled, Base::kMinusInfinity);
    Vec<T> high = load(score);
    for (int64_t j = kLanes<T>; j < filled; j += kLanes<T>) high = larger<T>(high, load(score + j));
    T lanes[kLanes<T>];
    store(lanes, high);
    T top = my.largest[row];
    for (const T lane : lanes) top = std::max(top, lane);
    const T base = raise(my, row, top);
    Vec<T> total{};
    for (int64_t j = 0; j < filled; j += kLanes<T>) {
      const Vec<T> p = exp2<T, true>((load(score + j) - base) * kLog2E);
      store(score + j, p);
      total += p;
    }
    my.weight[row] += sum<T>(total);
  }

  // Sets the largest score of a row; returns what scores are to be taken relative to.
  T raise(Progress& my, int64_t row, T top) const {
    const T before = my.largest[row], base = top == Base::kMinusInfinity ? T(0) : top;
    my.largest[row] = top;
    if (top == before || before == Base::kMinusInfinity) return base;  // or nothing has been summed up
    const T by = exp<T>((before - base) - Vec<T>{})[0];
    my.weight[row] *= by;
    this->shrink_sums(my.sums + row * value_width, by);
    return base;
  }

  void merge(int64_t at) const {
    const Sequence seq = this->sequence(at / Hk);
    Progress all = part(at, 0);
    each_row(seq, at % Hk, [&](int64_t row, int64_t, int64_t) {
      for (int64_t i = 1; i < splits; ++i) {
        Progress more = part(at, i);
        const T top = std::max(all.largest[row], more.largest[row]);
        raise(all, row, top), raise(more, row, top);
        all.weight[row] += more.weight[row];
        for (int64_t u = 0; u < value_width; ++u) all.sums[row * value_width + u] += more.sums[row * value_width + u];
      }
    });
    finish_rows(all, seq, at % Hk);
  }
};

}  // namespace fastseq::FASTSEQ_ISA
