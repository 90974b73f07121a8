// Scratch memory of a call.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if !defined(FASTSEQ_ISA)
#error "include the kernels through one of the sources in cpu/isa/"
#endif

namespace fastseq::FASTSEQ_ISA {

// A thread keeps its scratch from call to call, up to this size: faulting pages in costs more than many a small call.
constexpr int64_t kKeptBytes = int64_t(64) << 20;

class Memory {
 public:
  ~Memory() { std::free(data_); }

  void* at_least(int64_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    // Large pages, where the system grants them on request: packed weights outgrow the TLB before they outgrow the
    // cache.
    constexpr int64_t kPage = int64_t(2) << 20;
    const int64_t alignment = bytes >= kPage ? kPage : 64;
    size_ = (bytes + alignment - 1) / alignment * alignment;
    data_ = std::aligned_alloc(alignment, size_);
    if (!data_) {
      size_ = 0;
      throw std::bad_alloc();
    }
#ifdef MADV_HUGEPAGE
    if (alignment == kPage) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    return data_;
  }

  void give_back_if_large() {
    if (size_ <= kKeptBytes) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// All scratch of one call. One at a time in a thread.
template <typename T>
class Arena {
 public:
  static int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

  explicit Arena(int64_t count) : data_(static_cast<T*>(memory().at_least(padded(count) * sizeof(T)))) {
    static const bool poison = std::getenv("FASTSEQ_POISON") != nullptr;  // tests: an element nobody wrote shows as NaN
    if (poison) memset(data_, 0xff, padded(count) * sizeof(T));
  }
  ~Arena() { memory().give_back_if_large(); }
  Arena(const Arena&) = delete;

  T* data() const { return data_; }

 private:
  static Memory& memory() {
    static thread_local Memory kept;
    return kept;
  }

  T* data_;
};

// Cuts memory from `next` on into pieces aligned to cache lines, or, if that is null, counts what they come to.
template <typename T>
struct Pieces {
  T* next;
  int64_t count = 0;

  T* take(int64_t wanted) {
    T* taken = next;
    const int64_t padded = Arena<T>::padded(wanted);
    if (next) next += padded;
    count += padded;
    return taken;
  }
};

}  // namespace fastseq::FASTSEQ_ISA
