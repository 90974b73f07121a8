// What the kernels rely on of cuda/device.h and cuda/launch.h, tried by small kernels. test_emulator.py runs each case
// in the emulator; nvcc makes the same of it for a GPU, but for the cases that only the emulator has an answer to:
//   nvcc -std=c++20 -arch=native -I csrc tests/device_cases.cu -o device_cases
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace fastseq::gpu {

constexpr uint32_t kMissing = 0xffffffffu;

// Memory that host and kernels see.
template <typename T>
class Buffer {
 public:
  Buffer(size_t count, T value) : count_(count) {
#ifdef __CUDACC__
    check(cudaMallocManaged(&data_, count * sizeof(T)), "memory");
#else
    data_ = static_cast<T*>(std::aligned_alloc(16, (count * sizeof(T) + 15) / 16 * 16));
#endif
    std::fill_n(data_, count, value);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }
  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
  size_t count_;
};

template <typename Arguments>
void run(void (*kernel)(Arguments), int blocks, int threads, int shared, Arguments arguments) {
  launch_together(kernel, blocks, threads, shared, 0, nullptr, arguments);
#ifdef __CUDACC__
  check(cudaDeviceSynchronize(), "running a kernel");
#endif
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("wrong: " + what);
}

// One product a warp. Where the elements of a fragment are is written as PTX's manual has it, one by one.
template <typename T>
struct Product {
  static constexpr int kPerWord = 4 / sizeof(T), K = 8 * kPerWord;
  float *a, *b,
      *sums;  // [warps, 16, K], [warps, K, 8] and [warps, 16, 8]; a and b are replaced by what T keeps of them
};

template <typename T>
FASTSEQ_KERNEL(64)
product(Product<T> p) {
  constexpr int K = Product<T>::K, kPerWord = Product<T>::kPerWord;
  const int lane = thread() % 32, warp = block() * 2 + thread() / 32, group = lane >> 2, in_group = lane % 4;
  float *a = p.a + warp * 16 * K, *b = p.b + warp * K * 8, *c = p.sums + warp * 16 * 8;
  T a_elements[4 * kPerWord], b_elements[2 * kPerWord];
  for (int i = 0; i < 4 * kPerWord; ++i) {
    const bool upper = kPerWord == 2 ? i < 2 || (4 <= i && i < 6) : i == 0 || i == 2;
    const int row = upper ? group : group + 8;
    const int column = kPerWord == 2 ? in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0) : in_group + (i >= 2 ? 4 : 0);
    from_float(a[row * K + column], a_elements[i]);
    a[row * K + column] = to_float(a_elements[i]);
  }
  for (int i = 0; i < 2 * kPerWord; ++i) {
    const int row = kPerWord == 2 ? in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0) : in_group + (i >= 1 ? 4 : 0);
    from_float(b[row * 8 + group], b_elements[i]);
    b[row * 8 + group] = to_float(b_elements[i]);
  }
  uint32_t a_words[4], b_words[2];
  memcpy(a_words, a_elements, sizeof a_words);
  memcpy(b_words, b_elements, sizeof b_words);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  multiply(T{}, sums, a_words[0], a_words[1], a_words[2], a_words[3], b_words[0], b_words[1]);
  for (int i = 0; i < 4; ++i) c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = sums[i];
}

template <typename T>
void multiply_case() {
  constexpr int K = Product<T>::K, kBlocks = 3, kWarps = 2 * kBlocks;
  std::mt19937 random;
  std::uniform_real_distribution<float> uniform(-1, 1);
  Buffer<float> a(kWarps * 16 * K, 0), b(kWarps * K * 8, 0), sums(kWarps * 16 * 8, 0);
  for (Buffer<float>* buffer : {&a, &b, &sums})
    for (size_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = uniform(random);
  const std::vector<float> before(sums.data(), sums.data() + sums.size());
  run(product<T>, kBlocks, 64, 0, Product<T>{a.data(), b.data(), sums.data()});
  const auto kept = [](float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if (sizeof(T) == 4) word &= ~0x1fffu;
    memcpy(&x, &word, 4);
    return double(x);
  };
  for (int warp = 0; warp < kWarps; ++warp)
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        const int at = (warp * 16 + row) * 8 + column;
        double sum = before[at];
        for (int k = 0; k < K; ++k) sum += kept(a[(warp * 16 + row) * K + k]) * kept(b[(warp * K + k) * 8 + column]);
        expect(std::abs(sums[at] - sum) < 1e-5, "a sum of warp " + std::to_string(warp));
      }
}

// Words from standard input as float32: to bfloat16, float16 and TF32, and the lower halves of words to float32.
struct Conversion {
  const uint32_t* words;
  int64_t count;
  uint16_t *to_bfloat16, *to_float16;
  uint32_t* to_tf32;
  float *from_bfloat16, *from_float16;
};

FASTSEQ_KERNEL(256)
convert(Conversion c) {
  for (int64_t i = thread(); i < c.count; i += 256) {
    bfloat16 b;
    float16 h;
    from_float(float_of(c.words[i]), b);
    from_float(float_of(c.words[i]), h);
    memcpy(c.to_bfloat16 + i, &b, 2);
    memcpy(c.to_float16 + i, &h, 2);
    c.to_tf32[i] = to_tf32(c.words[i]);
    memcpy(&b, c.words + i, 2);
    memcpy(&h, c.words + i, 2);
    c.from_bfloat16[i] = to_float(b);
    c.from_float16[i] = to_float(h);
  }
}

void convert_case() {
  std::vector<uint32_t> read;
  for (uint32_t word; std::fread(&word, 4, 1, stdin) == 1;) read.push_back(word);
  const size_t n = read.size();
  Buffer<uint32_t> words(n, 0), to_tf32(n, 0);
  Buffer<uint16_t> to_bfloat16(n, 0), to_float16(n, 0);
  Buffer<float> from_bfloat16(n, 0), from_float16(n, 0);
  std::copy(read.begin(), read.end(), words.data());
  run(convert, 1, 256, 0,
      Conversion{words.data(), int64_t(n), to_bfloat16.data(), to_float16.data(), to_tf32.data(), from_bfloat16.data(),
                 from_float16.data()});
  std::fwrite(to_bfloat16.data(), 2, n, stdout);
  std::fwrite(to_float16.data(), 2, n, stdout);
  std::fwrite(to_tf32.data(), 4, n, stdout);
  std::fwrite(from_bfloat16.data(), 4, n, stdout);
  std::fwrite(from_float16.data(), 4, n, stdout);
}

// Sums over a block, again and again in the same place of shared memory.
struct Reduction {
  uint32_t* sums;  // [rounds, blocks]
  int blocks, rounds;
  bool forgets;  // to wait before it writes again
};

FASTSEQ_KERNEL(256)
reduce(Reduction r) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (int round = 0; round < r.rounds; ++round) {
    shared[thread()] = thread() * (block() + 1) + round;
    for (int half = 128; half > 0; half /= 2) {
      sync_block();
      if (thread() < half) shared[thread()] += shared[thread() + half];
    }
    if (thread() == 0) r.sums[round * r.blocks + block()] = shared[0];
    if (!r.forgets) sync_block();
  }
}

bool reduction_is_right(int blocks, bool forgets) {
  constexpr int kRounds = 10;
  Buffer<uint32_t> sums(kRounds * blocks, kMissing);
  run(reduce, blocks, 256, 1024, Reduction{sums.data(), blocks, kRounds, forgets});
  for (int i = 0; i < kRounds * blocks; ++i)
    if (sums[i] != 255u * 128 * (i % blocks + 1) + 256 * (i / blocks)) return false;
  return true;
}

// What each lane gets of those above, and whether any lane has its bit set.
struct Lanes {
  uint32_t *above, *any;  // [32 deltas, threads] and [33 lanes, threads]: no lane is 32
};

FASTSEQ_KERNEL(128)
exchange(Lanes lanes) {
  for (int delta = 0; delta < 32; ++delta)
    lanes.above[delta * 128 + thread()] = from_lane_above(uint32_t(thread() * 3), delta);
  for (int lane = 0; lane < 33; ++lane) lanes.any[lane * 128 + thread()] = any_in_warp(thread() == lane + 32);
}

void lanes_case() {
  Buffer<uint32_t> above(32 * 128, kMissing), any(33 * 128, kMissing);
  run(exchange, 1, 128, 0, Lanes{above.data(), any.data()});
  for (int delta = 0; delta < 32; ++delta)
    for (int i = 0; i < 128; ++i)
      expect(above[delta * 128 + i] == uint32_t(3 * (i % 32 + delta < 32 ? i + delta : i)), "from_lane_above");
  for (int lane = 0; lane < 33; ++lane)
    for (int i = 0; i < 128; ++i) expect(any[lane * 128 + i] == (i / 32 == (lane + 32) / 32), "any_in_warp");
}

// Lanes hand words on through shared memory.
struct Rotation {
  uint32_t* words;  // [threads]
};

FASTSEQ_KERNEL(64)
rotate(Rotation r) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory()) + thread() / 32 * 32;
  uint32_t word = thread();
  for (int round = 0; round < 32; ++round) {
    shared[thread() % 32] = word;
    sync_warp();
    word = shared[(thread() + 1) % 32] + 1;
    sync_warp();
  }
  r.words[thread()] = word;
}

void sync_warp_case() {
  Buffer<uint32_t> words(64, kMissing);
  run(rotate, 1, 64, 256, Rotation{words.data()});
  for (uint32_t i = 0; i < 64; ++i) expect(words[i] == i + 32, "sync_warp");
}

// Each thread takes its word from the block before and gives it to the next one, without a barrier.
struct Ring {
  uint32_t* words;  // [rounds * blocks + 1, threads], kMissing but for the first
  int blocks, rounds;
  uint64_t patience;
  uint32_t* status;
};

FASTSEQ_KERNEL(64)
hand_on(Ring ring) {
  for (int round = 0; round < ring.rounds; ++round) {
    uint32_t* from = ring.words + (round * ring.blocks + block()) * 64;
    const uint64_t start = nanoseconds();
    Quad quad;
    for (;;) {
      quad = load_relaxed(reinterpret_cast<const Quad*>(from) + thread() / 4);
      bool missing = false;
      for (uint32_t word : quad.word) missing |= word == kMissing;
      if (!any_in_warp(missing)) break;
      if (any_in_warp(nanoseconds() - start > ring.patience)) {
        store_to_host(ring.status, 1);
        return;
      }
    }
    store_relaxed(from + 64 + thread(), quad.word[thread() % 4] + 1);
  }
}

void ring(bool starts) {
  constexpr int kBlocks = 20, kRounds = 50;
  Buffer<uint32_t> words((kBlocks * kRounds + 1) * 64, kMissing), status(1, 0);
  for (int i = 0; starts && i < 64; ++i) words[i] = 1000 * i;
  run(hand_on, kBlocks, 64, 0, Ring{words.data(), kBlocks, kRounds, 2'000'000'000, status.data()});
  expect(status[0] == !starts, "status");
  for (int i = 0; starts && i < 64; ++i)
    expect(words[kBlocks * kRounds * 64 + i] == uint32_t(1000 * i + kBlocks * kRounds), "the word that came round");
}

using Cases = std::map<std::string, std::function<void()>>;

#ifndef __CUDACC__

// One block stores two words, one after the other; another waits for the second, looks at the first, and tells so.
struct Order {
  uint32_t* words;     // [rounds, 12]
  uint32_t* overtook;  // [1]
};

FASTSEQ_KERNEL(32)
overtake(Order o) {
  for (int round = 0; round < 100; ++round) {
    uint32_t* words = o.words + round * 12;
    if (block() == 0 && thread() == 0) {
      store_relaxed(words, 1);
      store_relaxed(words + 4, 1);
      while (load_relaxed(reinterpret_cast<const Quad*>(words + 8)).word[0] == kMissing) {
      }
    } else if (block() == 1) {
      while (load_relaxed(reinterpret_cast<const Quad*>(words + 4)).word[0] == kMissing) {
      }
      const bool missing = load_relaxed(reinterpret_cast<const Quad*>(words)).word[0] == kMissing;
      if (thread() != 0) continue;
      *o.overtook += missing;
      store_relaxed(words + 8, 1);
    }
  }
}

struct Stray {
  int kind;
};

FASTSEQ_KERNEL(128)
stray(Stray s) {
  sync_block();
  const bool odd = block() == 1 && thread() == 77;
  float sums[4] = {};
  alignas(16) static const Quad nothing{};
  switch (s.kind) {
    case 0:  // skips a barrier of its block, and waits for its warp
      if (!odd) sync_block();
      sync_warp();
      break;
    case 1:  // returns
      if (odd) return;
      sync_block();
      break;
    case 2:  // all of its warp return
      if (block() == 1 && thread() / 32 == 2) return;
      sync_block();
      break;
    case 3:  // stays away from a product
      if (!odd) multiply(bfloat16{}, sums, 0, 0, 0, 0, 0, 0);
      break;
    case 4:  // does something else
      odd ? from_lane_above(0, 1) : any_in_warp(false);
      break;
    case 5:  // waits for what nobody stores
      while (odd && load_relaxed(&nothing).word[0] == 0) {
      }
      sync_block();
  }
}

// Writes to one float of shared memory, and counts those before that nobody has written and that are no NaN.
struct Touch {
  int at;
  int* numbers;
};

FASTSEQ_KERNEL(32)
touch(Touch t) {
  volatile float* shared = reinterpret_cast<float*>(shared_memory());
  for (int i = thread(); i < 400; i += 32) *t.numbers += shared[i] == shared[i];
  sync_block();
  if (block() == 1 && thread() == 31) shared[t.at] = 1;
}

void touch_case(int blocks, int threads, int shared, int at) {
  Buffer<int> numbers(1, 0);
  run(touch, blocks, threads, shared, Touch{at, numbers.data()});
  expect(numbers[0] == 0, "shared memory is NaN at first");
}

struct Depth {
  int frames;
};

void descend(Depth d) {
  volatile char frame[1024] = {};
  if (d.frames > 0) descend({d.frames - 1});
  frame[0] = frame[1];
}

#endif

const Cases kCases = {
    {"multiply float32", multiply_case<float>},
    {"multiply bfloat16", multiply_case<bfloat16>},
    {"multiply float16", multiply_case<float16>},
    {"convert", convert_case},
    {"reduction", [] { expect(reduction_is_right(8, false), "a sum"); }},
    {"reduction in 132 blocks", [] { expect(reduction_is_right(132, false), "a sum"); }},
    {"lanes", lanes_case},
    {"sync_warp", sync_warp_case},
    {"ring", [] { ring(true); }},
    {"patience", [] { ring(false); }},
#ifndef __CUDACC__
    {"forgotten barrier", [] { expect(!reduction_is_right(8, true), "nobody noticed"); }},
    {"late stores",
     [] {
       Buffer<uint32_t> words(1200, kMissing), overtook(1, 0);
       run(overtake, 2, 32, 0, Order{words.data(), overtook.data()});
       expect(overtook[0] > 0, "stores came in order");
     }},
    {"stray 0", [] { run(stray, 3, 128, 0, Stray{0}); }},
    {"stray 1", [] { run(stray, 3, 128, 0, Stray{1}); }},
    {"stray 2", [] { run(stray, 3, 128, 0, Stray{2}); }},
    {"stray 3", [] { run(stray, 3, 128, 0, Stray{3}); }},
    {"stray 4", [] { run(stray, 3, 128, 0, Stray{4}); }},
    {"stray 5", [] { run(stray, 3, 128, 0, Stray{5}); }},
    {"shared within", [] { touch_case(2, 32, 1600, 399); }},
    {"shared beyond", [] { touch_case(2, 32, 1600, 400); }},
    {"stack within", [] { run(descend, 2, 32, 0, Depth{40}); }},
    {"stack beyond", [] { run(descend, 2, 32, 0, Depth{80}); }},
    {"133 blocks", [] { touch_case(133, 32, 1600, 0); }},
    {"40 threads", [] { touch_case(2, 40, 1600, 0); }},
    {"228 KB", [] { touch_case(2, 32, 228 << 10, 0); }},
#endif
};

}  // namespace fastseq::gpu

// Runs the cases that are named, or all that a GPU has; what one throws is told, and the next one runs.
int main(int count, char** names) {
  int failed = 0;
  for (int i = 1; i < count; ++i) {
    try {
      fastseq::gpu::kCases.at(names[i])();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", names[i], error.what());
      ++failed;
    }
  }
  return failed > 0;
}
