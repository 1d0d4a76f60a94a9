// The products of a low-rank adapter: each checks its arguments, and says what it makes, where it is defined.
#pragma once

#include <optional>

#include "../tensor_view.h"

namespace mmfast {

void low_rank_read(TensorView x, std::optional<TensorView> factors, std::optional<TensorView> s, float scale,
                   std::optional<TensorView> projected, std::optional<TensorView> outer, bool add, int threads);
void low_rank_expand(TensorView s, TensorView factors, float scale, std::optional<TensorView> bias, TensorView out,
                     int threads);
void low_rank_product(TensorView x, TensorView w, TensorView s, TensorView factors, float scale,
                      std::optional<TensorView> bias, TensorView out, int threads);

// The bfloat16 form of `low_rank_read`, for which that has checked the arguments. It needs AMX.
void low_rank_read_bf16(const TensorView& x, const std::optional<TensorView>& factors,
                        const std::optional<TensorView>& s, float scale, const std::optional<TensorView>& projected,
                        const std::optional<TensorView>& outer, bool add, int threads);

}  // namespace mmfast
