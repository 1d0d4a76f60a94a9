// NF4: quantising, dequantising, and x Wᵀ for few rows of x, decoding in registers. Compiled with -ffp-contract=off (see
// CMakeLists.txt): quantised and dequantised values must have the bits of a multiplication and an addition, each rounded.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>

#include "../tensor_view.h"
#include "avx2.h"
#include "nf4.h"
#include "scalars.h"
#include "stream.h"

namespace mmfast {

using namespace nf4;

namespace {

// Elements of a weight for which another thread is worth waking.
constexpr int64_t PER_THREAD = 1 << 17;

int threads_for(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / PER_THREAD, 1, threads));
}

template <typename T>
MMFAST_INLINE float largest(const T* weight, int64_t count) {
  uint32_t bits = 0;  // as integers: what is not finite is larger than all that is
#pragma omp simd reduction(max : bits)
  for (int64_t i = 0; i < count; ++i) bits = std::max(bits, std::bit_cast<uint32_t>(to_float(weight[i])) & 0x7fffffffu);
  return std::bit_cast<float>(bits);
}

// ---- dequantise: whole blocks, natural order

template <typename T>
MMFAST_INLINE void decode(const uint8_t* packed, float scale, T* out, int64_t bytes) {
  T values[16];
  for (int i = 0; i < 16; ++i) values[i] = from_float<T>(LEVELS[i] * scale);
  for (int64_t i = 0; i < bytes; ++i) {
    out[2 * i] = values[packed[i] >> 4];
    out[2 * i + 1] = values[packed[i] & 15];
  }
}

template <typename T>
void decode_blocks_portable(const uint8_t* packed, const float* scales, T* out, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) decode(packed + b * BLOCK / 2, scales[b], out + b * BLOCK, BLOCK / 2);
}

#if defined(__x86_64__)

// 16 numbers as planes of 16 bytes each, least significant first: `pshufb` looks a byte up.
template <int BYTES>
struct Planes {
  alignas(16) uint8_t byte[BYTES][16];
};

template <int BYTES, typename F>
constexpr Planes<BYTES> planes_of(F bits_of) {
  Planes<BYTES> planes{};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < BYTES; ++k) planes.byte[k][i] = static_cast<uint8_t>(bits_of(LEVELS[i]) >> 8 * k);
  return planes;
}

// Levels of 1 / ONE: 64 products of them with 16-bit integers have a sum in 32 bits.
constexpr int ONE = 8191, LARGEST = 32767;
static_assert(int64_t{8} * ONE * LARGEST <= INT32_MAX);  // a lane adds eight

constexpr auto FLOATS = planes_of<4>([](float level) { return std::bit_cast<uint32_t>(level); });
constexpr auto INTEGERS = planes_of<2>([](float level) {
  return static_cast<uint32_t>(static_cast<int>(level * ONE + (level < 0 ? -0.5f : 0.5f)));
});

MMFAST_AVX2 MMFAST_INLINE __m256i both_halves(const uint8_t* bytes) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

MMFAST_AVX2 MMFAST_INLINE __m256i high_halves(__m256i bytes) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
}
MMFAST_AVX2 MMFAST_INLINE __m256i low_halves(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

// Levels of 32 codes: register j holds those of bytes 4j … 4j + 3 of each half of `codes`.
MMFAST_AVX2 MMFAST_INLINE void look_up(const __m256i* plane, __m256i codes, __m256* levels) {
  const __m256i b0 = _mm256_shuffle_epi8(plane[0], codes), b1 = _mm256_shuffle_epi8(plane[1], codes);
  const __m256i b2 = _mm256_shuffle_epi8(plane[2], codes), b3 = _mm256_shuffle_epi8(plane[3], codes);
  const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), low23 = _mm256_unpacklo_epi8(b2, b3);
  const __m256i high01 = _mm256_unpackhi_epi8(b0, b1), high23 = _mm256_unpackhi_epi8(b2, b3);
  levels[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
  levels[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
  levels[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23));
  levels[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23));
}

// Two registers whose halves follow each other crosswise -> memory order; `gap` elements lie between the two results.
template <bool PAST_CACHES, typename T>
MMFAST_AVX2 MMFAST_INLINE void store_pair(T* to, int64_t gap, __m256i a, __m256i b) {
  store<PAST_CACHES>(to, _mm256_permute2x128_si256(a, b, 0x20));
  store<PAST_CACHES>(to + gap, _mm256_permute2x128_si256(a, b, 0x31));
}

template <bool PAST_CACHES>
MMFAST_AVX2 void decode_blocks_avx2(const uint8_t* packed, const float* scales, float* out, int64_t blocks) {
  const __m256i planes[4] = {both_halves(FLOATS.byte[0]), both_halves(FLOATS.byte[1]), both_halves(FLOATS.byte[2]),
                             both_halves(FLOATS.byte[3])};
  for (int64_t b = 0; b < blocks; ++b, packed += BLOCK / 2, out += BLOCK) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i high = high_halves(bytes), low = low_halves(bytes);
    const __m256 scale = _mm256_broadcast_ss(scales + b);
    const __m256i codes[2] = {_mm256_unpacklo_epi8(high, low), _mm256_unpackhi_epi8(high, low)};
    for (int half = 0; half < 2; ++half) {
      __m256 levels[4];
      look_up(planes, codes[half], levels);
      for (int j = 0; j < 4; ++j) levels[j] = _mm256_mul_ps(levels[j], scale);
      for (int j = 0; j < 4; j += 2)
        store_pair<PAST_CACHES>(out + 16 * half + 4 * j, 32, _mm256_castps_si256(levels[j]),
                           _mm256_castps_si256(levels[j + 1]));
    }
  }
}

// The 16 values of a block in 16 bits, those of levels 0 … 7 in the low half of the register.
MMFAST_AVX2 MMFAST_INLINE __m256i block_values(__m256 scale, Float16) {
  const __m256 low = _mm256_mul_ps(_mm256_load_ps(LEVELS), scale);
  const __m256 high = _mm256_mul_ps(_mm256_load_ps(LEVELS + 8), scale);
  return to_float16(low, high);
}

MMFAST_AVX2 MMFAST_INLINE __m256i block_values(__m256 scale, Bfloat16) {
  // Packing goes half by half; so do the levels.
  const __m256 levels0 = _mm256_set_m128(_mm_load_ps(LEVELS + 8), _mm_load_ps(LEVELS));
  const __m256 levels1 = _mm256_set_m128(_mm_load_ps(LEVELS + 12), _mm_load_ps(LEVELS + 4));
  return _mm256_packus_epi32(to_bfloat16(_mm256_mul_ps(levels0, scale)), to_bfloat16(_mm256_mul_ps(levels1, scale)));
}

// 16 bits: a block has 16 values, made once and looked up 64 times.
template <bool PAST_CACHES, typename T>
MMFAST_AVX2 void decode_blocks_avx2(const uint8_t* packed, const float* scales, T* out, int64_t blocks) {
  const __m256i split = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  for (int64_t b = 0; b < blocks; ++b, packed += BLOCK / 2, out += BLOCK) {
    const __m256i values = _mm256_shuffle_epi8(block_values(_mm256_broadcast_ss(scales + b), T{}), split);
    const __m256i low_bytes = _mm256_permute4x64_epi64(values, 0x88);
    const __m256i high_bytes = _mm256_permute4x64_epi64(values, 0xdd);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i high = high_halves(bytes), low = low_halves(bytes);
    const __m256i codes[2] = {_mm256_unpacklo_epi8(high, low), _mm256_unpackhi_epi8(high, low)};
    for (int half = 0; half < 2; ++half) {
      const __m256i l = _mm256_shuffle_epi8(low_bytes, codes[half]), h = _mm256_shuffle_epi8(high_bytes, codes[half]);
      store_pair<PAST_CACHES>(out + 16 * half, 32, _mm256_unpacklo_epi8(l, h), _mm256_unpackhi_epi8(l, h));
    }
  }
}

#endif  // x86-64

template <typename T>
void decode_blocks(const uint8_t* packed, const float* scales, T* out, int64_t blocks, bool past_caches) {
#if defined(__x86_64__)
  if (has_avx2()) {
    if (past_caches && reinterpret_cast<uintptr_t>(out) % 32 == 0) {
      decode_blocks_avx2<true>(packed, scales, out, blocks);
      finish_streaming();
    } else {
      decode_blocks_avx2<false>(packed, scales, out, blocks);
    }
    return;
  }
#endif
  decode_blocks_portable(packed, scales, out, blocks);
}

// ---- linear

// What x in T is multiplied as: fp32, or integers with one scale for each block of 64. These are 2^-15 of the largest in
// the block at most apart from x, far less than T would round a dequantised weight, and take half the instructions.
template <typename T>
using Lane = std::conditional_t<std::is_same_v<T, float>, float, int16_t>;

#if defined(__x86_64__)

// A row of x in the order in which levels are looked up: within a block, first the 32 even elements, then the odd ones,
// and so that the two halves of the block lie side by side in a register.
template <typename L>
void reorder(const float* x, L* out, int64_t count) {
  constexpr int HALF = 16 / sizeof(L);
  for (int64_t b = 0; b < count; b += BLOCK)
    for (int odd = 0; odd < 2; ++odd)
      for (int j = 0; j < 16; j += HALF)
        for (int half = 0; half < 2; ++half)
          for (int i = 0; i < HALF; ++i) *out++ = static_cast<L>(x[b + 32 * half + 2 * (j + i) + odd]);
}

void prepare(float* x, float* out, float*, int64_t count) { reorder(x, out, count); }

// Overwrites x. What is not finite becomes NaN.
void prepare(float* x, int16_t* out, float* scales, int64_t count) {
  for (int64_t b = 0; b < count; b += BLOCK) {
    const float most = largest(x + b, BLOCK);
    *scales++ = most <= std::numeric_limits<float>::max() ? most / LARGEST / ONE : std::numeric_limits<float>::quiet_NaN();
    const double factor = most > 0.0f && most <= std::numeric_limits<float>::max() ? double{LARGEST} / most : 0.0;
    for (int64_t i = b; i < b + BLOCK; ++i) x[i] = factor ? static_cast<float>(std::nearbyint(x[i] * factor)) : 0.0f;
  }
  reorder(x, out, count);
}

// sums[m] += Σ_k x[m][k] · weight[k] over whole blocks, for M rows of x.
template <int M>
MMFAST_AVX2 void add_dots_avx2(const uint8_t* packed, const float* scales, int64_t blocks, const float* x,
                               int64_t stride, const float*, int64_t, float* sums) {
  const __m256i planes[4] = {both_halves(FLOATS.byte[0]), both_halves(FLOATS.byte[1]), both_halves(FLOATS.byte[2]),
                             both_halves(FLOATS.byte[3])};
  __m256 totals[M];
  for (int m = 0; m < M; ++m) totals[m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, packed += BLOCK / 2, x += BLOCK) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    __m256 even[M], odd[M];
    const auto multiply = [&](__m256i codes, const float* row, __m256* parts) MMFAST_AVX2 {
      __m256 levels[4];
      look_up(planes, codes, levels);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m, row += stride) {
        parts[m] = _mm256_mul_ps(levels[0], _mm256_loadu_ps(row));
#pragma GCC unroll 3
        for (int j = 1; j < 4; ++j) parts[m] = _mm256_fmadd_ps(levels[j], _mm256_loadu_ps(row + 8 * j), parts[m]);
      }
    };
    multiply(high_halves(bytes), x, even);
    multiply(low_halves(bytes), x + BLOCK / 2, odd);
    const __m256 scale = _mm256_broadcast_ss(scales + b);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) totals[m] = _mm256_fmadd_ps(_mm256_add_ps(even[m], odd[m]), scale, totals[m]);
  }
  for (int m = 0; m < M; ++m) sums[m] += sum(totals[m]);
}

template <int M>
MMFAST_AVX2 void add_dots_avx2(const uint8_t* packed, const float* scales, int64_t blocks, const int16_t* x,
                               int64_t stride, const float* x_scales, int64_t scale_stride, float* sums) {
  const __m256i low_byte = both_halves(INTEGERS.byte[0]), high_byte = both_halves(INTEGERS.byte[1]);
  __m256 totals[M];
  for (int m = 0; m < M; ++m) totals[m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, packed += BLOCK / 2, x += BLOCK) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i codes[2] = {high_halves(bytes), low_halves(bytes)};
    __m256i levels[4];
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m256i low = _mm256_shuffle_epi8(low_byte, codes[odd]);
      const __m256i high = _mm256_shuffle_epi8(high_byte, codes[odd]);
      levels[2 * odd] = _mm256_unpacklo_epi8(low, high);
      levels[2 * odd + 1] = _mm256_unpackhi_epi8(low, high);
    }
    const __m256 scale = _mm256_broadcast_ss(scales + b);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const auto* row = reinterpret_cast<const __m256i*>(x + m * stride);
      __m256i parts[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) parts[j] = _mm256_madd_epi16(levels[j], _mm256_loadu_si256(row + j));
      const __m256i part =
          _mm256_add_epi32(_mm256_add_epi32(parts[0], parts[1]), _mm256_add_epi32(parts[2], parts[3]));
      const __m256 both = _mm256_mul_ps(scale, _mm256_broadcast_ss(x_scales + m * scale_stride + b));
      totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), both, totals[m]);
    }
  }
  for (int m = 0; m < M; ++m) sums[m] += sum(totals[m]);
}

#endif  // x86-64

// The same for any range of elements, `first` being its place in the flattened weight, and x as it is.
template <int M>
void add_dots_portable(const uint8_t* packed, const float* scales, int64_t first, int64_t count, const float* x,
                       int64_t stride, float* sums) {
  float values[BLOCK];
  const int64_t last = first + count;
  for (int64_t at = first; at < last;) {
    const int64_t stop = std::min(last, (at / BLOCK + 1) * BLOCK), size = stop - at;
    decode(packed + (at - first) / 2, scales[at / BLOCK - first / BLOCK], values, size / 2);
    for (int m = 0; m < M; ++m) {
      float total = 0.0f;
      const float* row = x + m * stride + (at - first);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < size; ++i) total += values[i] * row[i];
      sums[m] += total;
    }
    at = stop;
  }
}

// Rows of W whose scales are decoded together.
constexpr int64_t ROWS = 16;

// Rows of x ready to be multiplied. `lanes` and `scales` if there is AVX2 and rows of W are whole blocks, else `plain`.
template <typename T>
struct Input {
  std::unique_ptr<float[]> plain, scales;
  std::unique_ptr<Lane<T>[]> lanes;

  Input(const T* x, int64_t rows, int64_t columns) {
    const bool fast = columns % BLOCK == 0 && has_avx2();
    plain = std::make_unique_for_overwrite<float[]>((fast ? 1 : rows) * columns);
    if (fast) {
      lanes = std::make_unique_for_overwrite<Lane<T>[]>(rows * columns);
      scales = std::make_unique_for_overwrite<float[]>(rows * columns / BLOCK);
    }
    for (int64_t m = 0; m < rows; ++m) {
      float* row = plain.get() + (fast ? 0 : m * columns);
      for (int64_t k = 0; k < columns; ++k) row[k] = to_float(x[m * columns + k]);
#if defined(__x86_64__)
      if (fast) prepare(row, lanes.get() + m * columns, scales.get() + m * columns / BLOCK, columns);
#endif
    }
  }
};

struct Linear {
  const uint8_t* packed;
  Scales scales;
  const float* bias;
  int64_t rows, columns;
};

// out[m][n] for rows m … m + M - 1 of x and n = first … first + count - 1 of W, of which `scales` are read.
template <int M, typename T>
void multiply(const Linear& w, const Input<T>& x, int64_t m, int64_t first, int64_t count, const float* scales,
              T* out) {
  const int64_t columns = w.columns;
  const uint8_t* packed = w.packed + first * columns / 2;
  for (int64_t n = first; n < first + count; ++n, packed += columns / 2) {
    float sums[M] = {};
    if (x.lanes) {
#if defined(__x86_64__)
      const int64_t blocks = columns / BLOCK;
      add_dots_avx2<M>(packed, scales + (n - first) * blocks, blocks, x.lanes.get() + m * columns, columns,
                       x.scales.get() + m * blocks, blocks, sums);
#endif
    } else {
      const int64_t begin = n * columns;
      add_dots_portable<M>(packed, scales + (begin / BLOCK - first * columns / BLOCK), begin, columns,
                           x.plain.get() + m * columns, columns, sums);
    }
    for (int i = 0; i < M; ++i) out[(m + i) * w.rows + n] = from_float<T>(sums[i] + (w.bias ? w.bias[n] : 0.0f));
  }
}

template <typename T>
void multiply_rows(const Linear& w, const Input<T>& x, int64_t x_rows, int64_t first, int64_t last, T* out,
                   float* scales) {
  for (int64_t n = first; n < last; n += ROWS) {
    const int64_t count = std::min(ROWS, last - n), begin = n * w.columns / BLOCK;
    w.scales.read(begin, ((n + count) * w.columns + BLOCK - 1) / BLOCK - begin, scales);
    for (int64_t m = 0; m < x_rows; m += 4) {
      switch (std::min<int64_t>(x_rows - m, 4)) {
        case 1: multiply<1>(w, x, m, n, count, scales, out); break;
        case 2: multiply<2>(w, x, m, n, count, scales, out); break;
        case 3: multiply<3>(w, x, m, n, count, scales, out); break;
        default: multiply<4>(w, x, m, n, count, scales, out);
      }
    }
  }
}

// ---- quantise

constexpr float SMALLEST = 1e-38f;

template <bool DIVIDE, typename T>
MMFAST_INLINE void encode(const T* weight, float by, int64_t count, uint8_t* packed) {
  uint8_t codes[BLOCK] = {};
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float x = DIVIDE ? to_float(weight[i]) / by : to_float(weight[i]) * by;
    int code = 0;
#pragma GCC unroll 15
    for (int j = 0; j < 15; ++j) code += x > (LEVELS[j] + LEVELS[j + 1]) / 2;
    codes[i] = static_cast<uint8_t>(code);
  }
  for (int64_t i = 0; i < count; i += 2) packed[i / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
}

template <typename T>
MMFAST_INLINE void quantize_range(const T* weight, int64_t first, int64_t last, int64_t count, uint8_t* packed,
                                  float* absmax) {
  for (int64_t b = first; b < last; ++b) {
    const T* block = weight + b * BLOCK;
    uint8_t* out = packed + b * BLOCK / 2;
    const int64_t size = std::min(BLOCK, count - b * BLOCK);
    absmax[b] = largest(block, size);
    if (size == BLOCK) {
      encode<false>(block, 1.0f / std::max(absmax[b], SMALLEST), BLOCK, out);
    } else {
      absmax[b] = std::max(absmax[b], SMALLEST);
      encode<true>(block, absmax[b], size, out);
    }
  }
}

// One function for each dtype, because a template cannot be cloned.
MMFAST_CLONES void quantize_blocks(const float* w, int64_t first, int64_t last, int64_t n, uint8_t* packed, float* a) {
  quantize_range(w, first, last, n, packed, a);
}
MMFAST_CLONES void quantize_blocks(const Float16* w, int64_t first, int64_t last, int64_t n, uint8_t* packed,
                                   float* a) {
  quantize_range(w, first, last, n, packed, a);
}
MMFAST_CLONES void quantize_blocks(const Bfloat16* w, int64_t first, int64_t last, int64_t n, uint8_t* packed,
                                   float* a) {
  quantize_range(w, first, last, n, packed, a);
}

template <typename F>
void dispatch(DType dtype, F run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::f16: return run(Float16{});
    case DType::bf16: return run(Bfloat16{});
    default: check(false, "nf4: no kernel for ", name_of(dtype));
  }
}

}  // namespace

// weight [N, K], K even; packed [N, K / 2] u8 and absmax [blocks of 64] f32: output. A block that is not finite has an
// absmax that is not.
void nf4_quantize_cpu(TensorView weight, TensorView packed, TensorView absmax, int threads) {
  check(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) % 2 == 0,
        "weight is ", weight, "; expected [N, K], contiguous, K even");
  const int64_t count = weight.numel(), blocks = (count + BLOCK - 1) / BLOCK;
  packed.expect("packed", DType::u8, {weight.size(0), weight.size(1) / 2});
  absmax.expect("absmax", DType::f32, {blocks});
  threads = threads_for(count, threads);
  dispatch(weight.dtype, [&](auto scalar) {
    const auto* data = weight.as<decltype(scalar)>();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t)
      quantize_blocks(data, blocks * t / threads, blocks * (t + 1) / threads, count, packed.as<uint8_t>(),
                      absmax.as<float>());
  });
}

// weight: packed, absmax and, if double-quantised, nested_absmax, nested_code, nested_offset. out [last - first, K] f32,
// f16 or bf16: rows first … last - 1; first · K must be a multiple of 64.
void nf4_dequantize_cpu(std::vector<TensorView> weight, int64_t first, int64_t last, TensorView out, int threads) {
  const Scales scales = read_scales(weight);
  const int64_t columns = 2 * weight[0].size(1), begin = first * columns, count = (last - first) * columns;
  check(0 <= first && first <= last && last <= weight[0].size(0) && begin % BLOCK == 0,
        "nf4: rows ", first, " to ", last, " of packed ", weight[0],
        "; expected rows of it, the first at the start of a block");
  out.expect("out", out.dtype, {last - first, columns});
  const uint8_t* packed = weight[0].as<uint8_t>() + begin / 2;
  const int64_t blocks = count / BLOCK, rest = count % BLOCK;
  threads = threads_for(count, threads);
  dispatch(out.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    T* to = out.as<T>();
    // What does not stay in a cache need not go through it.
    const bool past_caches = count * static_cast<int64_t>(sizeof(T)) >= 16 << 20;
    // So many that waiting for what was streamed, after each step, costs nothing that shows.
    constexpr int64_t STEP = 512;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b += STEP) {
      float values[STEP];
      const int64_t size = std::min(STEP, blocks - b);
      scales.read(begin / BLOCK + b, size, values);
      decode_blocks(packed + b * BLOCK / 2, values, to + b * BLOCK, size, past_caches);
    }
    if (rest) {
      float value;
      scales.read(begin / BLOCK + blocks, 1, &value);
      decode(packed + blocks * BLOCK / 2, value, to + blocks * BLOCK, rest / 2);
    }
  });
}

// out [M, N] = x [M, K] Wᵀ + bias [N] (f32), sums in f32. Traffic: the packed weight once for every four rows of x.
void nf4_linear_cpu(TensorView x, std::vector<TensorView> weight, std::optional<TensorView> bias, TensorView out,
                    int threads) {
  const Scales scales = read_scales(weight);
  const int64_t rows = weight[0].size(0), columns = 2 * weight[0].size(1), x_rows = x.size(0);
  x.expect("x", out.dtype, {x_rows, columns});
  out.expect("out", out.dtype, {x_rows, rows});
  if (bias) bias->expect("bias", DType::f32, {rows});
  const Linear linear{weight[0].as<uint8_t>(), scales, bias ? bias->as<float>() : nullptr, rows, columns};
  threads = threads_for(rows * columns, threads);
  const int64_t scratch = ROWS * (columns / BLOCK + 2);
  const auto scratches = std::make_unique_for_overwrite<float[]>(threads * scratch);
  dispatch(x.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Input<T> input(x.as<T>(), x_rows, columns);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t)
      multiply_rows(linear, input, x_rows, rows * t / threads, rows * (t + 1) / threads, out.as<T>(),
                    scratches.get() + t * scratch);
  });
}

}  // namespace mmfast
