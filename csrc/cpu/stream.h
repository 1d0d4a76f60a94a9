// Memory access with a hint about caches.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "scalars.h"

namespace mmfast {

// Starts to bring `count` elements into the second-level cache.
template <typename T>
MMFAST_INLINE void prefetch(const T* address, int64_t count) {
  constexpr int64_t per_line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += per_line) __builtin_prefetch(address + i, 0, 2);
}

// The same for elements that will be written.
template <typename T>
MMFAST_INLINE void prefetch_to_write(T* address, int64_t count) {
  constexpr int64_t per_line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += per_line) __builtin_prefetch(address + i, 1, 2);
}

// Brings in the line 2 KiB further on, to be read or written. A pass over several operands that computes needs it: the
// hardware's own prefetching ends with each page of 4 KiB.
template <typename T>
MMFAST_INLINE void prefetch_ahead(const T* address) {
  __builtin_prefetch(reinterpret_cast<const char*>(address) + 2048);
}
template <typename T>
MMFAST_INLINE void prefetch_ahead_to_write(T* address) {
  __builtin_prefetch(reinterpret_cast<char*>(address) + 2048, 1);
}

// Copies to memory that is not read soon: past the caches, so that a line is not fetched only to be overwritten.
template <typename T>
MMFAST_INLINE void stream(T* to, const T* from, int64_t count) {
  const auto* source = reinterpret_cast<const char*>(from);
  auto* target = reinterpret_cast<char*>(to);
  int64_t bytes = count * static_cast<int64_t>(sizeof(T));
#if defined(__x86_64__)
  if (reinterpret_cast<uintptr_t>(target) % 16 == 0)
    for (; bytes >= 16; bytes -= 16, source += 16, target += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#endif
  std::memcpy(target, source, bytes);
}

// Orders what was streamed before whatever this thread does next, such as telling another thread.
MMFAST_INLINE void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace mmfast
