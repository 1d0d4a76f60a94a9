// Softmax cross entropy of rows of logits, and its gradient written over them: the part of
// linear_cross_entropy that is not a matrix product. Traffic: a row is read three times, from cache
// after the first, and written once.
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "../tensor_view.h"
#include "exponential.h"

namespace mmfast {
namespace {

struct RowResult {
  float loss;
  bool correct;  // the label is the first index with the largest logit
};

// loss = log Σ exp(x) - x[label] - smoothing · mean(x - x[label]); gradient = scale · d loss / d x.
template <typename T>
MMFAST_INLINE RowResult row(T* logits, int vocabulary, int label, float smoothing, float scale, bool write_gradient) {
  const float target = to_float(logits[label]);
  float largest = -std::numeric_limits<float>::infinity();
  float above_target = 0.0f;
  int beaten = 0;
#pragma omp simd reduction(max : largest) reduction(+ : above_target, beaten)
  for (int j = 0; j < vocabulary; ++j) {
    const float x = to_float(logits[j]);
    largest = x > largest ? x : largest;
    above_target += x - target;
    beaten += (x > target) | ((x == target) & (j < label));
  }

  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < vocabulary; ++j) sum += exp_nonpositive(to_float(logits[j]) - largest);
  float loss = (largest - target) + std::log(sum);
  if (smoothing > 0.0f) loss -= smoothing * above_target / vocabulary;  // a logit of -inf must not make 0 * inf

  if (write_gradient) {
    const float per_weight = scale / sum;
    const float uniform = scale * smoothing / vocabulary;
#pragma omp simd
    for (int j = 0; j < vocabulary; ++j)
      logits[j] = from_float<T>(exp_nonpositive(to_float(logits[j]) - largest) * per_weight - uniform);
    logits[label] =
        from_float<T>(exp_nonpositive(target - largest) * per_weight - uniform - scale * (1.0f - smoothing));
  }
  return {loss, beaten == 0};
}

// One function for each dtype, because a template cannot be cloned.
MMFAST_CLONES RowResult row_f32(float* x, int v, int label, float smoothing, float scale, bool write) {
  return row(x, v, label, smoothing, scale, write);
}
MMFAST_CLONES RowResult row_f16(Float16* x, int v, int label, float smoothing, float scale, bool write) {
  return row(x, v, label, smoothing, scale, write);
}
MMFAST_CLONES RowResult row_bf16(Bfloat16* x, int v, int label, float smoothing, float scale, bool write) {
  return row(x, v, label, smoothing, scale, write);
}

}  // namespace

// logits [rows, vocabulary], f32, f16 or bf16: overwritten by the gradient if write_gradient; labels [rows] i64;
// scale [rows] f32, a factor on each row's gradient, 1 if absent; losses [rows] f32 and correct [rows] bool: output.
void linear_cross_entropy_rows(TensorView logits, TensorView labels, std::optional<TensorView> scale,
                               float smoothing, bool write_gradient, TensorView losses, TensorView correct) {
  check(logits.dim() == 2 && logits.is_contiguous(), "logits must be two-dimensional and contiguous");
  check(logits.size(1) <= std::numeric_limits<int>::max(), "the vocabulary must have fewer than 2^31 entries");
  const int64_t rows = logits.size(0);
  const int vocabulary = static_cast<int>(logits.size(1));
  labels.expect("labels", DType::i64, {rows});
  losses.expect("losses", DType::f32, {rows});
  correct.expect("correct", DType::boolean, {rows});
  if (scale) scale->expect("scale", DType::f32, {rows});

  const int64_t* label = labels.as<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    if (label[i] < 0 || label[i] >= vocabulary)
      throw std::out_of_range("linear_cross_entropy: label " + std::to_string(label[i]) + " is outside [0, " +
                              std::to_string(vocabulary) + "), the rows of weight, and is not ignore_index");

  const auto run = [&](auto* data, auto* row_function) {
#pragma omp parallel for schedule(static) if (rows * vocabulary > 32768)
    for (int64_t i = 0; i < rows; ++i) {
      const float factor = scale ? scale->as<float>()[i] : 1.0f;
      const RowResult result = row_function(data + i * vocabulary, vocabulary, static_cast<int>(label[i]), smoothing,
                                            factor, write_gradient);
      losses.as<float>()[i] = result.loss;
      correct.as<bool>()[i] = result.correct;
    }
  };
  switch (logits.dtype) {
    case DType::f32: return run(logits.as<float>(), &row_f32);
    case DType::f16: return run(logits.as<Float16>(), &row_f16);
    case DType::bf16: return run(logits.as<Bfloat16>(), &row_bf16);
    default: check(false, "logits are ", logits, "; expected float32, float16 or bfloat16");
  }
}

}  // namespace mmfast
