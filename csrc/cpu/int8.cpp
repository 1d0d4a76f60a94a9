// int8 weights with a scale for each row: quantising, dequantising, and x Wᵀ for few rows of x.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <optional>

#include "../tensor_view.h"
#include "avx2.h"
#include "scalars.h"
#include "stream.h"

namespace mmfast {
namespace {

// Elements of a weight for which another thread is worth waking.
constexpr int64_t PER_THREAD = 1 << 17;

int threads_for(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / PER_THREAD, 1, threads));
}

template <typename T>
MMFAST_INLINE void quantize_row(const T* weight, int64_t count, int8_t* values, float* scale) {
  uint32_t bits = 0;  // as integers: what is not finite is larger than all that is
#pragma omp simd reduction(max : bits)
  for (int64_t k = 0; k < count; ++k) bits = std::max(bits, std::bit_cast<uint32_t>(to_float(weight[k])) & 0x7fffffffu);
  *scale = std::bit_cast<float>(bits) / 127.0f;
  const float divisor = *scale == 0.0f ? 1.0f : *scale;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    // Adding and subtracting 1.5 · 2^23 rounds to a whole number, half to even.
    constexpr float shift = 12582912.0f;
    const float x = std::min(std::max(to_float(weight[k]) / divisor, -127.0f), 127.0f);
    values[k] = static_cast<int8_t>((x + shift) - shift);
  }
}

template <typename T>
MMFAST_INLINE void dequantize_row(const int8_t* values, float scale, int64_t count, T* out) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) out[k] = from_float<T>(static_cast<float>(values[k]) * scale);
}

// One function for each dtype, because a template cannot be cloned.
MMFAST_CLONES void quantize(const float* w, int64_t count, int8_t* values, float* scale) {
  quantize_row(w, count, values, scale);
}
MMFAST_CLONES void quantize(const Float16* w, int64_t count, int8_t* values, float* scale) {
  quantize_row(w, count, values, scale);
}
MMFAST_CLONES void quantize(const Bfloat16* w, int64_t count, int8_t* values, float* scale) {
  quantize_row(w, count, values, scale);
}
MMFAST_CLONES void dequantize(const int8_t* values, float scale, int64_t count, float* out) {
  dequantize_row(values, scale, count, out);
}
MMFAST_CLONES void dequantize(const int8_t* values, float scale, int64_t count, Float16* out) {
  dequantize_row(values, scale, count, out);
}
MMFAST_CLONES void dequantize(const int8_t* values, float scale, int64_t count, Bfloat16* out) {
  dequantize_row(values, scale, count, out);
}

// sums[m] += Σ_k x[m][k] · values[k] for M rows of x.
template <int M>
void add_dots(const int8_t* values, int64_t count, const float* x, int64_t stride, float* sums) {
  for (int m = 0; m < M; ++m) {
    float total = 0.0f;
    const float* row = x + m * stride;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < count; ++k) total += static_cast<float>(values[k]) * row[k];
    sums[m] += total;
  }
}

#if defined(__x86_64__)

MMFAST_AVX2 MMFAST_INLINE __m256 load(const int8_t* values) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
}

template <bool PAST_CACHES>
MMFAST_AVX2 MMFAST_INLINE void store16(float* out, __m256 a, __m256 b) {
  store<PAST_CACHES>(out, _mm256_castps_si256(a));
  store<PAST_CACHES>(out + 8, _mm256_castps_si256(b));
}
template <bool PAST_CACHES>
MMFAST_AVX2 MMFAST_INLINE void store16(Float16* out, __m256 a, __m256 b) {
  store<PAST_CACHES>(out, to_float16(a, b));
}
template <bool PAST_CACHES>
MMFAST_AVX2 MMFAST_INLINE void store16(Bfloat16* out, __m256 a, __m256 b) {
  store<PAST_CACHES>(out, _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bfloat16(a), to_bfloat16(b)), 0xd8));
}

// `count` is a multiple of 16.
template <bool PAST_CACHES, typename T>
MMFAST_AVX2 void dequantize_avx2(const int8_t* values, float scale, int64_t count, T* out) {
  const __m256 factor = _mm256_set1_ps(scale);
  for (int64_t k = 0; k < count; k += 16)
    store16<PAST_CACHES>(out + k, _mm256_mul_ps(load(values + k), factor), _mm256_mul_ps(load(values + k + 8), factor));
}

// `count` is a multiple of 32. One row of x needs four chains of additions to be fast, several have them together.
template <int M>
MMFAST_AVX2 void add_dots_avx2(const int8_t* values, int64_t count, const float* x, int64_t stride, float* sums) {
  constexpr int CHAINS = M == 1 ? 4 : 2;
  __m256 totals[M][CHAINS];
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < CHAINS; ++c) totals[m][c] = _mm256_setzero_ps();
  for (int64_t k = 0; k < count; k += 32)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256 weight = load(values + k + 8 * j);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        totals[m][j % CHAINS] =
            _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + m * stride + k + 8 * j), totals[m][j % CHAINS]);
    }
  for (int m = 0; m < M; ++m) {
    for (int c = 1; c < CHAINS; ++c) totals[m][0] = _mm256_add_ps(totals[m][0], totals[m][c]);
    sums[m] += sum(totals[m][0]);
  }
}

#endif  // x86-64

template <typename T>
void dequantize_any(const int8_t* values, float scale, int64_t count, bool past_caches, T* out) {
  int64_t done = 0;
#if defined(__x86_64__)
  if (has_avx2()) {
    done = count / 16 * 16;
    if (past_caches && reinterpret_cast<uintptr_t>(out) % 32 == 0)
      dequantize_avx2<true>(values, scale, done, out);
    else
      dequantize_avx2<false>(values, scale, done, out);
  }
#endif
  dequantize(values + done, scale, count - done, out + done);
}

struct Linear {
  const int8_t* values;
  const float *scale, *bias, *x;
  int64_t rows, columns;
};

// out[m][n] for rows m … m + M - 1 of x and n of W.
template <int M, typename T>
void multiply(const Linear& w, int64_t m, int64_t n, T* out) {
  const int8_t* values = w.values + n * w.columns;
  const float* x = w.x + m * w.columns;
  float sums[M] = {};
  int64_t done = 0;
#if defined(__x86_64__)
  if (has_avx2()) {
    done = w.columns / 32 * 32;
    add_dots_avx2<M>(values, done, x, w.columns, sums);
  }
#endif
  add_dots<M>(values + done, w.columns - done, x + done, w.columns, sums);
  for (int i = 0; i < M; ++i)
    out[(m + i) * w.rows + n] = from_float<T>(sums[i] * w.scale[n] + (w.bias ? w.bias[n] : 0.0f));
}

template <typename F>
void dispatch(DType dtype, F run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::f16: return run(Float16{});
    case DType::bf16: return run(Bfloat16{});
    default: check(false, "int8: no kernel for ", name_of(dtype));
  }
}

void check_weight(const TensorView& values, const TensorView& scale) {
  check(values.dim() == 2, "values are ", values, "; expected [N, K]");
  values.expect("values", DType::i8, {values.size(0), values.size(1)});
  scale.expect("scale", DType::f32, {values.size(0)});
}

}  // namespace

// weight [N, K]; values [N, K] i8 and scale [N] f32: output. A row that is not finite has a scale that is not.
void int8_quantize_cpu(TensorView weight, TensorView values, TensorView scale, int threads) {
  check(weight.dim() == 2 && weight.is_contiguous(), "weight is ", weight, "; expected [N, K], contiguous");
  check_weight(values, scale);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(values.shape == weight.shape, "values are ", values, " but weight ", weight);
  threads = threads_for(rows * columns, threads);
  dispatch(weight.dtype, [&](auto scalar) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; ++n)
      quantize(weight.as<decltype(scalar)>() + n * columns, columns, values.as<int8_t>() + n * columns,
               scale.as<float>() + n);
  });
}

// values [N, K] i8, scale [N] f32; out [last - first, K] f32, f16 or bf16: rows first … last - 1.
void int8_dequantize_cpu(TensorView values, TensorView scale, int64_t first, int64_t last, TensorView out,
                         int threads) {
  check_weight(values, scale);
  check(0 <= first && first <= last && last <= values.size(0),
        "int8: rows ", first, " to ", last, " of ", values);
  const int64_t columns = values.size(1), count = (last - first) * columns;
  out.expect("out", out.dtype, {last - first, columns});
  threads = threads_for(count, threads);
  dispatch(out.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const bool past_caches = count * static_cast<int64_t>(sizeof(T)) >= 16 << 20;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t n = first; n < last; ++n)
        dequantize_any(values.as<int8_t>() + n * columns, scale.as<float>()[n], columns, past_caches,
                       out.as<T>() + (n - first) * columns);
      finish_streaming();
    }
  });
}

// out [M, N] = x [M, K] Wᵀ + bias [N] (f32), sums in f32. Traffic: the values once for every four rows of x.
void int8_linear_cpu(TensorView x, TensorView values, TensorView scale, std::optional<TensorView> bias, TensorView out,
                     int threads) {
  check_weight(values, scale);
  const int64_t rows = values.size(0), columns = values.size(1), x_rows = x.size(0);
  x.expect("x", out.dtype, {x_rows, columns});
  out.expect("out", out.dtype, {x_rows, rows});
  if (bias) bias->expect("bias", DType::f32, {rows});
  const auto plain = std::make_unique_for_overwrite<float[]>(x_rows * columns);
  const Linear linear{values.as<int8_t>(), scale.as<float>(), bias ? bias->as<float>() : nullptr, plain.get(), rows,
                      columns};
  threads = threads_for(rows * columns, threads);
  dispatch(x.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    for (int64_t i = 0; i < x_rows * columns; ++i) plain[i] = to_float(x.as<T>()[i]);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t m = 0; m < x_rows; m += 4) {
        switch (std::min<int64_t>(x_rows - m, 4)) {
          case 1: multiply<1>(linear, m, n, out.as<T>()); break;
          case 2: multiply<2>(linear, m, n, out.as<T>()); break;
          case 3: multiply<3>(linear, m, n, out.as<T>()); break;
          default: multiply<4>(linear, m, n, out.as<T>());
        }
      }
  });
}

}  // namespace mmfast
