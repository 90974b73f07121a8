// Matrix products on packed weights: what the recurrent kernels spend their time in.
//
// The right-hand matrix is packed into panels of two vectors of columns, [K][2][lanes] each, so that the inner loop
// reads it in one stream. The left-hand matrix stays as it is, [rows][K]. A tile keeps the sums of up to six rows and
// of one panel, or of fewer rows and more panels, in registers. The sums of one or a few panels over some rows go to a
// buffer in the cache, [rows][panels]; what becomes of them (gates, a stored product) is the caller's epilogue.
#pragma once
#include <algorithm>

#include "cpu/simd.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kPanelVectors = 2;
template <typename T>
constexpr int kPanel = kPanelVectors * kLanes<T>;
// 6 x 2 sums, 2 vectors of the panel and a broadcast fill the 16 registers of AVX2; AVX-512 has 32.
constexpr int kTileRows = FASTSEQ_VECTOR_BYTES == 64 ? 8 : 6;
// Fewer rows take several panels at once: an FMA's latency wants eight sums in flight, and there are registers for
// twelve.
constexpr int kWideRows = 3;

// How the columns of a matrix are laid out in panels: its columns are `gates` gates of `count` units, and as many
// panels in a row hold a panel's worth of units of each gate, from gate `first_gate` on, so that whoever owns units
// owns panels.
template <typename T>
struct Columns {
  int64_t count;
  int gates = 1, first_gate = 0;

  int64_t panels() const { return gates * ((count + kPanel<T> - 1) / kPanel<T>); }
  int64_t first(int64_t panel, int v) const {
    return (panel + first_gate) % gates * count + panel / gates * kPanel<T> + v * kLanes<T>;
  }
  int lanes(int64_t panel, int v) const {
    const int64_t column = panel / gates * kPanel<T> + v * kLanes<T>;
    return int(std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, count - column)));
  }
};

// Packs panels [begin, end) of a weight matrix w stored [columns][K] (as torch stores the matrix of x W^T).
template <typename T, typename Element>
void pack_transposed(const Columns<T>& columns, int64_t begin, int64_t end, const Element* w, int64_t ld, int64_t K,
                     T* packed) {
  constexpr int n = kLanes<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int v = 0; v < kPanelVectors; ++v) {
      const int lanes = columns.lanes(panel, v);
      const Element* source = w + (lanes ? columns.first(panel, v) * ld : 0);
      T* target = packed + panel * K * kPanel<T> + v * n;
      int64_t k = 0;
      if (lanes == n) {
        for (; k + n <= K; k += n) {
          Vec<T> square[n];
          for (int i = 0; i < n; ++i) square[i] = load_as<T>(source + i * ld + k);
          transpose<T>(square);
          for (int i = 0; i < n; ++i) store(target + (k + i) * kPanel<T>, square[i]);
        }
      }
      for (; k < K; ++k)
        for (int i = 0; i < n; ++i) target[k * kPanel<T> + i] = i < lanes ? value_of<T>(source + i * ld + k) : T(0);
    }
  }
}

// A reference to a function that gives the rows of a matrix: a pointer to row k. It keeps what takes one from being
// compiled for each caller.
template <typename T>
class Rows {
 public:
  template <typename Function>
  Rows(const Function& function)
      : function_(&function),
        call_([](const void* f, int64_t k) -> const T* { return (*static_cast<const Function*>(f))(k); }) {}
  const T* operator()(int64_t k) const { return call_(function_, k); }

 private:
  const void* function_;
  const T* (*call_)(const void*, int64_t);
};

// Packs panels [begin, end) of a matrix whose row k is rows(k), for K rows. (Element is told, not deduced: a function
// of the caller's stands for Rows.)
template <typename T, typename Element = T>
void pack_rows(const Columns<T>& columns, int64_t begin, int64_t end, std::enable_if_t<true, Rows<Element>> rows,
               int64_t K, T* packed) {
  for (int64_t k = 0; k < K; ++k) {
    const Element* row = rows(k);
    for (int64_t panel = begin; panel < end; ++panel)
      for (int v = 0; v < kPanelVectors; ++v) {
        const int lanes = columns.lanes(panel, v);
        store(packed + (panel * K + k) * kPanel<T> + v * kLanes<T>,
              lanes ? load_as<T>(row + columns.first(panel, v), lanes) : Vec<T>{});
      }
  }
}

// A packed matrix of K rows.
template <typename T>
struct Packed {
  const T* data;
  int64_t K;
  const T* panel(int64_t q) const { return data + q * K * kPanel<T>; }
};

// The left-hand matrix: [rows][K] with a stride between rows, or transposed, [K][rows] with a stride between its K.
template <typename T>
struct Left {
  const T* data;
  int64_t stride;
};

// A panel of the right-hand matrix, [K][kPanel]: packed, or as it is, with a stride between its K.
template <typename T>
struct Panel {
  const T* data;
  int64_t stride;
  Panel(const T* panel, int64_t row = kPanel<T>) : data(panel), stride(row) {}
};

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a line of the cache

// sums[kRows][width] (+)= left[kRows][K] times kPanels panels, each `gap` behind the one before. Fetches a line of each
// row at `ahead` into the L2 cache on the way.
template <typename T, int kRows, int kPanels, bool kTransposedLeft>
FASTSEQ_INLINE void tile(int64_t K, Left<T> left, Panel<T> panel, int64_t gap, T* sums, int64_t width, bool add,
                         Panel<T> ahead) {
  constexpr int kVectors = kPanels * kPanelVectors;
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 64
  for (int i = 0; i < kRows * kVectors; ++i) acc[i / kVectors][i % kVectors] = Vec<T>{};
  for (int64_t k = 0; k < K; ++k) {
    if constexpr (kPanels == 1) __builtin_prefetch(ahead.data + k * ahead.stride, 0, 2);
    Vec<T> w[kVectors];
    for (int j = 0; j < kVectors; ++j) w[j] = load(panel.data + j / 2 * gap + k * panel.stride + j % 2 * kLanes<T>);
    for (int i = 0; i < kRows; ++i) {
      const T value = kTransposedLeft ? left.data[k * left.stride + i] : left.data[i * left.stride + k];
      for (int j = 0; j < kVectors; ++j) acc[i][j] += w[j] * value;
    }
  }
#pragma GCC unroll 64
  for (int i = 0; i < kRows * kVectors; ++i) {
    T* out = sums + i / kVectors * width + i % kVectors * kLanes<T>;
    const Vec<T> total = acc[i / kVectors][i % kVectors];
    store(out, add ? load(out) + total : total);
  }
}

// Up to kMost rows of one panel.
template <typename T, bool kTransposedLeft, int kMost>
FASTSEQ_INLINE void tile_of_up_to(int64_t rows, int64_t K, Left<T> left, Panel<T> panel, T* sums, int64_t width,
                                  bool add, Panel<T> ahead) {
  if (rows == kMost)
    tile<T, kMost, 1, kTransposedLeft>(K, left, panel, 0, sums, width, add, ahead);
  else if constexpr (kMost > 1)
    tile_of_up_to<T, kTransposedLeft, kMost - 1>(rows, K, left, panel, sums, width, add, ahead);
}

// Up to kTileRows rows of one panel.
template <typename T, bool kTransposedLeft = false>
void tile_rows(int64_t rows, int64_t K, Left<T> left, Panel<T> panel, T* sums, int64_t width, bool add,
               Panel<T> ahead) {
  tile_of_up_to<T, kTransposedLeft, kTileRows>(rows, K, left, panel, sums, width, add, ahead);
}

// A tile of kRows rows and of as many of `count` panels as it takes, at most kMost; returns how many.
template <typename T, int kRows, int kMost>
int64_t wide_tile(int64_t count, int64_t K, Left<T> left, const T* panel, int64_t gap, T* sums, int64_t width,
                  bool add) {
  if constexpr (kMost > 1)
    if (count < kMost || (kMost == 3 && count == 4))
      return wide_tile<T, kRows, kMost - 1>(count, K, left, panel, gap, sums, width, add);
  tile<T, kRows, kMost, false>(K, left, panel, gap, sums, width, add, panel);
  return kMost;
}

// How many rows of the left-hand matrix are worked on at once, so that they stay in the L2 cache (192 KB of it) while
// the panels pass.
constexpr int64_t kMostBlockRows = 16 * kTileRows;
template <typename T>
int64_t block_rows(int64_t K) {
  return std::max<int64_t>(2, std::min<int64_t>(16, 192 * 1024 / (K * sizeof(T) * kTileRows))) * kTileRows;
}

// sums[rows][width] (+)= left[rows][K] times `count` panels from `panel` on, in tiles of as equal a height as possible.
// Where there are many rows, long sums are cut so that a slice of a panel stays in half of the L1 cache while the rows
// pass, and the next slice, in the end that of panel `next`, is fetched ahead: the L1 hits of all tiles but the first
// give the hardware nothing to predict from.
template <typename T>
void multiply_panels(const Packed<T>& w, int64_t panel, int64_t count, int64_t next, Left<T> left, int64_t rows,
                     T* sums, int64_t width, bool add) {
  constexpr int64_t kDepth = 16 * 1024 / (kPanel<T> * sizeof(T));
  const int64_t stride = w.K * kPanel<T>;
  if (rows <= kWideRows) {
    for (int64_t q = 0; q < count;) {
      const T* first = w.panel(panel + q);
      T* out = sums + q * kPanel<T>;
      q += rows == 1   ? wide_tile<T, 1, 4>(count - q, w.K, left, first, stride, out, width, add)
           : rows == 2 ? wide_tile<T, 2, 3>(count - q, w.K, left, first, stride, out, width, add)
                       : wide_tile<T, 3, 2>(count - q, w.K, left, first, stride, out, width, add);
    }
    return;
  }
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t q = 0; q < count; ++q)
    for (int64_t k = 0; k < w.K; k += kDepth) {
      const int64_t depth = std::min(kDepth, w.K - k);
      const T* slice = w.panel(panel + q) + k * kPanel<T>;
      const T* ahead = k + kDepth < w.K || q + 1 < count ? slice + depth * kPanel<T> : w.panel(next);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
        tile_rows<T>(to - from, depth, {left.data + from * left.stride + k, left.stride}, slice,
                     sums + from * width + q * kPanel<T>, width, add || k > 0, i == 0 ? ahead : slice);
      }
    }
}

// left[rows][K] times panels [first, last): every vector of the product goes to put(row, column, lanes, vector).
template <typename T, typename Put>
void multiply(const Packed<T>& w, const Columns<T>& columns, int64_t first, int64_t last, Left<T> left, int64_t rows,
              const Put& put) {
  constexpr int64_t kPanelsAtOnce = 2;
  T sums[kMostBlockRows * kPanelsAtOnce * kPanel<T>];
  const int64_t most = block_rows<T>(w.K);
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t height = std::min(most, rows - row);
    for (int64_t panel = first; panel < last; panel += kPanelsAtOnce) {
      const int64_t count = std::min(kPanelsAtOnce, last - panel);
      const int64_t next = panel + count < last ? panel + count : first;
      multiply_panels<T>(w, panel, count, next, {left.data + row * left.stride, left.stride}, height, sums,
                         count * kPanel<T>, false);
      for (int64_t q = panel; q < panel + count; ++q)
        for (int v = 0; v < kPanelVectors; ++v) {
          const int lanes = columns.lanes(q, v);
          const int64_t column = columns.first(q, v);
          const T* sum = sums + (q - panel) * kPanel<T> + v * kLanes<T>;
          for (int64_t i = 0; lanes && i < height; ++i) put(row + i, column, lanes, load(sum + i * count * kPanel<T>));
        }
    }
  }
}

// result[m][n] (+)= sum over k < K of left(k)[m] * right(k)[n], for m in [begin, end) and n < columns: the gradient of
// a weight. `left` and `right` give rows; `scratch` holds scratch_for_outer(columns) elements.
constexpr int64_t kOuterDepth = 384, kOuterRows = 16 * kTileRows;
// So few products are added one by one, without packing.
constexpr int64_t kFewOuterProducts = 4;

template <typename T>
int64_t scratch_for_outer(int64_t columns) {
  return kOuterDepth * (Columns<T>{columns}.panels() * kPanel<T> + kOuterRows);
}

template <typename T>
void multiply_outer(Rows<T> left, Rows<T> right, int64_t K, int64_t begin, int64_t end, int64_t columns, T* result,
                    bool add, T* scratch) {
  const Columns<T> plain{columns};
  T* packed_left = scratch;
  T* packed_right = scratch + kOuterDepth * kOuterRows;
  if (K <= kFewOuterProducts) {
    T scales[kFewOuterProducts];
    const T* rows[kFewOuterProducts];
    for (int64_t k = 0; k < K; ++k) rows[k] = right(k);
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t k = 0; k < K; ++k) scales[k] = left(k)[m];
      for (int64_t n = 0; n < columns; n += kLanes<T>) {
        const int lanes = int(std::min<int64_t>(kLanes<T>, columns - n));
        T* out = result + m * columns + n;
        Vec<T> total = add ? load(out, lanes) : Vec<T>{};
        for (int64_t k = 0; k < K; ++k) total += load(rows[k] + n, lanes) * scales[k];
        store(out, total, lanes);
      }
    }
    return;
  }
  T sums[kOuterRows * kPanel<T>];
  for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += kOuterDepth) {
    const int64_t depth = std::min(kOuterDepth, K - k0);
    const Packed<T> w{packed_right, depth};
    const auto slice = [&](int64_t k) { return right(k0 + k); };
    pack_rows<T>(plain, 0, plain.panels(), slice, depth, packed_right);
    for (int64_t m0 = begin; m0 < end; m0 += kOuterRows) {
      const int64_t rows = std::min(kOuterRows, end - m0);
      for (int64_t k = 0; k < depth; ++k) {
        const T* row = left(k0 + k) + m0;
        T* target = packed_left + k * kTileRows;
        int64_t m = 0;
        for (; m + kTileRows <= rows; m += kTileRows, target += depth * kTileRows)
          memcpy(target, row + m, kTileRows * sizeof(T));
        for (int64_t i = 0; m + i < rows; ++i) target[i] = row[m + i];
      }
      for (int64_t panel = 0; panel < plain.panels(); ++panel) {
        for (int64_t m = 0; m < rows; m += kTileRows)
          tile_rows<T, true>(std::min<int64_t>(kTileRows, rows - m), depth, {packed_left + m * depth, kTileRows},
                             w.panel(panel), sums + m * kPanel<T>, kPanel<T>, false, w.panel(panel));
        for (int v = 0; v < kPanelVectors; ++v) {
          const int lanes = plain.lanes(panel, v);
          if (lanes == 0) continue;
          T* out = result + m0 * columns + plain.first(panel, v);
          for (int64_t m = 0; m < rows; ++m, out += columns) {
            const Vec<T> total = load(sums + m * kPanel<T> + v * kLanes<T>);
            store(out, k0 > 0 || add ? load(out, lanes) + total : total, lanes);
          }
        }
      }
    }
  }
}

// result[n] (+)= sum over k < K of left[k] * w[k * ld + n] for n in [begin, end): one row times a matrix as it is.
template <typename T, typename Element>
void multiply_row(const T* left, const Element* w, int64_t ld, int64_t K, int64_t begin, int64_t end, T* result,
                  bool add) {
  constexpr int n = kLanes<T>;
  const auto columns = [&](auto vectors, int lanes) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    for (; begin + (kVectors - 1) * n + lanes <= end; begin += kVectors * n) {
      Vec<T> sums[kVectors] = {};
      for (int64_t k = 0; k < K; ++k)
        for (int j = 0; j < kVectors; ++j) sums[j] += load_as<T>(w + k * ld + begin + j * n, lanes) * left[k];
      for (int j = 0; j < kVectors; ++j) {
        T* out = result + begin + j * n;
        store(out, add ? load(out, lanes) + sums[j] : sums[j], lanes);
      }
    }
  };
  columns(std::integral_constant<int, 8>(), n);
  columns(std::integral_constant<int, 4>(), n);
  columns(std::integral_constant<int, 1>(), n);
  if (begin < end) columns(std::integral_constant<int, 1>(), int(end - begin));
}

// kCount dot products of length K at once: rows w, w + gap, w + 2 gap, ... with v; added to `out`.
template <int kCount, typename T, typename Element>
FASTSEQ_INLINE void dot_rows(const Element* w, int64_t gap, const T* v, int64_t K, T* out) {
  constexpr int n = kLanes<T>;
  Vec<T> sums[2][kCount] = {};
  int64_t k = 0;
  for (; k + 2 * n <= K; k += 2 * n)
    for (int s = 0; s < 2; ++s) {
      const Vec<T> values = load(v + k + s * n);
      for (int i = 0; i < kCount; ++i) sums[s][i] += load_as<T>(w + i * gap + k + s * n) * values;
    }
  for (; k < K; k += n) {
    const int lanes = int(std::min<int64_t>(n, K - k));
    const Vec<T> values = load(v + k, lanes);
    for (int i = 0; i < kCount; ++i) sums[0][i] += load_as<T>(w + i * gap + k, lanes) * values;
  }
  for (int i = 0; i < kCount; ++i) out[i] += sum<T>(sums[0][i] + sums[1][i]);
}

// out[j] = rows[j * ld] . v for `count` rows of length K; `out` has room for whole vectors.
template <typename T, typename Element>
void dot_each(const Element* rows, int64_t ld, const T* v, int64_t K, int64_t count, T* out) {
  constexpr int n = kLanes<T>;
  constexpr auto lanes = std::make_index_sequence<n>{};
  for (int64_t j = 0; j < count; j += n) {
    Vec<T> sums[n] = {};
    const auto add = [&](int64_t k, int width) __attribute__((always_inline)) {
      const Vec<T> values = load(v + k, width);
      for (int i = 0; i < n; ++i)
        sums[i] += load_as<T>(rows + std::min<int64_t>(j + i, count - 1) * ld + k, width) * values;
    };
    int64_t k = 0;
    for (; k + n <= K; k += n) add(k, n);
    if (k < K) add(k, int(K - k));
    // As in transpose, but that the halves of a shuffle are added.
    for (int width = n / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i)
        sums[i] = interleave<T, false>(sums[i], sums[i + width], lanes) +
                  interleave<T, true>(sums[i], sums[i + width], lanes);
    store(out + j, sums[0]);
  }
}

}  // namespace fastseq::FASTSEQ_ISA
