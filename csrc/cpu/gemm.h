// Matrix products on packed weights: what the recurrent kernels spend their time in.
//
// The right-hand matrix is packed into panels of two vectors of columns, [K][2][lanes] each, so that the inner loop
// reads it in one stream. The left-hand matrix stays as it is, [rows][K]. A tile keeps kRows x 2 (or, for up to three rows,
// kRows x 4) vectors of results in registers over the whole of K; every element is one chain of FMAs in the order of k, so
// that a result does not depend on how rows and columns are shared out to threads.
#pragma once
#include <algorithm>

#include "cpu/simd.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kPanelVectors = 2;
template <typename T>
constexpr int kPanel = kPanelVectors * kLanes<T>;
// 6 x 2 sums, 2 vectors of the panel and a broadcast fill the 16 registers of AVX2.
constexpr int kTileRows = 6;
// Up to this many rows a tile is two panels wide, else it would have too few sums in flight to hide an FMA's latency.
constexpr int kWideRows = 3;

// How the columns of a matrix are laid out in panels. `kPlain`: one after the other. `kGates`: the columns are four gates of
// `count` units; a pair of panels holds all four gates of one block of units, so that whoever owns units owns whole panels.
template <typename T>
struct Columns {
  enum Kind { kPlain, kGates };
  int64_t count;
  Kind kind;

  int64_t blocks() const { return (count + kLanes<T> - 1) / kLanes<T>; }
  int64_t panels() const { return kind == kGates ? 2 * blocks() : (blocks() + 1) / 2; }
  int64_t first(int64_t panel, int v) const {
    return kind == kGates ? (panel % 2 * 2 + v) * count + panel / 2 * kLanes<T> : (panel * 2 + v) * kLanes<T>;
  }
  int lanes(int64_t panel, int v) const {
    const int64_t unit = kind == kGates ? panel / 2 * kLanes<T> : first(panel, v);
    return int(std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, count - unit)));
  }
};

// Packs panels [begin, end) of a weight matrix w stored [columns][K] (as torch stores the matrix of x W^T).
template <typename T>
void pack_transposed(const Columns<T>& columns, int64_t begin, int64_t end, const T* w, int64_t ld, int64_t K, T* packed) {
  constexpr int n = kLanes<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int v = 0; v < kPanelVectors; ++v) {
      const int lanes = columns.lanes(panel, v);
      const T* source = w + (lanes ? columns.first(panel, v) * ld : 0);
      T* target = packed + panel * K * kPanel<T> + v * n;
      int64_t k = 0;
      if (lanes == n) {
        for (; k + n <= K; k += n) {
          Vec<T> square[n];
          for (int i = 0; i < n; ++i) square[i] = load(source + i * ld + k);
          transpose<T>(square);
          for (int i = 0; i < n; ++i) store(target + (k + i) * kPanel<T>, square[i]);
        }
      }
      for (; k < K; ++k)
        for (int i = 0; i < n; ++i) target[k * kPanel<T> + i] = i < lanes ? source[i * ld + k] : T(0);
    }
  }
}

// Packs panels [begin, end) of a matrix whose row k is rows(k), for K rows.
template <typename T, typename Rows>
void pack_rows(const Columns<T>& columns, int64_t begin, int64_t end, const Rows& rows, int64_t K, T* packed) {
  for (int64_t k = 0; k < K; ++k) {
    const T* row = rows(k);
    for (int64_t panel = begin; panel < end; ++panel)
      for (int v = 0; v < kPanelVectors; ++v) {
        const int lanes = columns.lanes(panel, v);
        store(packed + (panel * K + k) * kPanel<T> + v * kLanes<T>,
              lanes ? load(row + columns.first(panel, v), lanes) : Vec<T>{});
      }
  }
}

// The left-hand matrix: [rows][K] with a stride between rows, or packed in tiles of kTileRows as [K][kTileRows].
template <typename T>
struct Left {
  const T* data;
  int64_t stride;
};

// What a product starts from: zeros, a bias per column (packed as one row of the panels), or what the result holds.
template <typename T>
struct Start {
  enum Kind { kZero, kBias, kResult };
  Kind kind;
  const T* bias = nullptr;
};

template <typename T>
struct Product {
  int64_t K;               // length of the sums
  const T* packed;         // panel p starts at packed + p * panel_stride
  int64_t panel_stride;
  Columns<T> columns;
  T* result;               // [rows][columns], rows `result_stride` apart
  int64_t result_stride;
  Start<T> start;
};

template <typename T, int kRows, int kPanels, bool kPackedLeft>
FASTSEQ_INLINE void tile(const Product<T>& p, Left<T> left, int64_t panel, int64_t row) {
  constexpr int kVectors = kPanels * kPanelVectors;
  // One row alone has too few sums to hide the latency: even and odd k are summed apart.
  constexpr int kSplit = kRows == 1 ? 2 : 1;
  Vec<T> sums[kSplit][kRows][kVectors];
  const T* weights = p.packed + panel * p.panel_stride;
  T* result = p.result + row * p.result_stride;
  const T* a = left.data + (kPackedLeft ? 0 : row * left.stride);

  for (int j = 0; j < kVectors; ++j) {
    const int64_t q = panel + j / 2;
    const int lanes = p.columns.lanes(q, j % 2);
    for (int i = 0; i < kRows; ++i) {
      if (p.start.kind == Start<T>::kZero)
        sums[0][i][j] = Vec<T>{};
      else if (p.start.kind == Start<T>::kBias)
        sums[0][i][j] = load(p.start.bias + q * kPanel<T> + j % 2 * kLanes<T>);
      else
        sums[0][i][j] = load(result + i * p.result_stride + p.columns.first(q, j % 2), lanes);
      for (int s = 1; s < kSplit; ++s) sums[s][i][j] = Vec<T>{};
    }
  }

  const auto step = [&](int64_t k, int s) __attribute__((always_inline)) {
    Vec<T> w[kVectors];
    for (int j = 0; j < kVectors; ++j)
      w[j] = load(weights + (j / 2) * p.panel_stride + k * kPanel<T> + j % 2 * kLanes<T>);
    for (int i = 0; i < kRows; ++i) {
      const T value = kPackedLeft ? a[k * kTileRows + i] : a[i * left.stride + k];
      for (int j = 0; j < kVectors; ++j) sums[s][i][j] += w[j] * value;
    }
  };
  int64_t k = 0;
  for (; k + kSplit <= p.K; k += kSplit)
    for (int s = 0; s < kSplit; ++s) step(k + s, s);
  if (k < p.K) step(k, 0);

  for (int j = 0; j < kVectors; ++j) {
    const int64_t q = panel + j / 2;
    const int lanes = p.columns.lanes(q, j % 2);
    for (int i = 0; i < kRows; ++i) {
      for (int s = 1; s < kSplit; ++s) sums[0][i][j] += sums[s][i][j];
      store(result + i * p.result_stride + p.columns.first(q, j % 2), sums[0][i][j], lanes);
    }
  }
}

template <typename T, int kRows, bool kPackedLeft>
void tile_pair(const Product<T>& p, Left<T> left, int64_t panel, int64_t count, int64_t row) {
  if constexpr (kRows <= kWideRows) {
    if (count == 2) return tile<T, kRows, 2, kPackedLeft>(p, left, panel, row);
  }
  for (int64_t i = 0; i < count; ++i) tile<T, kRows, 1, kPackedLeft>(p, left, panel + i, row);
}

// `rows` rows (at most kTileRows) of one panel or of two neighbouring ones.
template <typename T, bool kPackedLeft = false>
void tile_rows(const Product<T>& p, Left<T> left, int64_t panel, int64_t count, int64_t row, int64_t rows) {
  switch (rows) {
    case 1: return tile_pair<T, 1, kPackedLeft>(p, left, panel, count, row);
    case 2: return tile_pair<T, 2, kPackedLeft>(p, left, panel, count, row);
    case 3: return tile_pair<T, 3, kPackedLeft>(p, left, panel, count, row);
    case 4: return tile_pair<T, 4, kPackedLeft>(p, left, panel, count, row);
    case 5: return tile_pair<T, 5, kPackedLeft>(p, left, panel, count, row);
    case 6: return tile_pair<T, 6, kPackedLeft>(p, left, panel, count, row);
  }
}

// Rows [begin, end) of one panel or two: in tiles of as equal a height as possible.
template <typename T>
FASTSEQ_INLINE void multiply_panels(const Product<T>& p, Left<T> left, int64_t panel, int64_t count, int64_t begin,
                                    int64_t end) {
  const int64_t tiles = (end - begin + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = begin + (end - begin) * i / tiles, to = begin + (end - begin) * (i + 1) / tiles;
    tile_rows<T>(p, left, panel, count, from, to - from);
  }
}

// Rows [begin, end) of panels [first, last). Long sums are cut so that the panels stay in the L1 cache while the rows pass.
template <typename T>
void multiply(const Product<T>& product, Left<T> left, int64_t first, int64_t last, int64_t begin, int64_t end) {
  constexpr int64_t kDepth = 512 * 4 / sizeof(T);
  constexpr int64_t kRowsInL2 = 96;
  const int64_t depth = end - begin <= kWideRows ? product.K : kDepth;
  Product<T> p = product;
  for (int64_t k = 0; k == 0 || k < product.K; k += depth) {
    p.K = std::min(depth, product.K - k);
    p.packed = product.packed + k * kPanel<T>;
    if (k > 0) p.start.kind = Start<T>::kResult;
    for (int64_t row = begin; row < end; row += kRowsInL2)
      for (int64_t panel = first; panel < last; panel += 2)
        multiply_panels<T>(p, {left.data + k, left.stride}, panel, std::min<int64_t>(2, last - panel), row,
                           std::min(end, row + kRowsInL2));
  }
}

// result[m][n] = sum over k < K of left(k)[m] * right(k)[n], for m in [begin, end) and n < columns: the gradient of a weight.
// `left` and `right` give rows; `scratch` holds scratch_for_outer(columns) elements.
constexpr int64_t kOuterDepth = 256, kOuterRows = 16 * kTileRows;

template <typename T>
int64_t scratch_for_outer(int64_t columns) {
  return kOuterDepth * ((Columns<T>{columns, Columns<T>::kPlain}).panels() * kPanel<T> + kOuterRows);
}

template <typename T, typename LeftRows, typename RightRows>
void multiply_outer(const LeftRows& left, const RightRows& right, int64_t K, int64_t begin, int64_t end, int64_t columns,
                    T* result, bool add, T* scratch) {
  const Columns<T> plain{columns, Columns<T>::kPlain};
  T* packed_left = scratch;
  T* packed_right = scratch + kOuterDepth * kOuterRows;
  for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += kOuterDepth) {
    const int64_t depth = std::min(kOuterDepth, K - k0);
    pack_rows<T>(plain, 0, plain.panels(), [&](int64_t k) { return right(k0 + k); }, depth, packed_right);
    const auto start = k0 > 0 || add ? Start<T>::kResult : Start<T>::kZero;
    const Product<T> product{depth, packed_right, depth * kPanel<T>, plain, result, columns, {start}};
    for (int64_t m0 = begin; m0 < end; m0 += kOuterRows) {
      const int64_t rows = std::min(kOuterRows, end - m0);
      for (int64_t k = 0; k < depth; ++k) {
        const T* row = left(k0 + k) + m0;
        for (int64_t m = 0; m < rows; ++m)
          packed_left[(m / kTileRows * depth + k) * kTileRows + m % kTileRows] = row[m];
      }
      for (int64_t panel = 0; panel < plain.panels(); ++panel)
        for (int64_t m = 0; m < rows; m += kTileRows)
          tile_rows<T, true>(product, {packed_left + m * depth, 0}, panel, 1, m0 + m, std::min<int64_t>(kTileRows, rows - m));
    }
  }
}

// Four dot products of length K at once: rows w, w + gap, w + 2 gap, w + 3 gap with v.
template <typename T>
FASTSEQ_INLINE void dot_four(const T* w, int64_t gap, const T* v, int64_t K, T (&out)[4]) {
  constexpr int n = kLanes<T>;
  Vec<T> sums[2][4] = {};
  int64_t k = 0;
  for (; k + 2 * n <= K; k += 2 * n)
    for (int s = 0; s < 2; ++s) {
      const Vec<T> values = load(v + k + s * n);
      for (int i = 0; i < 4; ++i) sums[s][i] += load(w + i * gap + k + s * n) * values;
    }
  for (; k < K; k += n) {
    const int lanes = int(std::min<int64_t>(n, K - k));
    const Vec<T> values = load(v + k, lanes);
    for (int i = 0; i < 4; ++i) sums[0][i] += load(w + i * gap + k, lanes) * values;
  }
  for (int i = 0; i < 4; ++i) out[i] += sum<T>(sums[0][i] + sums[1][i]);
}

}  // namespace fastseq::FASTSEQ_ISA
