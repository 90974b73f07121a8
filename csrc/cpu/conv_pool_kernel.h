// Convolution, bias, ReLU and max-pooling in one pass: fastseq/reference/conv_pool.py.
//
// Inside, pixels are rows of channels: x is brought so, with its padding, for a band of rows at a time that fits the
// cache. The forward pass computes the conv's rows of one row of windows, a panel of output channels at a time, into a
// buffer in the cache, where they are pooled; nothing else ever sees them.
//
// Of the gradient behind the pooling at most one pixel of each window is not zero. The backward pass goes from one such
// pixel to the next, channel by channel, and multiplies by nothing else: of windows of 2 x 2 it has a quarter of the
// products of a convolution to compute, and less where ReLU is shut.
#pragma once
#include "cpu/conv_pool.h"
#include "cpu/gemm.h"
#include "cpu/pass.h"
#include "cpu/simd.h"

namespace fastseq::FASTSEQ_ISA {

// In the place of a position: ReLU is shut, there is no gradient.
constexpr uint8_t kShut = 255;

// A thread for each so many products: waking it costs what they cost.
constexpr int64_t kProductsPerThread = 1 << 19;

// How many elements of x a band may have, if it is of more than one row of windows.
constexpr int64_t kBandElements = 16 * 1024;

// The pixels of an image, one after the other: `width` in a row, `stride` elements apart, rows `pitch` apart.
template <typename T>
struct Pixels {
  T* row;
  int64_t width, stride, pitch, column = 0;

  T* next() {
    T* pixel = row + column * stride;
    if (++column == width) column = 0, row += pitch;
    return pixel;
  }
};

// Copies `count` elements of each of C planes, which are `plane` apart, into that many pixels.
template <typename T>
void to_pixels(const T* planes, int64_t plane, int64_t count, int64_t C, Pixels<T> pixels) {
  constexpr int n = kLanes<T>;
  for (int64_t i = 0; i < count; i += n) {
    const int width = int(std::min<int64_t>(n, count - i));
    T* at[n];
    for (int j = 0; j < width; ++j) at[j] = pixels.next();
    int64_t c = 0;
    for (; width == n && c + n <= C; c += n) {
      Vec<T> square[n];
      for (int j = 0; j < n; ++j) square[j] = load(planes + (c + j) * plane + i);
      transpose<T>(square);
      for (int j = 0; j < n; ++j) store(at[j] + c, square[j]);
    }
    for (; c < C; ++c)
      for (int j = 0; j < width; ++j) at[j][c] = planes[c * plane + i + j];
  }
}

// The reverse.
template <typename T>
void to_planes(Pixels<const T> pixels, int64_t count, int64_t C, T* planes, int64_t plane) {
  constexpr int n = kLanes<T>;
  for (int64_t i = 0; i < count; i += n) {
    const int width = int(std::min<int64_t>(n, count - i));
    const T* at[n];
    for (int j = 0; j < width; ++j) at[j] = pixels.next();
    int64_t c = 0;
    for (; width == n && c + n <= C; c += n) {
      Vec<T> square[n];
      for (int j = 0; j < n; ++j) square[j] = load(at[j] + c);
      transpose<T>(square);
      for (int j = 0; j < n; ++j) store(planes + (c + j) * plane + i, square[j]);
    }
    for (; c < C; ++c)
      for (int j = 0; j < width; ++j) planes[c * plane + i + j] = at[j][c];
  }
}

// Positions in windows, as they are stored, of the first n lanes; the others are shut.
template <typename T>
struct Positions {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  using IntVec = typename Simd<T>::IntVec;

  static FASTSEQ_INLINE void store(uint8_t* p, IntVec positions, int lanes) {
    const Bytes bytes = __builtin_convertvector(positions, Bytes);
    memcpy(p, &bytes, lanes == kLanes<T> ? kLanes<T> : lanes);
  }
  static FASTSEQ_INLINE IntVec load(const uint8_t* p, int lanes) {
    Bytes bytes;
    if (lanes == kLanes<T>) {
      memcpy(&bytes, p, sizeof bytes);
    } else {
      memset(&bytes, kShut, sizeof bytes);
      memcpy(&bytes, p, lanes);
    }
    return __builtin_convertvector(bytes, IntVec);
  }
};

template <typename T, typename Call>
struct ConvPoolPass : Call {
  int64_t width;                // of a band's rows, in pixels
  int64_t taps;                 // pixels that a sum sees
  int64_t band_windows, bands;  // rows of windows in a band; how many bands an image has
  int64_t most_rows, step;      // rows of x in a band, and from one band to the next

  explicit ConvPoolPass(const Call& call, int64_t wanted_bands) : Call(call) {
    taps = this->kernel.h * this->kernel.w;
    width =
        std::max((this->out.w * this->window.w - 1) * this->stride.w + this->kernel.w, this->padding.w + this->in.w);
    const int64_t row = width * this->C * this->window.h * this->stride.h;
    band_windows = std::max<int64_t>(1, kBandElements / row);
    wanted_bands = std::min(std::max((this->out.h + band_windows - 1) / band_windows, wanted_bands), this->out.h);
    band_windows = (this->out.h + wanted_bands - 1) / wanted_bands;
    bands = (this->out.h + band_windows - 1) / band_windows;
    step = band_windows * this->window.h * this->stride.h;
    // The last one has all rows that are left, those too that no window sees.
    const int64_t left = this->in.h + this->padding.h - (bands - 1) * step;
    most_rows = std::max({rows_of(band_windows), step, left});
  }

  int64_t rows_of(int64_t windows) const { return (windows * this->window.h - 1) * this->stride.h + this->kernel.h; }
  int64_t windows_of(int64_t band) const { return std::min(band_windows, this->out.h - band * band_windows); }
  int64_t top_of(int64_t band) const { return band * step - this->padding.h; }  // the band's first row in x
  int64_t products() const {
    return this->B * this->out.h * this->out.w * this->window.h * this->window.w * this->O * this->C * taps;
  }
  int team_size(const Threads& threads, int64_t tasks) const {
    return int(std::max<int64_t>(
        1, std::min<int64_t>({threads.count, Team::kMost, tasks, products() / kProductsPerThread + 1})));
  }

  // The rows of a band as [rows][width][stride] with zeros for the padding and for channels beyond C.
  void load_band(int64_t member, int64_t band, int64_t stride, T* rows) const {
    const int64_t count = rows_of(windows_of(band)), top = top_of(band);
    std::fill(rows, rows + count * width * stride, T(0));
    const int64_t first = std::max<int64_t>(0, top), last = std::min(this->in.h, top + count);
    if (first >= last) return;
    const int64_t W = this->in.w, C = this->C;
    const T* x = this->x + member * C * this->in.h * W;
    T* start = rows + ((first - top) * width + this->padding.w) * stride;
    if (!this->channels_last && C > 1) {
      to_pixels<T>(x + first * W, this->in.h * W, (last - first) * W, C, {start, W, stride, width * stride});
      return;
    }
    for (int64_t row = first; row < last; ++row, start += width * stride) {
      const int64_t pixels = stride == C ? 1 : W, length = W / pixels * C;
      for (int64_t i = 0; i < pixels; ++i) memcpy(start + i * stride, x + row * W * C + i * length, length * sizeof(T));
    }
  }
};

// sums[kRows][panel] = bias + the products of kRows pixels, `stride` apart, with a panel of weights. What a sum sees is
// in `height` rows, `pitch` apart, of `run` elements.
template <typename T, int kRows, int kVectors>
FASTSEQ_INLINE void conv_tile(const T* x, int64_t stride, int64_t pitch, int64_t height, int64_t run, const T* panel,
                              const T* bias, T* sums) {
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 64
  for (int i = 0; i < kRows * kVectors; ++i) acc[i / kVectors][i % kVectors] = load(bias + i % kVectors * kLanes<T>);
  for (int64_t row = 0; row < height; ++row, x += pitch)
    for (int64_t k = 0; k < run; ++k, panel += kPanel<T>) {
      Vec<T> w[kVectors];
      for (int j = 0; j < kVectors; ++j) w[j] = load(panel + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        const T value = x[i * stride + k];
        for (int j = 0; j < kVectors; ++j) acc[i][j] += w[j] * value;
      }
    }
#pragma GCC unroll 64
  for (int i = 0; i < kRows * kVectors; ++i)
    store(sums + i / kVectors * kPanel<T> + i % kVectors * kLanes<T>, acc[i / kVectors][i % kVectors]);
}

template <typename T, int kVectors, int kMost = kTileRows>
FASTSEQ_INLINE void conv_tile_of_up_to(int64_t rows, const T* x, int64_t stride, int64_t pitch, int64_t height,
                                       int64_t run, const T* panel, const T* bias, T* sums) {
  if (rows == kMost)
    conv_tile<T, kMost, kVectors>(x, stride, pitch, height, run, panel, bias, sums);
  else if constexpr (kMost > 1)
    conv_tile_of_up_to<T, kVectors, kMost - 1>(rows, x, stride, pitch, height, run, panel, bias, sums);
}

// As many pixels as there are in a row.
template <typename T, int kVectors>
void conv_row(int64_t pixels, const T* x, int64_t stride, int64_t pitch, int64_t height, int64_t run, const T* panel,
              const T* bias, T* sums) {
  const int64_t tiles = (pixels + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = share(pixels, i, tiles), to = share(pixels, i + 1, tiles);
    conv_tile_of_up_to<T, kVectors>(to - from, x + from * stride, stride, pitch, height, run, panel, bias,
                                    sums + from * kPanel<T>);
  }
}

// ReLU of the largest of a window's pixels, and where that is. As torch's: the first of several, the last NaN. `side`
// is that of the window if it is known, else 0.
template <typename T, int kSide, bool kTape>
FASTSEQ_INLINE Vec<T> pooled(const T* sums, int64_t pitch, Extent window, typename Simd<T>::IntVec& position) {
  using IntVec = typename Simd<T>::IntVec;
  const int64_t height = kSide ? kSide : window.h, width = kSide ? kSide : window.w;
  Vec<T> best = load(sums);
  IntVec found{};
  typename Simd<T>::Int j = 0;
  for (int64_t h = 0; h < height; ++h)
    for (int64_t w = 0; w < width; ++w, ++j) {
      if (h == 0 && w == 0) continue;
      const Vec<T> value = load(sums + h * pitch + w * kPanel<T>);
      const IntVec taken = IntVec(value > best) | IntVec(value != value);
      best = taken ? value : best;
      if constexpr (kTape) found = taken ? j - IntVec{} : found;
    }
  const auto shut = best <= Vec<T>{};
  if constexpr (kTape) position = shut ? kShut - IntVec{} : found;
  return shut ? Vec<T>{} : best;
}

template <typename T>
struct ConvPoolForwardPass : ConvPoolPass<T, ConvPoolForward<T>> {
  Columns<T> columns{0};
  T *packed, *bias_panels, *of_threads;  // [panels][taps * C][panel], [panels][panel], scratch
  int64_t of_thread;
  mutable std::atomic<int64_t> next{0};

  ConvPoolForwardPass(const ConvPoolForward<T>& call, const Threads& threads)
      : ConvPoolPass<T, ConvPoolForward<T>>(call, call.B < threads.count ? threads.count : 1), columns{call.O} {}

  int team_size(const Threads& threads) const {
    return ConvPoolPass<T, ConvPoolForward<T>>::team_size(threads, this->B * this->bands);
  }

  struct Scratch {
    T *band, *sums, *pooled;
  };
  int64_t lay_out_thread(T* start, Scratch& scratch) const {
    Pieces<T> pieces{start};
    scratch.band = pieces.take(this->most_rows * this->width * this->C);
    scratch.sums = pieces.take(this->window.h * this->window.w * this->out.w * kPanel<T>);
    scratch.pooled = pieces.take(this->band_windows * this->out.w * kPanel<T>);
    return pieces.count;
  }

  int64_t lay_out(T* start, int threads) {
    Pieces<T> pieces{start};
    packed = pieces.take(columns.panels() * this->taps * this->C * kPanel<T>);
    bias_panels = pieces.take(columns.panels() * kPanel<T>);
    Scratch scratch;
    of_thread = lay_out_thread(nullptr, scratch);
    of_threads = pieces.take(threads * of_thread);
    return pieces.count;
  }

  // [O][C][taps] into panels whose rows go by tap, then by channel, as they come in a band.
  void pack(int64_t panel) const {
    constexpr int n = kLanes<T>;
    const int64_t C = this->C, K = C * this->taps;
    for (int v = 0; v < kPanelVectors; ++v) {
      const int lanes = columns.lanes(panel, v);
      const int64_t first = columns.first(panel, v);
      T* target = packed + panel * K * kPanel<T> + v * n;
      const T* source = this->weight + (lanes ? first * K : 0);
      T* bias = bias_panels + panel * kPanel<T> + v * n;
      store(bias, this->bias && lanes ? load(this->bias + first, lanes) : Vec<T>{});
      int64_t c = 0, tap = 0;
      const auto row = [&]() {
        T* at = target + (tap * C + c) * kPanel<T>;
        if (++tap == this->taps) tap = 0, ++c;
        return at;
      };
      int64_t k = 0;
      for (; lanes == n && k + n <= K; k += n) {
        Vec<T> square[n];
        for (int i = 0; i < n; ++i) square[i] = load(source + i * K + k);
        transpose<T>(square);
        for (int i = 0; i < n; ++i) store(row(), square[i]);
      }
      for (; k < K; ++k) {
        T* at = row();
        for (int i = 0; i < n; ++i) at[i] = i < lanes ? source[i * K + k] : T(0);
      }
    }
  }

  void run(int rank, Team& team) const {
    for (int64_t panel = share(columns.panels(), rank, team.size());
         panel < share(columns.panels(), rank + 1, team.size()); ++panel)
      pack(panel);
    team.barrier(rank, 0, team.size());
    Scratch scratch;
    lay_out_thread(of_threads + rank * of_thread, scratch);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < this->B * this->bands;) {
      const int64_t member = task / this->bands, band = task % this->bands;
      this->load_band(member, band, this->C, scratch.band);
      for (int64_t panel = 0; panel < columns.panels(); ++panel) compute(member, band, panel, scratch);
    }
  }

  // A band's pooled pixels in a panel's channels.
  void compute(int64_t member, int64_t band, int64_t panel, const Scratch& scratch) const {
    const int64_t C = this->C, O = this->O, pixels = this->out.w * this->window.w, pitch = this->width * C;
    const int64_t windows = this->windows_of(band), image = this->out.h * this->out.w;
    const int64_t first_window = band * this->band_windows * this->out.w;
    const T *w = packed + panel * this->taps * C * kPanel<T>, *bias = bias_panels + panel * kPanel<T>;
    const bool is_narrow = columns.lanes(panel, 1) == 0;
    T* const y = this->y + member * image * O;
    for (int64_t r = 0; r < windows; ++r) {
      for (int64_t h = 0; h < this->window.h; ++h) {
        const T* row = scratch.band + (r * this->window.h + h) * this->stride.h * pitch;
        T* sums = scratch.sums + h * pixels * kPanel<T>;
        const int64_t run = this->kernel.w * C, stride = this->stride.w * C;
        if (is_narrow)
          conv_row<T, 1>(pixels, row, stride, pitch, this->kernel.h, run, w, bias, sums);
        else
          conv_row<T, 2>(pixels, row, stride, pitch, this->kernel.h, run, w, bias, sums);
      }
      for (int v = 0; v < kPanelVectors; ++v) {
        const int lanes = columns.lanes(panel, v);
        if (lanes == 0) continue;
        const int64_t at = first_window + r * this->out.w, column = columns.first(panel, v);
        T* to =
            this->channels_last ? y + at * O + column : scratch.pooled + r * this->out.w * kPanel<T> + v * kLanes<T>;
        const int64_t to_stride = this->channels_last ? O : kPanel<T>;
        const int to_lanes = this->channels_last ? lanes : kLanes<T>;
        uint8_t* tape = this->positions ? this->positions + (member * image + at) * O + column : nullptr;
        const T* sums = scratch.sums + v * kLanes<T>;
        if (this->window.h == 2 && this->window.w == 2)
          tape ? pool<2, true>(sums, to, to_stride, to_lanes, tape, lanes)
               : pool<2, false>(sums, to, to_stride, to_lanes, tape, lanes);
        else
          tape ? pool<0, true>(sums, to, to_stride, to_lanes, tape, lanes)
               : pool<0, false>(sums, to, to_stride, to_lanes, tape, lanes);
      }
    }
    if (this->channels_last) return;
    const int64_t column = columns.first(panel, 0), count = std::min<int64_t>(kPanel<T>, O - column);
    to_planes<T>({scratch.pooled, windows * this->out.w, kPanel<T>, 0}, windows * this->out.w, count,
                 y + column * image + first_window, image);
  }

  // A row of windows in one vector of channels.
  template <int kSide, bool kTape>
  void pool(const T* sums, T* to, int64_t to_stride, int to_lanes, uint8_t* tape, int lanes) const {
    const int64_t pitch = this->out.w * this->window.w * kPanel<T>, apart = this->window.w * kPanel<T>;
    for (int64_t i = 0; i < this->out.w; ++i) {
      typename Simd<T>::IntVec position;
      const Vec<T> value = pooled<T, kSide, kTape>(sums + i * apart, pitch, this->window, position);
      store(to + i * to_stride, value, to_lanes);
      if constexpr (kTape) Positions<T>::store(tape + i * this->O, position, lanes);
    }
  }
};

// What is not zero of a band's gradient in one channel: where in the band each pixel's taps begin, and its gradient.
template <typename T>
struct Open {
  const int64_t* offsets;  // in bytes: of anything else, GCC computes each neighbour's address anew
  const T* gradients;
  int64_t count;

  const T* in(const T* band, int64_t i) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(band) + offsets[i]);
  }
};

// How many neighbouring vectors of a weight are worked on at once.
constexpr int kMostNeighbours = FASTSEQ_VECTOR_BYTES == 64 ? 12 : 6;

// dw[kCount vectors] += the gradient of each open pixel, times x there.
template <typename T, int kCount>
FASTSEQ_INLINE void add_pixels(const Open<T>& open, const T* x, T* dw) {
  Vec<T> sums[kCount];
  for (int j = 0; j < kCount; ++j) sums[j] = load(dw + j * kLanes<T>);
  for (int64_t i = 0; i < open.count; ++i) {
    const T* from = open.in(x, i);
    const T gradient = open.gradients[i];
    for (int j = 0; j < kCount; ++j) sums[j] += load(from + j * kLanes<T>) * gradient;
  }
  for (int j = 0; j < kCount; ++j) store(dw + j * kLanes<T>, sums[j]);
}

// dx += w[kCount vectors] times the gradient, at each open pixel.
template <typename T, int kCount>
FASTSEQ_INLINE void add_to_pixels(const Open<T>& open, const T* w, T* dx) {
  Vec<T> weights[kCount];
  for (int j = 0; j < kCount; ++j) weights[j] = load(w + j * kLanes<T>);
  for (int64_t i = 0; i < open.count; ++i) {
    T* to = const_cast<T*>(open.in(dx, i));
    const T gradient = open.gradients[i];
    for (int j = 0; j < kCount; ++j) store(to + j * kLanes<T>, load(to + j * kLanes<T>) + weights[j] * gradient);
  }
}

// Calls body(integral_constant<int, count>) for a count of up to kMost.
template <int kMost, typename Body>
FASTSEQ_INLINE void with_count(int64_t count, const Body& body) {
  if (count == kMost)
    body(std::integral_constant<int, kMost>());
  else if constexpr (kMost > 1)
    with_count<kMost - 1>(count, body);
}

template <typename T>
struct ConvPoolBackwardPass : ConvPoolPass<T, ConvPoolBackward<T>> {
  // Tasks are blocks of members. They depend on the shape alone, since weights' gradients are made of the blocks' sums.
  // They are no more than keep threads busy, or have these many elements of sums, to spare the cache.
  static constexpr int64_t kMostBlocks = 32, kEnoughBlocks = 4, kBlockElements = 256 * 1024;
  static constexpr int n = kLanes<T>;
  int64_t blocks, pixel, padded_O;  // pixel: C in whole vectors
  bool is_dense;                    // see add_dense
  int64_t of_weight, of_bias, of_thread;
  T *by_tap, *sums, *of_threads;  // weight as [O][taps][pixel]; [blocks][of_weight + of_bias]; scratch
  int64_t of_position[256];       // where a position is from the window on, in bytes of vectors; anywhere where shut
  mutable std::atomic<int64_t> next{0};

  explicit ConvPoolBackwardPass(const ConvPoolBackward<T>& call) : ConvPoolPass<T, ConvPoolBackward<T>>(call, 1) {
    pixel = in_vectors(this->C), padded_O = in_vectors(this->O);
    // Products by two a cycle for n channels at once, or for one channel only where there is a gradient, which has to
    // be looked up.
    is_dense = this->C * this->taps * this->window.h * this->window.w < n * (this->taps * pixel / n + 4);
    of_weight = is_dense ? this->C * this->taps * padded_O : this->O * this->taps * pixel;
    of_weight = Arena<T>::padded(of_weight);
    of_bias = Arena<T>::padded(padded_O);
    blocks = std::min(this->B, std::max(kEnoughBlocks, std::min(kMostBlocks, kBlockElements / of_weight)));
    for (int64_t j = 0; j < 256; ++j)
      of_position[j] = offset_of(j / this->window.w, j % this->window.w) * pixel_bytes();
  }

  int64_t pixel_bytes() const { return pixel * int64_t(sizeof(T)); }
  // Where in a band the taps of an output pixel begin.
  int64_t offset_of(int64_t row, int64_t column) const {
    return row * this->stride.h * this->width + column * this->stride.w;
  }

  static int64_t in_vectors(int64_t count) { return (count + n - 1) / n * n; }

  int team_size(const Threads& threads) const {
    return ConvPoolPass<T, ConvPoolBackward<T>>::team_size(threads, blocks);
  }

  struct Scratch {
    T *x, *dx, *gradients;
    int64_t *offsets, *window_offsets;
  };
  int64_t lay_out_thread(T* start, Scratch& scratch) const {
    Pieces<T> pieces{start};
    const int64_t band = this->most_rows * this->width, windows = this->band_windows * this->out.w;
    const auto take_indices = [&](int64_t count) {
      return reinterpret_cast<int64_t*>(pieces.take(count * int64_t(sizeof(int64_t) / sizeof(T))));
    };
    scratch.x = pieces.take(band * (is_dense ? this->C : pixel));
    scratch.dx = pieces.take(this->dx ? band * pixel : 0);
    scratch.gradients = pieces.take(is_dense ? windows * n + n : windows + n);
    scratch.offsets = take_indices(windows + 1);
    scratch.window_offsets = take_indices(windows);
    return pieces.count;
  }

  int64_t lay_out(T* start, int threads) {
    Pieces<T> pieces{start};
    by_tap = pieces.take(this->dx ? this->O * this->taps * pixel : 0);
    sums = pieces.take(blocks * (of_weight + of_bias));
    Scratch scratch;
    of_thread = lay_out_thread(nullptr, scratch);
    of_threads = pieces.take(threads * of_thread);
    return pieces.count;
  }

  void run(int rank, Team& team) const {
    if (this->dx) {
      for (int64_t o = share(this->O, rank, team.size()); o < share(this->O, rank + 1, team.size()); ++o) {
        T* to = by_tap + o * this->taps * pixel;
        const T* from = this->weight + o * this->C * this->taps;
        for (int64_t tap = 0; tap < this->taps; ++tap)
          for (int64_t c = 0; c < pixel; ++c) to[tap * pixel + c] = c < this->C ? from[c * this->taps + tap] : T(0);
      }
      team.barrier(rank, 0, team.size());
    }
    Scratch scratch;
    lay_out_thread(of_threads + rank * of_thread, scratch);
    for (int64_t r = 0; r < this->band_windows; ++r)
      for (int64_t i = 0; i < this->out.w; ++i)
        scratch.window_offsets[r * this->out.w + i] = offset_of(r * this->window.h, i * this->window.w) * pixel_bytes();
    for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      T* of_block = sums + block * (of_weight + of_bias);
      std::fill(of_block, of_block + of_weight + of_bias, T(0));
      for (int64_t member = share(this->B, block, blocks); member < share(this->B, block + 1, blocks); ++member)
        go_back(member, of_block, scratch);
    }
    team.barrier(rank, 0, team.size());
    add_up(rank, team.size());
  }

  void go_back(int64_t member, T* of_block, const Scratch& scratch) const {
    const int64_t pitch = this->width * pixel, end = this->most_rows * pitch;
    if (this->dx) std::fill(scratch.dx, scratch.dx + end, T(0));
    for (int64_t band = 0; band < this->bands; ++band) {
      T *dw = of_block, *dbias = of_block + of_weight;
      if (this->dweight) this->load_band(member, band, is_dense ? this->C : pixel, scratch.x);
      if (is_dense && (this->dweight || this->dbias)) {
        add_dense(member, band, dw, dbias, scratch);
      } else if (this->dweight || this->dbias) {
        each_channel(member, band, scratch, [&](int64_t o, const Open<T>& open) {
          Vec<T> total{};
          for (int64_t i = 0; i < open.count; i += n) total += load(open.gradients + i);
          dbias[o] += sum<T>(total);
          if (this->dweight)
            each_run([&](int64_t first, int64_t at, auto count) {
              add_pixels<T, decltype(count)::value>(open, scratch.x + at, dw + o * this->taps * pixel + first);
            });
        });
      }
      if (!this->dx) continue;
      each_channel(member, band, scratch, [&](int64_t o, const Open<T>& open) {
        each_run([&](int64_t first, int64_t at, auto count) {
          add_to_pixels<T, decltype(count)::value>(open, by_tap + o * this->taps * pixel + first, scratch.dx + at);
        });
      });
      store_dx(member, band, scratch.dx);
      // What the next band adds to comes first in it.
      const int64_t done = std::min(end, this->step * pitch);
      memmove(scratch.dx, scratch.dx + done, (end - done) * sizeof(T));
      std::fill(scratch.dx + end - done, scratch.dx + end, T(0));
    }
  }

  // Calls body(first element of the weight, where that is from the pixel on, count of vectors) for all of a weight's
  // neighbouring vectors.
  template <typename Body>
  FASTSEQ_INLINE void each_run(const Body& body) const {
    const int64_t vectors = this->kernel.w * pixel / n, parts = (vectors + kMostNeighbours - 1) / kMostNeighbours;
    for (int64_t row = 0; row < this->kernel.h; ++row)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = share(vectors, part, parts) * n, to = share(vectors, part + 1, parts) * n;
        with_count<kMostNeighbours>((to - from) / n, [&](auto count) __attribute__((always_inline)) {
          body(row * this->kernel.w * pixel + from, row * this->width * pixel + from, count);
        });
      }
  }

  // Calls body(o, open) for each channel's pixels that have a gradient.
  template <typename Body>
  void each_channel(int64_t member, int64_t band, const Scratch& scratch, const Body& body) const {
    const int64_t windows = this->windows_of(band) * this->out.w;
    const int64_t image = this->out.h * this->out.w, first = band * this->band_windows * this->out.w;
    const uint8_t* positions = this->positions + (member * image + first) * this->O;
    const T* dy = this->dy + member * image * this->O + first * (this->dy_channels_last ? this->O : 1);
    const int64_t next_window = this->dy_channels_last ? this->O : 1, next_channel = this->dy_channels_last ? 1 : image;
    const int64_t pixels = this->window.h * this->window.w;
    for (int64_t o = 0; o < this->O; ++o) {
      int64_t count = 0;
      for (int64_t i = 0; i < windows; ++i) {
        const uint8_t position = positions[i * this->O + o];
        scratch.offsets[count] = scratch.window_offsets[i] + of_position[position];
        scratch.gradients[count] = dy[i * next_window + o * next_channel];
        count += position < pixels;  // others are shut
      }
      store(scratch.gradients + count, Vec<T>{});
      body(o, Open<T>{scratch.offsets, scratch.gradients, count});
    }
  }

  // The gradients of weights for n output channels at once, where that is faster than channel by channel: of few
  // products. dw is [taps * C][padded_O].
  void add_dense(int64_t member, int64_t band, T* dw, T* dbias, const Scratch& scratch) const {
    const int64_t rows = this->windows_of(band), windows = rows * this->out.w, K = this->taps * this->C;
    const int64_t image = this->out.h * this->out.w, first = band * this->band_windows * this->out.w;
    const uint8_t* positions = this->positions + (member * image + first) * this->O;
    for (int64_t o = 0; o < this->O; o += n) {
      const int lanes = int(std::min<int64_t>(n, this->O - o));
      T* gradients = scratch.gradients;
      if (this->dy_channels_last) {
        const T* dy = this->dy + (member * image + first) * this->O + o;
        for (int64_t i = 0; i < windows; ++i) store(gradients + i * n, load(dy + i * this->O, lanes));
      } else {
        if (lanes < n) std::fill(gradients, gradients + windows * n, T(0));
        const T* dy = this->dy + (member * this->O + o) * image + first;
        to_pixels<T>(dy, image, windows, lanes, {gradients, windows, n, 0});
      }
      Vec<T> total{};
      for (int64_t i = 0; i < windows; ++i) {
        const auto position = Positions<T>::load(positions + i * this->O + o, lanes);
        total += position == kShut ? Vec<T>{} : load(gradients + i * n);
      }
      store(dbias + o, load(dbias + o) + total);
      if (!this->dweight) continue;
      const int64_t parts = (K + kMostNeighbours - 1) / kMostNeighbours;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = share(K, part, parts), to = share(K, part + 1, parts);
        with_count<kMostNeighbours>(to - from, [&](auto count) __attribute__((always_inline)) {
          constexpr int kCount = decltype(count)::value;
          int64_t offsets[kCount];
          for (int t = 0; t < kCount; ++t) {
            const int64_t run = this->kernel.w * this->C, k = from + t;
            offsets[t] = k / run * this->width * this->C + k % run;
          }
          T* out = dw + from * padded_O + o;
          if (this->window.h == 2 && this->window.w == 2)
            add_taps<kCount, 4>(rows, positions + o, lanes, gradients, scratch.x, offsets, out);
          else
            add_taps<kCount, 1>(rows, positions + o, lanes, gradients, scratch.x, offsets, out);
        });
      }
    }
  }

  // dw[kCount rows] += the products of all pixels' gradients with x, kPixels of a window at once.
  template <int kCount, int kPixels>
  void add_taps(int64_t rows, const uint8_t* positions, int lanes, const T* gradients, const T* x,
                const int64_t (&offsets)[kCount], T* dw) const {
    const int64_t C = this->C, count = this->window.h * this->window.w;
    int64_t of_pixel[256];
    for (int64_t j = 0; j < count; ++j) of_pixel[j] = offset_of(j / this->window.w, j % this->window.w) * C;
    Vec<T> sums[kCount] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = x + r * this->window.h * this->stride.h * this->width * C;
      for (int64_t i = 0; i < this->out.w; ++i, row += this->window.w * this->stride.w * C) {
        const auto position = Positions<T>::load(positions, lanes);
        const Vec<T> gradient = load(gradients);
        positions += this->O, gradients += n;
        for (int64_t j = 0; j < count; j += kPixels) {
          Vec<T> given[kPixels];
          const T* at[kPixels];
          for (int p = 0; p < kPixels; ++p) {
            given[p] = position == typename Simd<T>::Int(j + p) ? gradient : Vec<T>{};
            at[p] = row + of_pixel[j + p];
          }
          for (int t = 0; t < kCount; ++t)
            for (int p = 0; p < kPixels; ++p) sums[t] += given[p] * at[p][offsets[t]];
        }
      }
    }
    for (int t = 0; t < kCount; ++t) store(dw + t * padded_O, load(dw + t * padded_O) + sums[t]);
  }

  // The rows of dx to which no later band adds.
  void store_dx(int64_t member, int64_t band, const T* rows) const {
    const int64_t top = this->top_of(band), first = std::max<int64_t>(0, top), W = this->in.w, C = this->C;
    const int64_t last = band + 1 < this->bands ? std::min(this->in.h, top + this->step) : this->in.h;
    if (first >= last) return;
    T* dx = this->dx + member * C * this->in.h * W;
    Pixels<const T> pixels{rows + ((first - top) * this->width + this->padding.w) * pixel, W, pixel,
                           this->width * pixel};
    if (!this->channels_last) return to_planes<T>(pixels, (last - first) * W, C, dx + first * W, this->in.h * W);
    for (int64_t i = first * W; i < last * W; ++i) memcpy(dx + i * C, pixels.next(), C * sizeof(T));
  }

  // The blocks' sums in order, as [O][C][taps].
  void add_up(int rank, int members) const {
    const auto total = [&](int64_t at) {
      Vec<T> sum{};
      for (int64_t block = 0; block < blocks; ++block) sum += load(sums + block * (of_weight + of_bias) + at);
      return sum;
    };
    if (this->dbias && rank == 0)
      for (int64_t o = 0; o < this->O; o += n)
        store(this->dbias + o, total(of_weight + o), int(std::min<int64_t>(n, this->O - o)));
    if (!this->dweight) return;
    // Lanes are output channels, or input channels.
    const int64_t vectors = (is_dense ? padded_O * this->C : pixel * this->O) * this->taps / n;
    for (int64_t i = share(vectors, rank, members); i < share(vectors, rank + 1, members); ++i) {
      T lanes[n];
      store(lanes, total(i * n));
      const int64_t in_row = (is_dense ? padded_O : pixel) / n, first = i % in_row * n, row = i / in_row;
      const int64_t outer = is_dense ? this->C : this->taps, of_outer = row / outer, of_inner = row % outer;
      for (int64_t j = first; j < std::min(first + n, is_dense ? this->O : this->C); ++j) {
        const int64_t o = is_dense ? j : of_outer, c = is_dense ? of_inner : j, tap = is_dense ? of_outer : of_inner;
        this->dweight[(o * this->C + c) * this->taps + tap] = lanes[j - first];
      }
    }
  }
};

template <typename T>
void conv_pool_forward(const ConvPoolForward<T>& call, Threads threads) {
  ConvPoolForwardPass<T> pass(call, threads);
  run_pass<decltype(pass), T>(pass, threads);
}

template <typename T>
void conv_pool_backward(const ConvPoolBackward<T>& call, Threads threads) {
  ConvPoolBackwardPass<T> pass(call);
  run_pass<decltype(pass), T>(pass, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
