// Dropout with a mask that is a function of seed and position; mmfast/ops/dropout.py defines it.
#include <algorithm>
#include <cstdint>

#include "../tensor_view.h"
#include "philox.h"
#include "scalars.h"

namespace mmfast {
namespace {

constexpr int64_t GROUPS = 64;  // Philox calls at a time, each for eight columns

template <typename T>
MMFAST_INLINE void drop_row(const T* x, T* out, int64_t columns, int64_t row, const Mask& mask) {
  uint32_t words[4][GROUPS];
  float factors[8 * GROUPS];
  for (int64_t start = 0; start < columns; start += 8 * GROUPS) {
    const int64_t groups = std::min((columns - start + 7) / 8, GROUPS);
#pragma omp simd
    for (int64_t g = 0; g < groups; ++g) {
      const Words found = philox(mask, row, static_cast<uint32_t>(start / 8 + g));
      words[0][g] = found.a;
      words[1][g] = found.b;
      words[2][g] = found.c;
      words[3][g] = found.d;
    }
    for (int64_t w = 0; w < 4; ++w)
#pragma omp simd
      for (int64_t g = 0; g < groups; ++g) {
        factors[8 * g + 2 * w] = mask.factor(words[w][g] & 0xffffu);
        factors[8 * g + 2 * w + 1] = mask.factor(words[w][g] >> 16);
      }
    const int64_t count = std::min(columns - start, 8 * GROUPS);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      // A dropped element is 0 even if it is infinite or NaN.
      const float x_i = to_float(x[start + i]), kept = x_i * factors[i];
      out[start + i] = from_float<T>(factors[i] == 0.0f ? 0.0f : kept);
    }
  }
}

// One function for each dtype, because a template cannot be cloned.
MMFAST_CLONES void drop_f32(const float* x, float* out, int64_t n, int64_t row, const Mask& m) {
  drop_row(x, out, n, row, m);
}
MMFAST_CLONES void drop_f16(const Float16* x, Float16* out, int64_t n, int64_t row, const Mask& m) {
  drop_row(x, out, n, row, m);
}
MMFAST_CLONES void drop_bf16(const Bfloat16* x, Bfloat16* out, int64_t n, int64_t row, const Mask& m) {
  drop_row(x, out, n, row, m);
}

}  // namespace

// x and out [rows, columns] of one dtype (f32, f16, bf16), last stride 1; out may be x. Row 0 is row first_row of the
// matrix that the mask belongs to.
void dropout_cpu(TensorView x, int64_t seed, int64_t threshold, int64_t first_row, TensorView out, int threads) {
  check(x.dim() == 2 && x.shape == out.shape && x.dtype == out.dtype,
        "x is ", x, " and out is ", out, "; expected two equal matrices");
  check(x.size(1) <= 1 || (x.stride(1) == 1 && out.stride(1) == 1), "the last stride must be 1");
  const int64_t rows = x.size(0), columns = x.size(1);
  const Mask mask(seed, threshold);
  const auto run = [&](auto* from, auto* to, auto* drop) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > 32768)
    for (int64_t i = 0; i < rows; ++i)
      drop(from + i * x.stride(0), to + i * out.stride(0), columns, first_row + i, mask);
  };
  switch (x.dtype) {
    case DType::f32: return run(x.as<float>(), out.as<float>(), &drop_f32);
    case DType::f16: return run(x.as<Float16>(), out.as<Float16>(), &drop_f16);
    case DType::bf16: return run(x.as<Bfloat16>(), out.as<Bfloat16>(), &drop_bf16);
    default: check(false, "x is ", x, "; expected float32, float16 or bfloat16");
  }
}

}  // namespace mmfast
