// Products of fp32 matrices on CPUs with AMX.
#pragma once

#include <optional>

#include "../tensor_view.h"

namespace mmfast {

// scale · s factors, for s [rows, ranks] and factors [ranks, columns].
struct LowRank {
  TensorView s, factors;
  float scale;
};

// out [rows, columns] = x w + the low-rank product + bias, or += with `add`, for x [rows, depth], w [depth, columns] and
// bias [columns], all fp32. x, s and out have stride 1 in their last dimension, w and factors in one of theirs. For each
// row of x and column of w an error is at most some 2^-22 of the product of their norms; infinity and NaN go where fp32
// takes them. Results are the same for any number of threads.
void product_f32(const TensorView& x, const TensorView& w, const std::optional<LowRank>& low_rank,
                 const std::optional<TensorView>& bias, bool add, const TensorView& out, int threads);

}  // namespace mmfast
