// The standard headers that the kernels use. Included before an instruction set is switched on: the linker may keep any
// source's copy of their inline functions, so none may need more than the oldest machine has.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
