// What the loops of zero_init_attention are given.
#pragma once

#include <cstdint>

#include "scalars.h"
#include "sixteen.h"

namespace mmfast::zero_init {

constexpr int64_t MOST_PROMPTS = 32, MOST_DIM = 256;

constexpr int64_t round_up(int64_t count, int64_t block = LANES) { return (count + block - 1) / block * block; }

// Rows of one head. Keys and values as tiles: *_by_dim [tiles of 16 prompts, dim, 16], keys (which are scaled) and
// values [tiles of 16 dims, prompts, 16]; zero beyond the prompts or dims.
template <typename T>
struct ForwardRows {
  const T *query, *words;
  T* out;
  int64_t query_stride, words_stride, out_stride, rows, prompts, dim;
  float act;
  const float *keys_by_dim, *values, *absent;
};

// The gradients that are null are not wanted. grad_keys, grad_values [tiles of 16 prompts, dim, 16] are added to, and
// so is grad_act.
template <typename T>
struct BackwardRows {
  const T *query, *grad;
  T* grad_query;
  int64_t query_stride, grad_stride, grad_query_stride, rows, prompts, dim;
  float act;
  float *grad_keys, *grad_values, *grad_act;
  const float *keys_by_dim, *values_by_dim, *keys, *absent;
};

// Keys or values of one head, with any strides.
struct PromptRows {
  const Bfloat16* data;
  int64_t row, column;
};

// The same in tiles of AMX, where has_amx(), for two prompts or more. Keys and values are `packed`: packed_tiles(dim)
// numbers, aligned to 64 bytes, that pack_tiles has made. What rows say of them is not read.
int64_t packed_tiles(int64_t dim);
void pack_tiles(const PromptRows& key, const PromptRows& value, int64_t prompts, int64_t dim, Bfloat16* to);
void forward_tiles(const ForwardRows<Bfloat16>& rows, const Bfloat16* packed, float scale);
void backward_tiles(const BackwardRows<Bfloat16>& rows, const Bfloat16* packed, float scale);

}  // namespace mmfast::zero_init
