// 16-bit floats as bits, with conversions that compilers vectorise: no branches, no calls, no denormal
// arithmetic (so they hold under flush-to-zero too). Rounding is to nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

// A function that calls kernels with this attribute is compiled for AVX-512, AVX2 and the baseline, and the
// loader picks one. What it calls must be inlined into it (MMFAST_INLINE), or it is compiled once only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MMFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MMFAST_CLONES
#endif
#define MMFAST_INLINE inline __attribute__((always_inline))

namespace mmfast {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// `?:` in words: in this form compilers vectorise it for AVX2 too.
MMFAST_INLINE uint32_t mask_if(bool condition) { return 0u - static_cast<uint32_t>(condition); }
MMFAST_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  return no ^ ((yes ^ no) & mask_if(condition));
}

MMFAST_INLINE float to_float(float x) { return x; }

MMFAST_INLINE float to_float(Bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

MMFAST_INLINE float to_float(Float16 x) {
  constexpr uint32_t rebias = 112u << 23, smallest_normal = 113u << 23;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t normal = magnitude + rebias + (rebias & mask_if(magnitude >= 0x0f800000u));  // infinity, NaN: twice
  const float subnormal = std::bit_cast<float>(magnitude + smallest_normal) - std::bit_cast<float>(smallest_normal);
  const uint32_t bits = select(magnitude < 0x00800000u, std::bit_cast<uint32_t>(subnormal), normal);
  return std::bit_cast<float>(bits | (x.bits & 0x8000u) << 16);
}

template <typename T>
T from_float(float x);

template <>
MMFAST_INLINE float from_float<float>(float x) {
  return x;
}

template <>
MMFAST_INLINE Bfloat16 from_float<Bfloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

template <>
MMFAST_INLINE Float16 from_float<Float16>(float x) {
  constexpr uint32_t too_large = 143u << 23, smallest_normal = 113u << 23, aligner = 126u << 23;
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(aligner)) - aligner;
  const uint32_t special = select(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
  const uint32_t finite = select(magnitude < smallest_normal, subnormal, normal);
  return {static_cast<uint16_t>(select(magnitude >= too_large, special, finite) | (bits >> 16 & 0x8000u))};
}

// The float nearest to x that T holds: to_float(from_float<T>(x)), in fewer steps and without a change of width.
template <typename T>
float round_to(float x);

template <>
MMFAST_INLINE float round_to<float>(float x) {
  return x;
}

template <>
MMFAST_INLINE float round_to<Bfloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  return std::bit_cast<float>(x != x ? 0x7fc00000u : rounded);
}

template <>
MMFAST_INLINE float round_to<Float16>(float x) {
  constexpr uint32_t too_large = 0x477ff000u, smallest_normal = 113u << 23;  // 65520, halfway to 2^16, and 2^-14
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u)) & ~0x1fffu;
  // Next to 0.5 floats lie 2^-24 apart, as Float16's subnormals do.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f - 0.5f);
  const uint32_t special = select(magnitude > 0x7f800000u, 0x7fc00000u, 0x7f800000u);
  const uint32_t finite = select(magnitude < smallest_normal, subnormal, normal);
  return std::bit_cast<float>(select(magnitude >= too_large, special, finite) | (bits & 0x80000000u));
}

}  // namespace mmfast
