// Which elements dropout drops, drawn by their places: fastseq/reference/dropout.py.
#pragma once
#include "cpu/dropout.h"
#include "cpu/simd.h"

namespace fastseq::FASTSEQ_ISA {

// A counter gives the bits of kHalves columns, kCounters apart; kCounters of them a row's next kDrawn columns.
constexpr int kCounters = 16, kHalves = 8;
constexpr int64_t kDrawn = kCounters * kHalves;

// Draws for as many counters: factors[k] are what the k-th 16 bits of each say, 0 or what is kept is multiplied by.
template <typename T>
struct Draws {
  uint32_t columns[kCounters], rows[kCounters];
  T factors[kHalves][kCounters];
};

template <typename T>
void draw(const Dropout<T>& dropout, uint32_t matrix, Draws<T>& draws) {
  constexpr int kRounds = 7, kWords = sizeof(Words) / 4;
  int32_t drawn[kHalves][kCounters];
  for (int v = 0; v < kCounters; v += kWords) {
    Words x[4];
    memcpy(&x[0], draws.columns + v, sizeof(Words)), memcpy(&x[1], draws.rows + v, sizeof(Words));
    x[2] = matrix - Words{}, x[3] = Words{};
    uint32_t key_low = uint32_t(dropout.seed), key_high = uint32_t(dropout.seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      Words even_high, even_low, odd_high, odd_low;
      multiply_words(x[0], 0xD2511F53u, even_high, even_low);
      multiply_words(x[2], 0xCD9E8D57u, odd_high, odd_low);
      x[0] = odd_high ^ x[1] ^ key_low, x[1] = odd_low;
      x[2] = even_high ^ x[3] ^ key_high, x[3] = even_low;
      key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
    }
    for (int word = 0; word < 4; ++word) {
      const Words halves[] = {x[word] & 0xffffu, x[word] >> 16};
      for (int i = 0; i < 2; ++i) memcpy(drawn[2 * word + i] + v, &halves[i], sizeof(Words));
    }
  }
  const int32_t dropped = int32_t(dropout.dropped);  // in vectors, which takes a copy of each
  const T kept = dropout.kept;
  for (int half = 0; half < kHalves; ++half)
    for (int i = 0; i < kCounters; ++i) draws.factors[half][i] = drawn[half][i] < dropped ? T(0) : kept;
}

// The factors of one row's kDrawn columns from `first`, a multiple of it.
template <typename T>
void draw_row(const Dropout<T>& dropout, uint32_t matrix, int64_t row, int64_t first, T* factors) {
  Draws<T> draws;
  for (int k = 0; k < kCounters; ++k) {
    draws.columns[k] = uint32_t(first / kDrawn * kCounters + k);
    draws.rows[k] = uint32_t(row);
  }
  draw(dropout, matrix, draws);
  memcpy(factors, draws.factors, sizeof draws.factors);
}

}  // namespace fastseq::FASTSEQ_ISA
