// A GPU for tests: one thread of the CPU that runs every thread of all blocks of a launch as a fibre.
//
// A fibre runs until it waits: for its block, for its warp, or for a word that another block stores. Which warp runs
// next, for how long, and the order of its lanes are random, and stores that other blocks read become visible late and
// in any order, as a GPU may have it. So a kernel that forgets to wait fails here, though not at each seed: every
// launch starts from that in FASTSEQ_EMULATOR_SEED.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastseq::gpu::emulator {

// glibc's own check of _longjmp (_FORTIFY_SOURCE) takes another fibre's stack for a frame that has returned.
extern "C" [[noreturn]] void jump(jmp_buf, int) __asm__("_longjmp");

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr int kGuardedStacks = 8192;  // each guard page takes two of the 65,530 mappings of a process
constexpr size_t kLateStores = 32;
constexpr uint64_t kIdleRound = 10'000'000;  // ns
constexpr int kIdleRounds = 6000;            // a minute

struct Fibre;

// What a fibre waits for. `carry_out` is what a warp does together once all its lanes are there.
struct Wait {
  const char* name;
  void (*carry_out)(Fibre* lanes) = nullptr;
};
inline constexpr Wait kPoll{"polls in load_relaxed"}, kSyncBlock{"waits in sync_block"}, kReturned{"has returned"};

struct Fibre {
  int block = 0, thread = 0;
  const Wait* waits = nullptr;
  bool started = false;  // whether `context` is somewhere on its stack
  uint32_t word[6];      // what it brings to its warp, and takes from there in the first
  int delta;
  float* sums;
  jmp_buf context;
};

// Memory of its own, some of which nobody may touch.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t bytes) : bytes_(bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<unsigned char*>(data);
    madvise(data_, bytes, MADV_NOHUGEPAGE);  // a huge page for each stack would be all memory
  }
  Pages(Pages&& other) noexcept { *this = std::move(other); }
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Pages() {
    if (data_) munmap(data_, bytes_);
  }

  unsigned char* at(size_t offset) const { return data_ + offset; }
  void guard(size_t offset) const {
    if (mprotect(at(offset), page(), PROT_NONE) != 0) throw std::bad_alloc();
  }

  static size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

 private:
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

class Machine {
 public:
  // Runs `kernel` in all threads of all blocks. Throws where they can never get on, and can be used again then.
  void launch(int blocks, int threads, int shared, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    const char* seed = std::getenv("FASTSEQ_EMULATOR_SEED");
    random_.seed(seed ? unsigned(std::strtoul(seed, nullptr, 10)) : 1u);
    kernel_ = std::move(kernel);
    give_shared_memory(blocks, size_t(shared));
    give_fibres(blocks, threads);
    warps_per_block_ = threads / kLanes;
    warps_waiting_.assign(blocks, 0);
    warps_returned_.assign(blocks, 0);
    unfinished_ = blocks * warps_per_block_;
    ready_.clear();
    for (int warp = 0; warp < unfinished_; ++warp) ready_.push_back(warp);
    parked_.clear();
    late_.clear();
    idle_rounds_ = 0;
    try {
      while (unfinished_ > 0) {
        if (ready_.empty()) idle();
        const size_t next = random_() % ready_.size();
        std::swap(ready_[next], ready_.back());
        const int warp = ready_.back();
        ready_.pop_back();
        turn(warp);
        if (!late_.empty() && random_() % 2 == 0) publish_one();
        if (stored_) wake_pollers();
      }
    } catch (...) {
      for (Fibre& fibre : fibres_) fibre.started &= fibre.waits == &kReturned;
      throw;
    }
    publish([](const Store&) { return true; });
  }

  // The rest is for fibres.

  const Fibre& current() const { return *current_; }
  unsigned char* shared_memory() const { return shared_.at(current_->block * shared_stride_ + shared_offset_); }

  // Time passes only while all threads poll and nothing is stored: it does not depend on this machine's pace.
  uint64_t nanoseconds() const { return clock_; }

  [[gnu::noinline]] void wait(const Wait& what) {
    current_->waits = &what;
    if (_setjmp(current_->context) == 0) jump(scheduler_, 1);
  }

  // Waits until all lanes bring these words for the same purpose; the word that this lane takes from there.
  uint32_t together(const Wait& purpose, std::initializer_list<uint32_t> words = {}, int delta = 0,
                    float* sums = nullptr) {
    std::copy(words.begin(), words.end(), current_->word);
    current_->delta = delta;
    current_->sums = sums;
    wait(purpose);
    return current_->word[0];
  }

  // Lets others run, or not, before `count` words at p are read; a thread sees what itself has stored.
  void before_load(const uint32_t* p, int count) {
    if (random_() % 2 == 0) wait(kPoll);
    publish([&](const Store& s) { return s.by == current_ && s.to >= p && s.to < p + count; });
  }

  void store(uint32_t* p, uint32_t word) {
    publish([p](const Store& s) { return s.to == p; });
    if (random_() % 4 != 0) return write({p, word, current_});
    late_.push_back({p, word, current_});
    if (late_.size() > kLateStores) publish_one();
  }

  // What the threads of a block have stored is there for all of them after they have met.
  void publish_block(int block) {
    publish([block](const Store& s) { return s.by->block == block; });
  }

 private:
  struct Store {
    uint32_t* to;
    uint32_t word;
    const Fibre* by;
  };

  void write(const Store& store) {
    *store.to = store.word;
    stored_ = true;
    idle_rounds_ = 0;
  }
  template <typename Which>
  void publish(Which which) {
    std::erase_if(late_, [&](const Store& store) {
      const bool now = which(store);
      if (now) write(store);
      return now;
    });
  }
  void publish_one() {
    const uint32_t* one = late_[random_() % late_.size()].to;
    publish([one](const Store& s) { return s.to == one; });
  }

  void give_shared_memory(int blocks, size_t bytes) {
    const size_t page = Pages::page(), aligned = (bytes + 15) / 16 * 16, room = (aligned + page - 1) / page * page;
    shared_stride_ = room + page;
    shared_offset_ = room - aligned;
    shared_ = Pages(blocks * shared_stride_);
    for (int block = 0; block < blocks; ++block) {
      std::fill_n(reinterpret_cast<uint32_t*>(shared_.at(block * shared_stride_)), room / 4, 0x7fbadbadu);
      shared_.guard(block * shared_stride_ + room);
    }
  }

  void give_fibres(int blocks, int threads) {
    const size_t count = size_t(blocks) * threads;
    if (count > fibres_.size()) {
      fibres_.clear();
      stacks_ = Pages();
      stacks_ = Pages(count * stack_stride());
      for (size_t i = 0; i < std::min<size_t>(count, kGuardedStacks); ++i) stacks_.guard(i * stack_stride());
      fibres_.resize(count);
    }
    for (size_t i = 0; i < fibres_.size(); ++i) {
      fibres_[i].block = int(i / threads);
      fibres_[i].thread = int(i % threads);
      fibres_[i].waits = i < count ? nullptr : &kReturned;
    }
  }

  static size_t stack_stride() { return Pages::page() + kStackBytes; }

  static void live();

  // Starts the current fibre at the top of its stack.
  [[noreturn]] void start() {
    const size_t index = size_t(current_ - fibres_.data());
    const size_t stagger = index % kLanes * 128;  // or the stacks of a warp would meet in the same sets of the cache
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_.at(index * stack_stride() + Pages::page());
    context.uc_stack.ss_size = kStackBytes - stagger;
    context.uc_link = nullptr;
    makecontext(&context, live, 0);
    current_->started = true;
    setcontext(&context);
    std::abort();
  }

  [[gnu::noinline]] void resume(Fibre& fibre) {
    current_ = &fibre;
    fibre.waits = nullptr;
    if (_setjmp(scheduler_) != 0) return;
    if (fibre.started) jump(fibre.context, 1);
    start();
  }

  Fibre* lanes_of(int warp) { return &fibres_[size_t(warp) * kLanes]; }

  // Runs a warp until it waits for others, or for a random number of rendezvous.
  void turn(int warp) {
    Fibre* lanes = lanes_of(warp);
    for (int passes = 1 << random_() % 6; passes > 0; --passes) {
      bool polls = false;
      const unsigned first = random_(), step = random_() | 1;
      for (unsigned i = 0; i < kLanes; ++i) {
        Fibre& lane = lanes[(first + i * step) % kLanes];
        if (lane.waits != nullptr && lane.waits != &kPoll) continue;
        resume(lane);
        polls |= lane.waits == &kPoll;
      }
      if (polls) return parked_.push_back(warp);
      for (int i = 1; i < kLanes; ++i)
        if (lanes[i].waits != lanes[0].waits) throw mismatch(lanes[0], lanes[i]);
      const Wait& wait = *lanes[0].waits;
      if (wait.carry_out == nullptr) return arrive(lanes[0].block, wait);
      wait.carry_out(lanes);
      for (int i = 0; i < kLanes; ++i) lanes[i].waits = nullptr;
    }
    ready_.push_back(warp);
  }

  // All of a warp has come to sync_block or to the end.
  void arrive(int block, const Wait& wait) {
    int &waiting = warps_waiting_[block], &returned = warps_returned_[block];
    ++(&wait == &kReturned ? returned : waiting);
    unfinished_ -= &wait == &kReturned;
    Fibre* threads = lanes_of(block * warps_per_block_);
    const int count = warps_per_block_ * kLanes;
    if (waiting > 0 && returned > 0) {
      const auto first = [&](const Wait* what) {
        return *std::find_if(threads, threads + count, [what](const Fibre& f) { return f.waits == what; });
      };
      throw mismatch(first(&kSyncBlock), first(&kReturned));
    }
    if (waiting < warps_per_block_) return;
    waiting = 0;
    publish_block(block);
    for (int i = 0; i < count; ++i) threads[i].waits = nullptr;
    for (int i = 0; i < warps_per_block_; ++i) ready_.push_back(block * warps_per_block_ + i);
  }

  // No warp can do anything but poll.
  void idle() {
    if (!late_.empty()) {
      publish_one();
    } else {
      clock_ += kIdleRound;
      if (++idle_rounds_ > kIdleRounds) {
        const Fibre* lanes = lanes_of(parked_.front());
        const Fibre& polls = *std::find_if(lanes, lanes + kLanes, [](const Fibre& f) { return f.waits == &kPoll; });
        throw std::runtime_error(told(polls) + ", and nothing has been stored for a minute");
      }
    }
    wake_pollers();
  }

  void wake_pollers() {
    stored_ = false;
    ready_.insert(ready_.end(), parked_.begin(), parked_.end());
    parked_.clear();
  }

  static std::string told(const Fibre& fibre) {
    return "block " + std::to_string(fibre.block) + ", thread " + std::to_string(fibre.thread) + " " +
           fibre.waits->name;
  }
  static std::runtime_error mismatch(const Fibre& a, const Fibre& b) {
    return std::runtime_error(told(a) + ", where thread " + std::to_string(b.thread) + " " + b.waits->name);
  }

  std::mutex mutex_;
  std::mt19937 random_;
  std::function<void()> kernel_;
  Pages shared_, stacks_;
  size_t shared_stride_ = 0, shared_offset_ = 0;
  std::vector<Fibre> fibres_;
  Fibre* current_ = nullptr;
  jmp_buf scheduler_;
  int warps_per_block_ = 0, unfinished_ = 0;
  std::vector<int> warps_waiting_, warps_returned_;  // of each block
  std::vector<int> ready_, parked_;                  // warps; `parked_` wait for any store
  std::vector<Store> late_;
  bool stored_ = false;
  int idle_rounds_ = 0;
  uint64_t clock_ = 0;
};

inline Machine machine;

// A fibre lives on for the next launch.
inline void Machine::live() {
  for (;;) {
    machine.kernel_();
    machine.wait(kReturned);
  }
}

}  // namespace fastseq::gpu::emulator
