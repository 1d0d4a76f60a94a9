// The products with a quantised weight in fp32, for which quantized_product.cpp has checked the arguments. They need
// AVX-512.
#pragma once

#include "../tensor_view.h"

namespace mmfast {

// out = x times the transpose of W (`forward`) or W, + bias if that is not null, or += with `add`. Rows: see
// quantized_rows.h.
template <typename Rows>
void multiply_f32(const Rows& weight, bool forward, const TensorView& x, const TensorView& out, const float* bias,
                  bool add, int threads);

}  // namespace mmfast
