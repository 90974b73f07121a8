// Threads that work on one call together, and wait for each other between steps.
#pragma once
#include <sched.h>

#include <atomic>
#include <chrono>

#if !defined(FASTSEQ_ISA)
#error "include the kernels through one of the sources in cpu/isa/"
#endif

namespace fastseq::FASTSEQ_ISA {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Spins until done() holds. On a shared machine the thread waited for may be preempted: after a while, yield.
template <typename Done>
inline void spin(const Done& done) {
  constexpr int kSpins = 4096;
  for (int i = 0; !done(); ++i) {
    if (i < kSpins)
      pause();
    else
      sched_yield();
  }
}

// A parallel_for hands out its range as it likes: to fewer threads than asked for, all of it to one, or parts of it
// late. So the team is whoever answers the roll call: the first one waits a bounded time for the others, then closes
// the call, and a thread that comes later leaves. Barriers inside the team are safe because every member is running.
class Team {
 public:
  static constexpr int kMost = 64;

  // The caller's rank in the team, or -1 if the roll call is over. `expected`: how many are on their way.
  int join(int expected) {
    int present = present_.load(std::memory_order_relaxed);
    do {
      if (present & kClosed) return -1;
    } while (!present_.compare_exchange_weak(present, present + 1, std::memory_order_acq_rel));
    if (present == 0) {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
      while (present_.load(std::memory_order_relaxed) < expected && std::chrono::steady_clock::now() < deadline)
        pause();
      size_.store(present_.fetch_or(kClosed, std::memory_order_acq_rel), std::memory_order_release);
    } else {
      spin([&] { return size_.load(std::memory_order_acquire) != 0; });
    }
    return present;
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

  // Waits until the members first..first+count-1 have all come here equally often; the caller is one of them.
  void barrier(int rank, int first, int count) {
    if (count == 1) return;
    const int turn = turns_[rank].value.load(std::memory_order_relaxed) + 1;
    turns_[rank].value.store(turn, std::memory_order_release);
    for (int other = first; other < first + count; ++other)
      spin([&] { return turns_[other].value.load(std::memory_order_acquire) - turn >= 0; });
  }

 private:
  static constexpr int kClosed = 1 << 30;
  struct alignas(64) Turn {
    std::atomic<int> value{0};
  };

  alignas(64) std::atomic<int> present_{0};
  alignas(64) std::atomic<int> size_{0};
  Turn turns_[kMost];
};

}  // namespace fastseq::FASTSEQ_ISA
