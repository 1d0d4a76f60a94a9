// What the kernels of NF4 share: the levels, and the scales of blocks. Sources that include it are compiled with
// -ffp-contract=off (see CMakeLists.txt): a scale in 8 bits is a product that is rounded, then a sum that is rounded.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tensor_view.h"

namespace mmfast::nf4 {

constexpr int64_t BLOCK = 64, NESTED_BLOCK = 256;

alignas(64) inline constexpr float LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The scales of blocks: fp32, or 8-bit codes of them.
struct Scales {
  const float* absmax = nullptr;
  const uint8_t* codes = nullptr;
  const float *nested = nullptr, *code = nullptr;
  float offset = 0.0f;

  void read(int64_t first, int64_t count, float* __restrict out) const {
    if (!codes) {
      std::copy_n(absmax + first, count, out);
      return;
    }
    const float* const values = code;
    const float add = offset;
    for (int64_t i = 0; i < count;) {
      const int64_t last = std::min(count, ((first + i) / NESTED_BLOCK + 1) * NESTED_BLOCK - first);
      const float factor = nested[(first + i) / NESTED_BLOCK];
#pragma GCC unroll 4
      for (; i < last; ++i) out[i] = values[codes[first + i]] * factor + add;
    }
  }
};

inline Scales read_scales(const std::vector<TensorView>& weight) {
  const TensorView& packed = weight[0];
  check(packed.dim() == 2, "packed is ", packed, "; expected [N, K // 2]");
  packed.expect("packed", DType::u8, {packed.size(0), packed.size(1)});
  const int64_t blocks = (2 * packed.numel() + BLOCK - 1) / BLOCK;
  if (weight.size() == 2) {
    weight[1].expect("absmax", DType::f32, {blocks});
    return {weight[1].as<float>()};
  }
  check(weight.size() == 5, "nf4: ", weight.size(), " tensors; expected 2, or 5 if double-quantised");
  weight[1].expect("absmax", DType::u8, {blocks});
  weight[2].expect("nested_absmax", DType::f32, {(blocks + NESTED_BLOCK - 1) / NESTED_BLOCK});
  weight[3].expect("nested_code", DType::f32, {256});
  weight[4].expect("nested_offset", DType::f32, {});
  return {nullptr, weight[1].as<uint8_t>(), weight[2].as<float>(), weight[3].as<float>(), *weight[4].as<float>()};
}

}  // namespace mmfast::nf4
