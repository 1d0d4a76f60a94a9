// All that is around the large product of a packed LoRA linear, or with the weight that product too, in one call each way:
// what runs in Python between two products that empty the caches is read from memory, which takes as long as a pass.
#include <memory>
#include <optional>
#include <utility>

#include "../tensor_view.h"
#include "low_rank.h"
#include "matrix.h"
#include "scalars.h"
#include "sgemm.h"

namespace mmfast {
namespace {

TensorView transposed(TensorView matrix) {
  std::swap(matrix.shape[0], matrix.shape[1]);
  std::swap(matrix.strides[0], matrix.strides[1]);
  return matrix;
}

std::optional<TensorView> transposed(std::optional<TensorView> matrix) {
  if (matrix) matrix = transposed(*std::move(matrix));
  return matrix;
}

// A sum in fp32 of the size of a gradient: itself, or what it is rounded from at the end.
class Sum {
 public:
  explicit Sum(const std::optional<TensorView>& gradient) : gradient(gradient) {
    if (!gradient || gradient->dtype == DType::f32) return;
    check(gradient->dtype == DType::bf16 && gradient->is_contiguous(), "lora_linear: a gradient is ", *gradient,
          "; expected float32 or packed bfloat16");
    memory = std::make_unique_for_overwrite<float[]>(gradient->numel());
  }
  std::optional<TensorView> view() const {
    std::optional<TensorView> found = gradient;
    if (memory) found->data = memory.get(), found->dtype = DType::f32;
    return found;
  }
  void round() const {
    for (int64_t i = 0; memory && i < gradient->numel(); ++i)
      gradient->as<Bfloat16>()[i] = from_float<Bfloat16>(memory[i]);
  }

 private:
  const std::optional<TensorView>& gradient;
  std::unique_ptr<float[]> memory;
};

}  // namespace

// s [rows, R] = x aᵀ, and out [..., N] = scaling · s bᵀ + bias, to which the caller adds x Wᵀ; with weight it is added
// here: `in_tiles` (fp32 or bfloat16, with AMX), else by SGEMM (fp32, where `has_sgemm`). Of x [..., K], weight [N, K],
// a [R, K], b [N, R] and bias [N].
void lora_linear_fwd_cpu(TensorView x, std::optional<TensorView> weight, TensorView a, TensorView b, float scaling,
                         std::optional<TensorView> bias, TensorView s, TensorView out, bool in_tiles, int threads) {
  to_matrix(x), to_matrix(out);
  low_rank_read(x, a, std::nullopt, 1.0f, s, std::nullopt, false, threads);
  if (weight && in_tiles)
    return low_rank_product(x, transposed(*std::move(weight)), s, transposed(b), scaling, bias, out, threads);
  low_rank_expand(s, transposed(b), scaling, bias, out, threads);
  if (weight) sgemm_add(x, *weight, true, out);
}

// With ds [rows, R] = scaling · grad b: grad_b [N, R] = scaling · gradᵀ s and grad_a [R, K] = dsᵀ x, summed in fp32 and of
// that or, rounded once, of bfloat16; and grad_x [..., K] = ds a, to which the caller adds grad W, or with weight this;
// each that is given.
void lora_linear_bwd_cpu(TensorView grad, std::optional<TensorView> x, std::optional<TensorView> s,
                         std::optional<TensorView> weight, TensorView a, TensorView b, float scaling,
                         std::optional<TensorView> grad_x, std::optional<TensorView> grad_a,
                         std::optional<TensorView> grad_b, bool in_tiles, int threads) {
  to_matrix(grad), to_matrix(x), to_matrix(grad_x);
  const int64_t rows = grad.size(0), ranks = a.size(0);
  const auto memory = std::make_unique_for_overwrite<float[]>(rows * ranks);  // enough for either dtype
  const TensorView ds{memory.get(), grad.dtype, {rows, ranks}, {ranks, 1}};
  const Sum sum_a(grad_a), sum_b(grad_b);
  low_rank_read(grad, transposed(b), grad_b ? s : std::nullopt, scaling, ds, transposed(sum_b.view()), false, threads);
  sum_b.round();
  if (grad_a) {
    check(x.has_value(), "lora_linear: grad_a needs x");
    low_rank_read(*x, std::nullopt, ds, 1.0f, std::nullopt, sum_a.view(), false, threads);
    sum_a.round();
  }
  if (!grad_x) return;
  if (weight && in_tiles)
    return low_rank_product(grad, *weight, ds, a, 1.0f, std::nullopt, *grad_x, threads);
  low_rank_expand(ds, a, 1.0f, std::nullopt, *grad_x, threads);
  if (weight) sgemm_add(grad, *weight, false, *grad_x);
}

}  // namespace mmfast
