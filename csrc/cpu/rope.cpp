// Rotary position embedding of queries and keys, and its adjoint: one pass, token by token, in any layout of the heads.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tensor_view.h"
#include "matrix.h"
#include "scalars.h"

namespace mmfast {
namespace {

constexpr const char* OP = "rope";

// The heads of one token, each of 2 · half packed elements.
template <typename X, typename C, typename Y>
struct Token {
  const X* from;
  Y* to;
  int64_t from_stride, to_stride, heads, half;
  const C *cos, *sin;
};

// to = x · cos + rotate_half(x) · sin, where rotate_half gives (-second half, first half); or, of a gradient,
// grad · cos + rotate_halfᵀ(grad · sin). Products are rounded to C, as PyTorch's are.
template <bool ADJOINT, typename X, typename C, typename Y>
MMFAST_INLINE void rotate(const Token<X, C, Y>& t) {
  const int64_t half = t.half;
  const C *cos1 = t.cos, *cos2 = cos1 + half, *sin1 = t.sin, *sin2 = sin1 + half;
  for (int64_t h = 0; h < t.heads; ++h) {
    const X *x1 = t.from + h * t.from_stride, *x2 = x1 + half;
    Y *y1 = t.to + h * t.to_stride, *y2 = y1 + half;
#pragma omp simd
    for (int64_t d = 0; d < half; ++d) {
      const float a = to_float(x1[d]), b = to_float(x2[d]), s1 = to_float(sin1[d]), s2 = to_float(sin2[d]);
      const float b_turned = round_to<C>(b * (ADJOINT ? s2 : -s1)), a_turned = round_to<C>(a * (ADJOINT ? -s1 : s2));
      y1[d] = from_float<Y>(round_to<C>(a * to_float(cos1[d])) + b_turned);
      y2[d] = from_float<Y>(round_to<C>(b * to_float(cos2[d])) + a_turned);
    }
  }
}

// One function for each combination of dtypes, because a template cannot be cloned. C is the wider of the two others.
#define MMFAST_ROTATE(X, C, Y)                                                  \
  MMFAST_CLONES void rotate_token(const Token<X, C, Y>& token, bool adjoint) { \
    adjoint ? rotate<true>(token) : rotate<false>(token);                       \
  }

MMFAST_ROTATE(float, float, float)
MMFAST_ROTATE(Float16, Float16, Float16)
MMFAST_ROTATE(Float16, float, float)
MMFAST_ROTATE(float, float, Float16)
MMFAST_ROTATE(Bfloat16, Bfloat16, Bfloat16)
MMFAST_ROTATE(Bfloat16, float, float)
MMFAST_ROTATE(float, float, Bfloat16)

}  // namespace

// from, to: as many tensors [B, heads, L, D], of one shape in pairs; cos, sin [B or 1, L, D]. Any strides but the last,
// which is 1. Dtypes: all one; or cos and sin f32, and from or to as well.
void rope_cpu(std::vector<TensorView> from, TensorView cos, TensorView sin, std::vector<TensorView> to, bool adjoint,
              int threads) {
  check(!from.empty() && from.size() == to.size(), "rope: ", from.size(), " tensors and ", to.size(), " results");
  check(cos.dim() == 3 && cos.size(2) % 2 == 0, "rope: cos is ", cos, "; expected [B, L, D], D even");
  check(sin.dtype == cos.dtype && sin.shape == cos.shape, "rope: sin is ", sin, " and cos ", cos, "; expected the same");
  const int64_t batch = from[0].size(0), length = cos.size(1), width = cos.size(2);
  check(cos.size(0) == batch || cos.size(0) == 1, "rope: cos is ", cos, " for ", from[0]);
  int64_t elements = 0;
  const auto check_heads = [&](const TensorView& view, const TensorView& like) {
    check(view.dim() == 4 && view.shape == like.shape && view.size(0) == batch && view.size(2) == length &&
              view.size(3) == width && (width <= 1 || view.stride(3) == 1),
          "rope: a tensor is ", view, "; expected [", batch, ", heads, ", length, ", ", width, "], packed rows");
  };
  check(width == 0 || (cos.stride(2) == 1 && sin.stride(2) == 1), "rope: cos and sin must have packed rows");
  for (size_t i = 0; i < from.size(); ++i) {
    check_heads(from[i], from[i]);
    check_heads(to[i], from[i]);
    check(from[i].dtype == from[0].dtype && to[i].dtype == to[0].dtype, "rope: tensors of several dtypes");
    elements += from[i].numel();
  }
  if (elements == 0) return;
  const DType x = from[0].dtype, c = cos.dtype, y = to[0].dtype;
  check((x == c || c == DType::f32) && (y == c || (c == DType::f32 && (x == c || x == y))) && (x == c || y == c),
        "rope: from is ", name_of(x), ", cos ", name_of(c), " and to ", name_of(y), "; expected one dtype, or float32");
  threads = worthwhile_threads(elements, threads);

  const auto run = [&](auto x_scalar, auto c_scalar, auto y_scalar) {
    using X = decltype(x_scalar);
    using C = decltype(c_scalar);
    using Y = decltype(y_scalar);
    const int64_t cos_batch = cos.size(0) == 1 ? 0 : cos.stride(0), sin_batch = sin.size(0) == 1 ? 0 : sin.stride(0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < batch * length; ++i) {
      const int64_t b = i / length, l = i % length;
      for (size_t n = 0; n < from.size(); ++n) {
        const TensorView &source = from[n], &target = to[n];
        rotate_token(Token<X, C, Y>{source.as<X>() + b * source.stride(0) + l * source.stride(2),
                                    target.as<Y>() + b * target.stride(0) + l * target.stride(2), source.stride(1),
                                    target.stride(1), source.size(1), width / 2,
                                    cos.as<C>() + b * cos_batch + l * cos.stride(1),
                                    sin.as<C>() + b * sin_batch + l * sin.stride(1)},
                     adjoint);
      }
    }
  };
  with_scalar(OP, x == c ? y : x, [&](auto scalar) {
    if (x == y) return run(scalar, scalar, scalar);
    if (x == c) return run(float{}, float{}, scalar);
    run(scalar, float{}, float{});
  });
}

}  // namespace mmfast
