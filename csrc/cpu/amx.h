// Products of bfloat16 matrices in tiles (Intel AMX): C [16, 16] (fp32) += A [16, 32] · B [32, 16] in one instruction.
//
// A tile of A is 16 rows of 64 bytes as they lie in memory. A tile of B is 16 rows too, of which row j has the pairs
// (B[2j, n], B[2j + 1, n]) for n = 0 … 15. Denormal numbers count as zero. A function marked MMFAST_AMX runs only if
// has_amx(), and uses tiles only while its thread has a `Tiles`.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace mmfast {
constexpr int TILE_BITS = 8192;  // a tile as the widest of vectors, where a kernel is told which it may use
}

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#define MMFAST_AMX \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")))

namespace mmfast {

// Whether the CPU multiplies bfloat16 in tiles and the system lets this process use them.
inline bool has_amx() {
  static const bool found = [] {
    if (!has_avx512() || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("amx-bf16")) return false;
    constexpr long ask_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask_permission, tile_data) == 0;
  }();
  return found;
}

constexpr int64_t TILE_ROWS = 16, TILE_PAIRS = 16, TILE_DEPTH = 32, TILE_BYTES = 64;  // bytes in a row of a tile

// While it lives, this thread's eight tiles are 16 rows of 64 bytes each.
class Tiles {
 public:
  MMFAST_AMX Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = TILE_BYTES, config.rows[i] = TILE_ROWS;
    // GCC's intrinsic says that it reads 8 bytes, so the other stores would be left out.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  MMFAST_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// GCC's intrinsics do not say that tiles are loaded from memory: what was stored before must be there.
MMFAST_INLINE void stored_before_tiles() { asm volatile("" : : : "memory"); }

// The first `count` of 16 or 32 lanes.
MMFAST_INLINE uint32_t first_lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// to[j] = the j-th pairs of all of from[0 … 15]: rows of pairs of B's columns, as B's transpose has them, to a tile of B.
MMFAST_AVX512 MMFAST_INLINE void transpose_pairs(const __m512i* from, __m512i* to) {
  __m512i twos[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int odd = 0; odd < 2; ++odd) {
      fours[i + 2 * odd] = _mm512_unpacklo_epi64(twos[i + odd], twos[i + 2 + odd]);
      fours[i + 2 * odd + 1] = _mm512_unpackhi_epi64(twos[i + odd], twos[i + 2 + odd]);
    }
  for (int i = 0; i < 4; ++i) {
    const __m512i even0 = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
    to[i] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    to[4 + i] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    to[8 + i] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    to[12 + i] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}

}  // namespace mmfast

#else

namespace mmfast {
inline bool has_amx() { return false; }
}  // namespace mmfast

#endif
