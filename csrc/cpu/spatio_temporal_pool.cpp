// Spatio-temporal pooling. Forward reads the features once, backward writes their gradient once.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>

#include <omp.h>

#include "../spatio_temporal_pool.h"
#include "scalars.h"
#include "stream.h"

namespace mmfast {
namespace {

// One sample, `width` of its channels. `frames` and `pooled` may be the tensors or their gradients.
template <typename T>
struct Slice {
  T* features;  // [frames, patches, width]
  int64_t frame_stride, patch_stride;
  T* pooled;  // [temporal_rows + patches, width]
  int64_t pooled_stride, temporal_rows;
  const bool* real;  // [frames]; null: every frame is real
  int64_t frames, patches, width;

  bool is_real(int64_t t) const { return !real || real[t]; }
  T* spatial(int64_t n) const { return pooled + (temporal_rows + n) * pooled_stride; }
  T* temporal(int64_t t) const { return pooled + t * pooled_stride; }
  float per_patch() const { return 1.0f / static_cast<float>(std::max<int64_t>(patches, 1)); }
  float per_frame() const {
    const int64_t count = real ? std::count(real, real + frames, true) : frames;
    return 1.0f / static_cast<float>(std::max<int64_t>(count, 1));
  }
};

// Patches whose gradients stay in L1 while all frames pass by.
constexpr int64_t BLOCK = 8;
// Frames that pass together: each is read from its first patch to its last, as memory lies.
constexpr int64_t FRAMES = 4;
// So many frames are added up before they join the sum, so that its error does not grow with a clip's length.
constexpr int64_t RUN = 64;

template <typename T>
MMFAST_INLINE void scale(const float* sums, float factor, T* out, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) out[d] = from_float<T>(sums[d] * factor);
}

// Adds four patches of four frames: each row to the sum of its frame and to the sum of its patch.
template <typename T>
MMFAST_INLINE void add_tile(const T* const* x, int64_t stride, float* frames, float* patches, int64_t width) {
  const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f, sum3 = 0.0f;
#pragma GCC unroll 4
    for (int64_t n = 0; n < 4; ++n) {
      const int64_t i = n * stride + d;
      const float a = to_float(x0[i]), b = to_float(x1[i]), c = to_float(x2[i]), e = to_float(x3[i]);
      patches[n * width + d] += (a + b) + (c + e);
      sum0 += a;
      sum1 += b;
      sum2 += c;
      sum3 += e;
    }
    frames[d] += sum0;
    frames[width + d] += sum1;
    frames[2 * width + d] += sum2;
    frames[3 * width + d] += sum3;
  }
}

template <typename T>
MMFAST_INLINE void add_one(const T* x, float* frame, float* patch, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    patch[d] += to_float(x[d]);
    frame[d] += to_float(x[d]);
  }
}

MMFAST_INLINE void add(const float* x, float* sums, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += x[i];
}

// scratch: [2 patches + FRAMES, width].
template <typename T>
MMFAST_INLINE void forward(const Slice<T>& s, float* scratch) {
  float *patch_sums = scratch, *run_sums = patch_sums + s.patches * s.width, *frame_sums = run_sums + s.patches * s.width;
  const float per_frame = s.per_frame(), per_patch = s.per_patch();
  std::fill_n(patch_sums, 2 * s.patches * s.width, 0.0f);
  int64_t in_run = 0;
  for (int64_t t = 0; t < s.frames;) {
    const T* x[FRAMES];
    int64_t index[FRAMES], count = 0;
    for (; t < s.frames && count < FRAMES; ++t) {
      if (s.is_real(t)) {
        index[count] = t;
        x[count++] = s.features + t * s.frame_stride;
      } else {
        std::memset(s.temporal(t), 0, s.width * sizeof(T));
      }
    }
    std::fill_n(frame_sums, count * s.width, 0.0f);
    int64_t n = 0;
    for (; count == FRAMES && n + 4 <= s.patches; n += 4) {
      const T* rows[FRAMES];
      for (int64_t k = 0; k < FRAMES; ++k) {
        rows[k] = x[k] + n * s.patch_stride;
        // The processor's own prefetch stops at the end of a page, which may be the end of a row.
        if (n + 8 <= s.patches)
          for (int64_t p = 4; p < 8; ++p) prefetch(rows[k] + p * s.patch_stride, s.width);
      }
      add_tile(rows, s.patch_stride, frame_sums, run_sums + n * s.width, s.width);
    }
    for (; n < s.patches; ++n)
      for (int64_t k = 0; k < count; ++k)
        add_one(x[k] + n * s.patch_stride, frame_sums + k * s.width, run_sums + n * s.width, s.width);
    for (int64_t k = 0; k < count; ++k) scale(frame_sums + k * s.width, per_patch, s.temporal(index[k]), s.width);
    in_run += count;
    if (in_run >= RUN && t < s.frames) {
      add(run_sums, patch_sums, s.patches * s.width);
      std::fill_n(run_sums, s.patches * s.width, 0.0f);
      in_run = 0;
    }
  }
  add(run_sums, patch_sums, s.patches * s.width);
  for (int64_t n = 0; n < s.patches; ++n) scale(patch_sums + n * s.width, per_frame, s.spatial(n), s.width);
  for (int64_t t = s.frames; t < s.temporal_rows; ++t) std::memset(s.temporal(t), 0, s.width * sizeof(T));
}

// d features[t, n] = d temporal[t] / patches + d spatial[n] / real frames. scratch: [BLOCK + 2, width].
template <typename T>
MMFAST_INLINE void backward(const Slice<T>& s, float* scratch) {
  float *patch = scratch, *frame = scratch + BLOCK * s.width;
  T* row = reinterpret_cast<T*>(frame + s.width);
  const float per_frame = s.per_frame(), per_patch = s.per_patch();
  for (int64_t first = 0; first < s.patches; first += BLOCK) {
    const int64_t patches = std::min(BLOCK, s.patches - first);
    for (int64_t n = 0; n < patches; ++n) {
      const T* gradient = s.spatial(first + n);
#pragma omp simd
      for (int64_t d = 0; d < s.width; ++d) patch[n * s.width + d] = to_float(gradient[d]) * per_frame;
    }
    for (int64_t t = 0; t < s.frames; ++t) {
      T* out = s.features + t * s.frame_stride + first * s.patch_stride;
      const T* gradient = s.temporal(t);
#pragma omp simd
      for (int64_t d = 0; d < s.width; ++d) frame[d] = to_float(gradient[d]) * per_patch;
      for (int64_t n = 0; n < patches; ++n) {
        if (s.is_real(t)) {
#pragma omp simd
          for (int64_t d = 0; d < s.width; ++d) row[d] = from_float<T>(frame[d] + patch[n * s.width + d]);
        } else {
          std::memset(row, 0, s.width * sizeof(T));
        }
        stream(out + n * s.patch_stride, row, s.width);
      }
    }
  }
  finish_streaming();
}

// One function for each dtype, because a template cannot be cloned.
MMFAST_CLONES void forward_slice(const Slice<float>& s, float* scratch) { forward(s, scratch); }
MMFAST_CLONES void forward_slice(const Slice<Float16>& s, float* scratch) { forward(s, scratch); }
MMFAST_CLONES void forward_slice(const Slice<Bfloat16>& s, float* scratch) { forward(s, scratch); }
MMFAST_CLONES void backward_slice(const Slice<float>& s, float* scratch) { backward(s, scratch); }
MMFAST_CLONES void backward_slice(const Slice<Float16>& s, float* scratch) { backward(s, scratch); }
MMFAST_CLONES void backward_slice(const Slice<Bfloat16>& s, float* scratch) { backward(s, scratch); }

// Cuts the channels so that all threads have the same work; a sum never depends on the cut.
template <typename T, typename F>
void for_each_slice(const TensorView& features, const TensorView& pooled, const bool* real, int threads,
                    int64_t scratch_rows, F run) {
  const int64_t batch = features.size(0), frames = features.size(1), patches = features.size(2), all = features.size(3);
  if (batch * all == 0) return;
  constexpr int64_t bytes_per_thread = 128 << 10, narrowest = 128;
  const int64_t bytes = features.numel() * static_cast<int64_t>(sizeof(T));
  threads = static_cast<int>(std::clamp<int64_t>(bytes / bytes_per_thread, 1, threads));
  const int64_t even = threads / std::gcd(batch, int64_t{threads});
  const int64_t width = std::min(all, std::max(narrowest, (all / even + 63) / 64 * 64));
  const int64_t slices = (all + width - 1) / width;
  const auto scratch = std::make_unique_for_overwrite<float[]>(threads * scratch_rows * width);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < batch * slices; ++i) {
    const int64_t b = i / slices, d = i % slices * width;
    const Slice<T> slice{
        features.as<T>() + b * features.stride(0) + d, features.stride(1), features.stride(2),
        pooled.as<T>() + b * pooled.stride(0) + d,     pooled.stride(1),   pooled.size(1) - patches,
        real ? real + b * frames : nullptr,            frames,             patches,
        std::min(width, all - d)};
    run(slice, scratch.get() + omp_get_thread_num() * scratch_rows * width);
  }
}

template <typename F>
void dispatch(DType dtype, F run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::f16: return run(Float16{});
    case DType::bf16: return run(Bfloat16{});
    default: check(false, "spatio_temporal_pool: no kernel for ", name_of(dtype));
  }
}

}  // namespace

void spatio_temporal_pool_fwd_cpu(TensorView features, std::optional<TensorView> frame_mask, TensorView pooled,
                                  int threads) {
  const bool* real = check_pool(features, pooled, frame_mask);
  dispatch(features.dtype, [&](auto scalar) {
    for_each_slice<decltype(scalar)>(features, pooled, real, threads, 2 * features.size(2) + FRAMES,
                                     [](const auto& slice, float* scratch) { forward_slice(slice, scratch); });
  });
}

void spatio_temporal_pool_bwd_cpu(TensorView grad_pooled, std::optional<TensorView> frame_mask,
                                  TensorView grad_features, int threads) {
  const bool* real = check_pool(grad_features, grad_pooled, frame_mask);
  dispatch(grad_features.dtype, [&](auto scalar) {
    for_each_slice<decltype(scalar)>(grad_features, grad_pooled, real, threads, BLOCK + 2,
                                     [](const auto& slice, float* scratch) { backward_slice(slice, scratch); });
  });
}

}  // namespace mmfast
