// The random bits of mmfast/ops/dropout.py: Philox-4x32 with 7 rounds.
#pragma once

#include <cstdint>

#include "scalars.h"

namespace mmfast {

// What a dropout mask depends on.
struct Mask {
  uint32_t key[2];
  uint32_t threshold;  // an element is dropped if its 16 bits are below
  float scale;         // on what is kept

  Mask(int64_t seed, int64_t threshold)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)},
        threshold(static_cast<uint32_t>(threshold)),
        scale(65536.0f / static_cast<float>(65536 - threshold)) {}

  MMFAST_INLINE float factor(uint32_t bits) const { return bits < threshold ? 0.0f : scale; }
};

// Four words, of eight 16-bit numbers for eight neighbouring columns: word w has those of columns 2w and 2w + 1.
struct Words {
  uint32_t a, b, c, d;
};

MMFAST_INLINE Words philox(const Mask& mask, int64_t row, uint32_t group) {
  uint32_t a = group, b = static_cast<uint32_t>(row), c = static_cast<uint32_t>(row >> 32), d = 0;
  uint32_t k0 = mask.key[0], k1 = mask.key[1];
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    const uint64_t p = uint64_t{0xD2511F53} * a, q = uint64_t{0xCD9E8D57} * c;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ k0;
    b = static_cast<uint32_t>(q);
    c = static_cast<uint32_t>(p >> 32) ^ d ^ k1;
    d = static_cast<uint32_t>(p);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {a, b, c, d};
}

}  // namespace mmfast
