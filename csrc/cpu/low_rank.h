// The bfloat16 form of `low_rank_read`, for which low_rank.cpp has checked the arguments. It needs AMX.
#pragma once

#include <optional>

#include "../tensor_view.h"

namespace mmfast {

void low_rank_read_bf16(const TensorView& x, const std::optional<TensorView>& factors,
                        const std::optional<TensorView>& s, float scale, const std::optional<TensorView>& projected,
                        const std::optional<TensorView>& outer, bool add, int threads);

}  // namespace mmfast
