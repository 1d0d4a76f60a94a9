// e^x as a few multiplications that the compiler vectorises.
#pragma once

#include "scalars.h"

namespace mmfast {

// e^x for x <= 0, within 2 ulp; 0 below -87, where it would turn subnormal; NaN for NaN.
MMFAST_INLINE float exp_nonpositive(float x) {
  constexpr float to_integer = 12582912.0f;  // 1.5 · 2^23: adding it rounds, and leaves the integer in the low bits
  const float shifted = x * 1.44269504f + to_integer;
  const float n = shifted - to_integer;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, with ln 2 in two parts
  float p = 1.9875691500e-4f;  // the polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);  // 2^n
  const uint32_t keep = static_cast<uint32_t>(x < -87.0f) - 1u;  // 0 or all ones: `?:` needs AVX-512 to be vectorised
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p * power) & keep);
}

}  // namespace mmfast
