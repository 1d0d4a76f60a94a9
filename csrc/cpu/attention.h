// Attention of some queries of one head to some of its keys, and its gradients: what the attention ops share. A tile of
// scores has the keys as rows and the queries side by side, so that nothing of a tile is transposed; scores stay in L2.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>

#include "../tensor_view.h"
#include "scalars.h"

namespace mmfast::attention {

constexpr int64_t TILE = 64;  // queries, or keys, that are worked on together
// What dimensions are filled up to, which are lanes of vectors as queries are.
constexpr int64_t BLOCK = 32;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t count, int64_t block = BLOCK) { return (count + block - 1) / block * block; }

// Refuses an x that is not [B, H, rows, D] of `sizes`.
template <typename Sizes>
void expect_heads(const char* op, const Sizes& sizes, const char* name, const TensorView& x, DType dtype,
                  int64_t rows) {
  check(x.dtype == dtype && x.dim() == 4 && x.size(0) == sizes.batch && x.size(1) == sizes.heads &&
            x.size(2) == rows && x.size(3) == sizes.dim && (sizes.dim <= 1 || x.stride(3) == 1),
        op, ": ", name, " is ", x, "; expected ", name_of(dtype), "[", sizes.batch, ", ", sizes.heads, ", ", rows, ", ",
        sizes.dim, "] with stride 1 in the last dimension");
}
template <typename Sizes>
void expect_heads(const char* op, const Sizes& sizes, const char* name, const std::optional<TensorView>& x,
                  DType dtype, int64_t rows) {
  if (x) expect_heads(op, sizes, name, *x, dtype, rows);
}

// One head: rows of numbers, or those rows of it that `order` names.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  const int64_t* order = nullptr;

  MMFAST_INLINE T* row(int64_t i) const { return data + (order ? order[i] : i) * stride; }
  explicit operator bool() const { return data != nullptr; }
};

// A head of x [B, H, rows, dim], from a row on or in an order.
template <typename T>
Rows<T> rows_of(const TensorView& x, int64_t sample, int64_t head, int64_t first = 0, const int64_t* order = nullptr) {
  using Value = std::remove_const_t<T>;
  return {x.as<Value>() + sample * x.stride(0) + head * x.stride(1) + first * x.stride(2), x.stride(2), order};
}
template <typename T>
Rows<T> rows_of(const std::optional<TensorView>& x, int64_t sample, int64_t head, const int64_t* order = nullptr) {
  return x ? rows_of<T>(*x, sample, head, 0, order) : Rows<T>{};
}

// Keys and values first .. last of one head; gradients that are null are not wanted.
template <typename T>
struct Segment {
  Rows<const T> key, value;
  Rows<T> grad_key, grad_value;
  const bool* real = nullptr;  // null: all are
  int64_t first = 0, last = 0;
  int64_t first_query = 0;  // backward: those before it do not see these keys...
  bool causal = false;      // ...nor does query q those after key q, of whole heads
  // Backward, of whole heads: [keys in whole tiles, width], to which gradients are added; the sums are written to
  // grad_key and grad_value where these are given too. Null: gradients start from zero.
  float *key_sums = nullptr, *value_sums = nullptr;

  MMFAST_INLINE bool is_real(int64_t n) const { return !real || real[n]; }
  bool needs_key() const { return grad_key || key_sums; }
  bool needs_value() const { return grad_value || value_sums; }
  // The first query that sees key n.
  MMFAST_INLINE int64_t first_that_sees(int64_t n) const { return first_query + (causal ? n : 0); }
};

// Queries of one head of one sample, and the keys that one task takes.
template <typename T>
struct Head {
  Rows<const T> query, out, grad_out;
  const Segment<T>* segments;
  int64_t segment_count;
  float scale;
  int64_t queries, dim;  // forward: TILE queries at most
  Rows<const float> lse;
  bool add_query = false;  // backward: the gradient of the queries is added to what grad_query has

  const Segment<T>* begin() const { return segments; }
  const Segment<T>* end() const { return segments + segment_count; }
};

// Memory that a thread takes its tiles from, anew for each task.
struct Scratch {
  std::unique_ptr<float[]> data;
  float* next;

  explicit Scratch(int64_t count) : data(new float[count + 16]) { reset(); }
  void reset() { next = data.get() + (64 - reinterpret_cast<uintptr_t>(data.get()) % 64) % 64 / sizeof(float); }
  float* take(int64_t count) {
    float* found = next;
    next += count;
    return found;
  }
};

// Where the gradients of `rows` keys from `first` on are summed: among `sums`, or else in `tile`, cleared.
inline float* sums_of(float* sums, int64_t first, int64_t rows, int64_t width, float* tile) {
  if (sums) return sums + first * width;
  std::memset(tile, 0, rows * width * sizeof(float));
  return tile;
}

inline int64_t forward_scratch(int64_t dim) { return 4 * TILE * round_up(dim) + 2 * TILE * TILE + 3 * TILE; }

inline int64_t backward_scratch(int64_t queries, int64_t dim) {
  const int64_t tiles = (queries + TILE - 1) / TILE;
  return (5 * tiles + 4) * TILE * round_up(dim) + 8 * TILE * TILE + 2 * tiles * TILE;
}

// The loops as they are compiled for one kind of CPU.
template <typename T>
struct Kernels {
  // out [queries, dim] and lse [queries] of these keys alone: zeros and -inf if there are none.
  void (*forward)(const Head<T>&, Scratch&, Rows<T> out, Rows<float> lse);
  void (*forward_part)(const Head<T>&, Scratch&, Rows<float> out, Rows<float> lse);
  // The gradients of the keys and values that the segments ask for. That of the queries, if wanted, goes into
  // grad_query or, if that is null, into part [queries, dim].
  void (*backward)(const Head<T>&, Scratch&, Rows<T> grad_query, float* part);
};

// Those for the widest vectors that this CPU has, of `bits` at most; for float, Float16 and Bfloat16. A tile of AMX is a
// vector of TILE_BITS.
template <typename T>
const Kernels<T>& kernels(int bits);

// Those in tiles of AMX; null where there are none.
const Kernels<Bfloat16>* amx_kernels();

}  // namespace mmfast::attention
