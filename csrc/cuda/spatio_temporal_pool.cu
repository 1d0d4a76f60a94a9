// Spatio-temporal pooling. Rows: T' temporal ones, of which T are frames, then N spatial ones.
// A thread block owns one sample, a block of patches, 128 bytes of channels and a chunk of rows. Forward reads the
// features once, with the sums of its patches in registers; where one thread block does not see all patches
// (frames) of a sample it writes fp32 parts, which a second kernel adds in a fixed order.
#include <algorithm>
#include <optional>
#include <utility>

#include "../spatio_temporal_pool.h"
#include "launch.h"

namespace mmfast {
namespace {

constexpr int THREADS = 256;
constexpr int LANES = 8;  // threads along the channels, 16 bytes each
constexpr int ROWS = THREADS / LANES;
constexpr int PATCHES_PER_THREAD = 8;
constexpr int PATCHES = ROWS * PATCHES_PER_THREAD;
constexpr int LOADS = 4;  // in flight in a thread: all eight would spill
constexpr int WARPS = THREADS / 32;

template <typename T>
constexpr int WIDTH = 16 / sizeof(T);  // channels of a thread

int64_t width_of(const TensorView& tensor) { return tensor.dtype == DType::f32 ? WIDTH<float> : WIDTH<__half>; }

// How samples are cut among thread blocks; grid: B × chunks × patch blocks × channel blocks.
struct Cut {
  int64_t frames, rows, patches, channels;
  int64_t channel_blocks, patch_blocks, chunks, chunk_rows;

  bool split() const { return patch_blocks * chunks > 1; }
};

// As many chunks of rows as it takes to give every processor two thread blocks.
Cut cut(const TensorView& features, int64_t rows) {
  Cut c{features.size(1), rows, features.size(2), features.size(3)};
  c.channel_blocks = ceil_div(c.channels, LANES * width_of(features));
  c.patch_blocks = std::max<int64_t>(ceil_div(c.patches, PATCHES), 1);
  const int64_t blocks = features.size(0) * c.patch_blocks * c.channel_blocks;
  const int64_t wanted = ceil_div(2 * processor_count(), std::max<int64_t>(blocks, 1));
  // Parts of the spatial means cost traffic: eight rows at least for each.
  c.chunk_rows = std::max({ceil_div(rows, wanted), std::min<int64_t>(rows, 8), int64_t{1}});
  c.chunks = std::max<int64_t>(ceil_div(rows, c.chunk_rows), 1);
  return c;
}

// Where this thread stands: patches `patch`, `patch` + ROWS, … of which the first `patches` exist.
struct Position {
  int64_t b, patch_block, chunk, first_row, last_row, patch, channel;
  int patches;
};

template <typename T>
__device__ Position position(const Cut& c) {
  Position p;
  int64_t i = blockIdx.x;
  p.channel = (i % c.channel_blocks * LANES + threadIdx.x % LANES) * WIDTH<T>;
  i /= c.channel_blocks;
  p.patch_block = i % c.patch_blocks;
  p.patch = p.patch_block * PATCHES + threadIdx.x / LANES;
  const int64_t left = ceil_div(c.patches - p.patch, ROWS);
  p.patches = static_cast<int>(left < 0 ? 0 : left < PATCHES_PER_THREAD ? left : PATCHES_PER_THREAD);
  i /= c.patch_blocks;
  p.chunk = i % c.chunks;
  p.b = i / c.chunks;
  p.first_row = p.chunk * c.chunk_rows;
  p.last_row = p.first_row + c.chunk_rows < c.rows ? p.first_row + c.chunk_rows : c.rows;
  return p;
}

// 1 / (real frames of the sample), or 1 if there are none; every thread of the block must call it.
__device__ float per_frame(const bool* real, int64_t frames) {
  int64_t count = real ? 0 : frames;
  if (real)
    for (int64_t first = 0; first < frames; first += THREADS) {
      const int64_t t = first + threadIdx.x;
      count += __syncthreads_count(t < frames && real[t]);
    }
  return 1.0f / static_cast<float>(count > 0 ? count : 1);
}

// Out is T if the means are complete, else float. temporal: [B, patch blocks, T', D]; spatial: [B, chunks, N, D].
template <typename T, typename Out>
__global__ void __launch_bounds__(THREADS, 2)
    forward_kernel(Cut c, const T* features, int64_t stride_b, int64_t stride_t, int64_t stride_n, const bool* real,
                   Out* temporal, int64_t temporal_b, int64_t temporal_k, Out* spatial, int64_t spatial_b,
                   int64_t spatial_k) {
  constexpr int V = WIDTH<T>;
  const Position p = position<T>(c);
  if (real) real += p.b * c.frames;
  const float over_frames = per_frame(real, c.frames);
  const float over_patches = 1.0f / static_cast<float>(c.patches > 0 ? c.patches : 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The first LANES · V threads add up one channel each over the warps.
  const int64_t my_channel = p.channel - threadIdx.x % LANES * V + threadIdx.x;
  const bool adds = threadIdx.x < LANES * V && my_channel < c.channels;

  __shared__ float frame_sums[2][WARPS][LANES * V];
  float sums[PATCHES_PER_THREAD][V] = {};
  features += p.b * stride_b + p.first_row * stride_t + p.patch * stride_n + p.channel;
  temporal += p.b * temporal_b + p.patch_block * temporal_k + p.first_row * c.channels + my_channel;

  for (int64_t t = p.first_row; t < p.last_row; ++t, features += stride_t, temporal += c.channels) {
    const bool is_real = t < c.frames && (!real || real[t]) && p.channel < c.channels;
    const T* row = features;
    float frame[V] = {};
#pragma unroll
    for (int half = 0; half < PATCHES_PER_THREAD; half += LOADS) {
      Vector<T, V> x[LOADS];
#pragma unroll
      for (int j = 0; j < LOADS; ++j, row += ROWS * stride_n) {
        x[j] = {};
        if (is_real && half + j < p.patches) x[j] = *reinterpret_cast<const Vector<T, V>*>(row);
      }
#pragma unroll
      for (int j = 0; j < LOADS; ++j)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[half + j][v] += to_float(x[j].at[v]);
          frame[v] += to_float(x[j].at[v]);
        }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      frame[v] += __shfl_xor_sync(0xffffffff, frame[v], 8);
      frame[v] += __shfl_xor_sync(0xffffffff, frame[v], 16);
    }
    // Two buffers: one barrier a row is enough, for who writes this buffer again has passed the next barrier.
    auto& buffer = frame_sums[(t - p.first_row) % 2];
    if (lane < LANES)
#pragma unroll
      for (int v = 0; v < V; ++v) buffer[warp][lane * V + v] = frame[v];
    __syncthreads();
    if (adds) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) total += buffer[w][threadIdx.x];
      *temporal = from_float<Out>(total * over_patches);
    }
  }

  if (p.channel >= c.channels) return;
  spatial += p.b * spatial_b + p.chunk * spatial_k + p.patch * c.channels + p.channel;
#pragma unroll
  for (int j = 0; j < PATCHES_PER_THREAD; ++j) {
    if (j >= p.patches) break;
    Vector<Out, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.at[v] = from_float<Out>(sums[j][v] * over_frames);
    *reinterpret_cast<Vector<Out, V>*>(spatial + j * ROWS * c.channels) = out;
  }
}

// A thread adds the parts of four channels of one row.
template <typename T>
__global__ void add_parts_kernel(Cut c, const float* temporal, const float* spatial, T* pooled, int64_t count) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * 4;
  if (i >= count) return;
  const int64_t channel = i % c.channels, row = i / c.channels % (c.rows + c.patches);
  const int64_t b = i / c.channels / (c.rows + c.patches);
  const bool is_temporal = row < c.rows;
  const int64_t parts = is_temporal ? c.patch_blocks : c.chunks, length = is_temporal ? c.rows : c.patches;
  const float* part = (is_temporal ? temporal : spatial) +
                      (b * parts * length + (is_temporal ? row : row - c.rows)) * c.channels + channel;
  float total[4] = {};
  for (int64_t k = 0; k < parts; ++k) {
    const auto x = *reinterpret_cast<const Vector<float, 4>*>(part + k * length * c.channels);
#pragma unroll
    for (int v = 0; v < 4; ++v) total[v] += x.at[v];
  }
  Vector<T, 4> out;
#pragma unroll
  for (int v = 0; v < 4; ++v) out.at[v] = from_float<T>(total[v]);
  *reinterpret_cast<Vector<T, 4>*>(pooled + i) = out;
}

// A thread keeps the gradients of its spatial rows and writes those of its frames, each once.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    backward_kernel(Cut c, const T* grad_pooled, int64_t pooled_rows, const bool* real, T* grad_features) {
  constexpr int V = WIDTH<T>;
  const Position p = position<T>(c);
  if (real) real += p.b * c.frames;
  const float over_frames = per_frame(real, c.frames);
  const float over_patches = 1.0f / static_cast<float>(c.patches > 0 ? c.patches : 1);
  if (p.channel >= c.channels) return;

  grad_pooled += p.b * pooled_rows * c.channels + p.channel;
  const T* grad_spatial = grad_pooled + (pooled_rows - c.patches + p.patch) * c.channels;
  float spatial[PATCHES_PER_THREAD][V];
#pragma unroll
  for (int j = 0; j < PATCHES_PER_THREAD; ++j) {
    Vector<T, V> gradient = {};
    if (j < p.patches) gradient = *reinterpret_cast<const Vector<T, V>*>(grad_spatial + j * ROWS * c.channels);
#pragma unroll
    for (int v = 0; v < V; ++v) spatial[j][v] = to_float(gradient.at[v]) * over_frames;
  }
  for (int64_t t = p.first_row; t < p.last_row; ++t) {
    const bool is_real = !real || real[t];
    const auto temporal = *reinterpret_cast<const Vector<T, V>*>(grad_pooled + t * c.channels);
    T* out = grad_features + ((p.b * c.frames + t) * c.patches + p.patch) * c.channels + p.channel;
#pragma unroll
    for (int j = 0; j < PATCHES_PER_THREAD; ++j) {
      if (j >= p.patches) break;
      Vector<T, V> gradient;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float sum = spatial[j][v] + to_float(temporal.at[v]) * over_patches;
        gradient.at[v] = from_float<T>(is_real ? sum : 0.0f);
      }
      *reinterpret_cast<Vector<T, V>*>(out + j * ROWS * c.channels) = gradient;
    }
  }
}

template <typename F>
void dispatch(DType dtype, F run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::f16: return run(__half{});
    case DType::bf16: return run(__nv_bfloat16{});
    default: check(false, "spatio_temporal_pool: no kernel for ", name_of(dtype));
  }
}

// Every row must start at a multiple of 16 bytes.
void check_alignment(const TensorView& tensor) {
  const int64_t width = width_of(tensor);
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.shape.back() % width == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) aligned = aligned && tensor.stride(i) % width == 0;
  check(aligned, "spatio_temporal_pool: rows of ", tensor, " do not start at multiples of 16 bytes");
}

unsigned blocks(int64_t count) {
  check(count <= 0x7fffffff, "spatio_temporal_pool: too large for one launch");
  return static_cast<unsigned>(count);
}

unsigned grid(const Cut& c, int64_t batch) { return blocks(batch * c.chunks * c.patch_blocks * c.channel_blocks); }

}  // namespace

// How many fp32 parts forward needs: {patch blocks, chunks}; {1, 1}: none.
std::pair<int64_t, int64_t> spatio_temporal_pool_parts_cuda(TensorView features, int64_t rows) {
  const Cut c = cut(features, rows);
  return {c.patch_blocks, c.chunks};
}

// temporal [B, patch blocks, T', D], spatial [B, chunks, N, D]: fp32, not read where there is one part only.
void spatio_temporal_pool_fwd_cuda(TensorView features, std::optional<TensorView> frame_mask, TensorView pooled,
                                   TensorView temporal, TensorView spatial, uintptr_t stream_address) {
  const bool* real = check_pool(features, pooled, frame_mask);
  check_alignment(features);
  check_alignment(pooled);
  if (pooled.numel() == 0) return;
  const int64_t batch = features.size(0), patches = features.size(2), channels = features.size(3);
  const int64_t rows = pooled.size(1) - patches;
  const Cut c = cut(features, rows);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  if (c.split()) {
    temporal.expect("temporal", DType::f32, {batch, c.patch_blocks, rows, channels});
    spatial.expect("spatial", DType::f32, {batch, c.chunks, patches, channels});
  }
  dispatch(features.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto forward = [&](auto* temporal_out, int64_t temporal_k, auto* spatial_out, int64_t spatial_k) {
      const int64_t whole = c.split() ? 0 : pooled.stride(0);
      forward_kernel<T><<<grid(c, batch), THREADS, 0, stream>>>(
          c, features.as<T>(), features.stride(0), features.stride(1), features.stride(2), real, temporal_out,
          whole + c.patch_blocks * temporal_k, temporal_k, spatial_out, whole + c.chunks * spatial_k, spatial_k);
      check_cuda(cudaGetLastError(), "spatio_temporal_pool forward");
    };
    if (!c.split()) return forward(pooled.as<T>(), 0, pooled.as<T>() + rows * channels, 0);
    forward(temporal.as<float>(), rows * channels, spatial.as<float>(), patches * channels);
    add_parts_kernel<<<blocks(ceil_div(pooled.numel(), 4 * THREADS)), THREADS, 0, stream>>>(
        c, temporal.as<float>(), spatial.as<float>(), pooled.as<T>(), pooled.numel());
    check_cuda(cudaGetLastError(), "spatio_temporal_pool forward, adding parts");
  });
}

void spatio_temporal_pool_bwd_cuda(TensorView grad_pooled, std::optional<TensorView> frame_mask,
                                   TensorView grad_features, uintptr_t stream_address) {
  const bool* real = check_pool(grad_features, grad_pooled, frame_mask);
  check_alignment(grad_features);
  check_alignment(grad_pooled);
  if (grad_features.numel() == 0) return;
  const Cut c = cut(grad_features, grad_features.size(1));
  dispatch(grad_features.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    backward_kernel<<<grid(c, grad_features.size(0)), THREADS, 0, reinterpret_cast<cudaStream_t>(stream_address)>>>(
        c, grad_pooled.as<T>(), grad_pooled.size(1), real, grad_features.as<T>());
  });
  check_cuda(cudaGetLastError(), "spatio_temporal_pool backward");
}

}  // namespace mmfast
