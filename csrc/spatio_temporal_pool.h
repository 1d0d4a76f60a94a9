// What the kernels of spatio_temporal_pool demand of their arguments, on the CPU and on the GPU.
#pragma once

#include <optional>

#include "tensor_view.h"

namespace mmfast {

// features [B, T, N, D] of any strides but the last, pooled [B, T' + N, D] with T' >= T, or their gradients.
// Returns the mask's address, null without a mask.
inline const bool* check_pool(const TensorView& features, const TensorView& pooled,
                              const std::optional<TensorView>& frame_mask) {
  const char* const op = "spatio_temporal_pool: ";
  check(features.dim() == 4 && (features.size(3) <= 1 || features.stride(3) == 1),
        op, "features are ", features, "; expected [B, T, N, D] with stride 1 in the last dimension");
  check(pooled.dim() == 3 && pooled.size(1) >= features.size(1) + features.size(2),
        op, "pooled is ", pooled, "; expected [B, T' + N, D] for features ", features);
  pooled.expect("pooled", features.dtype, {features.size(0), pooled.size(1), features.size(3)});
  if (!frame_mask) return nullptr;
  frame_mask->expect("frame_mask", DType::boolean, {features.size(0), features.size(1)});
  return frame_mask->as<bool>();
}

}  // namespace mmfast
