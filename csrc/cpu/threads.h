// How kernels are handed the caller's threads. No torch in here.
#pragma once

namespace fastseq {

// Runs body(context, calls) on up to `threads` threads at once, and returns when all are done. Whether it gets as many
// is open; `calls` is how many calls of body there are to be.
struct Threads {
  int count;
  void (*run)(int threads, void (*body)(void*, int), void* context);
};

}  // namespace fastseq
