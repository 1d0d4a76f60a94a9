// mixture_adapter: y = x + h U_bᵀ + b_b with h = drop(act(x Aᵀ + a)), and its gradients. A few rows of x (or of the
// gradient) at a time: what is read again after the ranks are known still lies in cache, so that each matrix passes
// through memory once.
//
// The ranks of `downs` projections lie side by side, R each. Group g of the output channels sees P = downs · R / groups
// of them, in `up` [B, P + 1, H]; the last row of `up` is the bias, a rank whose h is 1. Columns of a group are padded by
// zeros to a multiple of LANES in `down`, `up` and their gradients, not in x.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../tensor_view.h"
#include "matrix.h"
#include "philox.h"
#include "scalars.h"

namespace mmfast {
namespace {

constexpr const char* OP = "mixture_adapter";

constexpr int64_t STRIP = 12;   // rows that pass together, a multiple of ROWS
constexpr int64_t ROWS = 3;     // rows whose sums stay in registers
constexpr int64_t RANKS = 4;    // ranks whose sums stay in registers
constexpr int64_t LANES = 32;   // columns that do
constexpr int64_t WIDTH = 256;  // columns of a tile: 12 KiB, which stay in L1
// Rows whose sums make one part. The parts are added in order, so that no sum depends on the number of threads.
constexpr int64_t UNIT = 256;

using Vector = float __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t SIZE = sizeof(Vector) / sizeof(float);

MMFAST_INLINE const Vector& at(const float* x) { return *reinterpret_cast<const Vector*>(x); }
MMFAST_INLINE Vector& at(float* x) { return *reinterpret_cast<Vector*>(x); }

// ---- a tile [STRIP, WIDTH] in fp32, zero beyond its rows and columns

template <typename T>
MMFAST_INLINE void widen(Matrix<const T> x, int64_t rows, int64_t width, float* tile) {
  const int64_t padded = (width + LANES - 1) / LANES * LANES, last = (rows + ROWS - 1) / ROWS * ROWS;
  for (int64_t i = 0; i < last; ++i, tile += WIDTH) {
    const int64_t count = i < rows ? width : 0;
    const T* from = x.data + i * x.stride;
#pragma omp simd
    for (int64_t d = 0; d < count; ++d) tile[d] = to_float(from[d]);
    for (int64_t d = count; d < padded; ++d) tile[d] = 0.0f;
  }
}

template <typename T>
MMFAST_INLINE void narrow(const float* tile, int64_t rows, int64_t width, Matrix<T> y) {
  for (int64_t i = 0; i < rows; ++i, tile += WIDTH) {
    T* to = y.row(i);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) to[d] = from_float<T>(tile[d]);
  }
}

// One function for each dtype, because a template cannot be cloned.
#define MMFAST_TILE(T)                                                                                \
  MMFAST_CLONES void load_tile(Matrix<const T> x, int64_t rows, int64_t width, float* tile) {         \
    widen(x, rows, width, tile);                                                                      \
  }                                                                                                   \
  MMFAST_CLONES void store_tile(const float* tile, int64_t rows, int64_t width, Matrix<T> y) {        \
    narrow(tile, rows, width, y);                                                                     \
  }
MMFAST_TILE(float)
MMFAST_TILE(Float16)
MMFAST_TILE(Bfloat16)

// ---- the three products. Strides and widths are in floats; `width` is a multiple of LANES.

// sums[i][r] += tile[i] · factors[r], lane by lane.
template <int COUNT>
MMFAST_INLINE void project_ranks(const float* tile, int64_t rows, const float* factors, int64_t stride, int64_t width,
                                 Vector* sums, int64_t ranks) {
  for (int64_t i = 0; i < rows; i += ROWS, tile += ROWS * WIDTH, sums += ROWS * ranks) {
    Vector sum[ROWS][COUNT] = {};
    for (int64_t d = 0; d < width; d += SIZE) {
      const Vector x0 = at(tile + d), x1 = at(tile + WIDTH + d), x2 = at(tile + 2 * WIDTH + d);
#pragma GCC unroll 4
      for (int k = 0; k < COUNT; ++k) {
        const Vector factor = at(factors + k * stride + d);
        sum[0][k] += x0 * factor;
        sum[1][k] += x1 * factor;
        sum[2][k] += x2 * factor;
      }
    }
#pragma GCC unroll 3
    for (int64_t n = 0; n < ROWS; ++n)
#pragma GCC unroll 4
      for (int k = 0; k < COUNT; ++k) sums[n * ranks + k] += sum[n][k];
  }
}

MMFAST_CLONES void project(const float* tile, int64_t rows, const float* factors, int64_t stride, int64_t width,
                           Vector* sums, int64_t first, int64_t count, int64_t ranks) {
  sums += first;
  for (; count >= RANKS; count -= RANKS, factors += RANKS * stride, sums += RANKS)
    project_ranks<RANKS>(tile, rows, factors, stride, width, sums, ranks);
  if (count == 3) project_ranks<3>(tile, rows, factors, stride, width, sums, ranks);
  if (count == 2) project_ranks<2>(tile, rows, factors, stride, width, sums, ranks);
  if (count == 1) project_ranks<1>(tile, rows, factors, stride, width, sums, ranks);
}

// tile[i] += Σ_r s[i][r] factors[r], and + start if there is one.
MMFAST_CLONES void expand(const float* s, int64_t s_stride, int64_t rows, const float* factors, int64_t stride,
                          int64_t ranks, const float* start, int64_t width, float* tile) {
  for (int64_t i = 0; i < rows; i += ROWS, tile += ROWS * WIDTH, s += ROWS * s_stride)
    for (int64_t d = 0; d < width; d += LANES) {
      Vector sum[ROWS][LANES / SIZE];
#pragma GCC unroll 4
      for (int64_t k = 0; k < LANES / SIZE; ++k) {
        const Vector from = start ? at(start + d + k * SIZE) : Vector{};
#pragma GCC unroll 3
        for (int64_t n = 0; n < ROWS; ++n) sum[n][k] = at(tile + n * WIDTH + d + k * SIZE) + from;
      }
      for (int64_t r = 0; r < ranks; ++r) {
        const float *factor = factors + r * stride + d, s0 = s[r], s1 = s[s_stride + r], s2 = s[2 * s_stride + r];
#pragma GCC unroll 4
        for (int64_t k = 0; k < LANES / SIZE; ++k) {
          const Vector f = at(factor + k * SIZE);
          sum[0][k] += s0 * f;
          sum[1][k] += s1 * f;
          sum[2][k] += s2 * f;
        }
      }
#pragma GCC unroll 3
      for (int64_t n = 0; n < ROWS; ++n)
#pragma GCC unroll 4
        for (int64_t k = 0; k < LANES / SIZE; ++k) at(tile + n * WIDTH + d + k * SIZE) = sum[n][k];
    }
}

// totals[r] += Σ_i s[i][r] tile[i].
template <int COUNT>
MMFAST_INLINE void add_outer_ranks(const float* s, int64_t s_stride, int64_t rows, const float* tile, int64_t width,
                                   float* totals, int64_t stride) {
  for (int64_t d = 0; d < width; d += 2 * SIZE) {
    Vector low[COUNT], high[COUNT];
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k) low[k] = at(totals + k * stride + d), high[k] = at(totals + k * stride + d + SIZE);
    for (int64_t i = 0; i < rows; ++i) {
      const Vector x_low = at(tile + i * WIDTH + d), x_high = at(tile + i * WIDTH + d + SIZE);
#pragma GCC unroll 4
      for (int k = 0; k < COUNT; ++k) {
        const float factor = s[i * s_stride + k];
        low[k] += factor * x_low;
        high[k] += factor * x_high;
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k) at(totals + k * stride + d) = low[k], at(totals + k * stride + d + SIZE) = high[k];
  }
}

MMFAST_CLONES void add_outer(const float* s, int64_t s_stride, int64_t ranks, int64_t rows, const float* tile,
                             int64_t width, float* totals, int64_t stride) {
  for (; ranks >= RANKS; ranks -= RANKS, s += RANKS, totals += RANKS * stride)
    add_outer_ranks<RANKS>(s, s_stride, rows, tile, width, totals, stride);
  if (ranks == 3) add_outer_ranks<3>(s, s_stride, rows, tile, width, totals, stride);
  if (ranks == 2) add_outer_ranks<2>(s, s_stride, rows, tile, width, totals, stride);
  if (ranks == 1) add_outer_ranks<1>(s, s_stride, rows, tile, width, totals, stride);
}

float sum(const float* x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// ---- on the ranks, which are few

enum class Activation { identity, relu, gelu, silu };

Activation activation_of(const std::string& name) {
  if (name == "identity") return Activation::identity;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  check(name == "silu", OP, ": activation is ", name, "; expected identity, relu, gelu or silu");
  return Activation::silu;
}

float activate(Activation activation, float z) {
  switch (activation) {
    case Activation::relu: return z < 0.0f ? 0.0f : z;
    case Activation::gelu: return 0.5f * z * (1.0f + std::erf(z * 0.70710678f));
    case Activation::silu: return z / (1.0f + std::exp(-z));
    default: return z;
  }
}

float slope(Activation activation, float z) {
  switch (activation) {
    case Activation::relu: return z <= 0.0f ? 0.0f : 1.0f;
    case Activation::gelu:
      return 0.5f * (1.0f + std::erf(z * 0.70710678f)) + z * 0.39894228f * std::exp(-0.5f * z * z);
    case Activation::silu: {
      const float gate = 1.0f / (1.0f + std::exp(-z));
      return gate * (1.0f + z * (1.0f - gate));
    }
    default: return 1.0f;
  }
}

// ---- a call

struct Call {
  int64_t batch, tokens, columns;     // of x
  int64_t groups, width, padded;      // columns of a group in x, and in `down` and `up`
  int64_t ranks, downs, seen;         // Q, and P that a group sees
  const float *down, *down_bias, *up;
  Activation activation;
  std::optional<Mask> mask;

  int64_t stride() const { return groups * padded; }
  const float* up_of(int64_t sample) const { return up + sample * (seen + 1) * stride(); }

  // Which of all ranks is the p-th that group g sees.
  int64_t rank(int64_t g, int64_t p) const {
    const int64_t each = seen / downs;
    return p / each * (ranks / downs) + g * each + p % each;
  }

  // factors[q] on h of a row.
  void factors(int64_t row, float* factors) const {
    if (!mask) {
      std::fill_n(factors, ranks, 1.0f);
      return;
    }
    for (int64_t first = 0; first < ranks; first += 8) {
      const Words found = philox(*mask, row, static_cast<uint32_t>(first / 8));
      const uint32_t words[] = {found.a, found.b, found.c, found.d};
      for (int64_t k = 0; k < std::min<int64_t>(8, ranks - first); ++k)
        factors[first + k] = mask->factor(k % 2 ? words[k / 2] >> 16 : words[k / 2] & 0xffffu);
    }
  }
};

Call call_of(const TensorView& x, const TensorView& down, const std::optional<TensorView>& down_bias,
             const TensorView& up, int64_t groups, int64_t downs, const std::string& activation,
             std::optional<int64_t> seed, int64_t threshold) {
  check(x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1), OP, ": x is ", x,
        "; expected [B, T, H] with stride 1 in the last dimension");
  const int64_t ranks = down.size(0);
  check(groups > 0 && downs > 0 && x.size(2) % groups == 0 && ranks % (downs * groups) == 0, OP, ": ", groups,
        " groups and ", downs, " downs do not divide ", x.size(2), " columns and ", ranks, " ranks");
  Call call{x.size(0), x.size(1), x.size(2), groups, x.size(2) / groups, 0, ranks, downs, ranks / groups, nullptr,
            nullptr, nullptr, activation_of(activation), {}};
  call.padded = (call.width + LANES - 1) / LANES * LANES;
  down.expect("down", DType::f32, {ranks, call.stride()});
  up.expect("up", DType::f32, {call.batch, call.seen + 1, call.stride()});
  call.down = down.as<float>();
  call.up = up.as<float>();
  if (down_bias) {
    down_bias->expect("down_bias", DType::f32, {ranks});
    call.down_bias = down_bias->as<float>();
  }
  if (seed) call.mask.emplace(*seed, threshold);
  return call;
}

// x [B, T, H] whose rows are packed.
template <typename T>
struct Samples {
  T* data;  // null: there is none
  int64_t batch_stride, stride;

  Matrix<T> at(int64_t sample, int64_t token, int64_t column) const {
    return {data + sample * batch_stride + token * stride + column, stride};
  }
};

template <typename T, typename S = T>
Samples<S> samples(const std::optional<TensorView>& view) {
  return view ? Samples<S>{view->as<S>(), view->stride(0), view->stride(1)} : Samples<S>{nullptr, 0, 0};
}

void check_like(const char* name, const std::optional<TensorView>& view, const TensorView& x) {
  check(!view || (view->shape == x.shape && view->dtype == x.dtype && (x.size(2) <= 1 || view->stride(2) == 1)), OP,
        ": ", name, " is ", *view, "; expected ", x, " with stride 1 in the last dimension");
}

// What a thread works with: a strip of rows.
struct Strip {
  const Call& call;
  std::vector<float> tile, z, grad, hidden, factors, sums;

  explicit Strip(const Call& call)
      : call(call), tile(STRIP * WIDTH), z(STRIP * call.ranks), grad(STRIP * call.ranks),
        hidden(call.groups * STRIP * (call.seen + 1)), factors(call.ranks), sums(STRIP * call.ranks * SIZE) {}

  float sum_of(int64_t i, int64_t q) const { return sum(sums.data() + (i * call.ranks + q) * SIZE); }
  float* hidden_of(int64_t g) { return hidden.data() + g * STRIP * (call.seen + 1); }

  // Calls run(group, column in it, columns, padded columns) for each block of columns.
  template <typename F>
  void for_each_block(F run) const {
    for (int64_t g = 0; g < call.groups; ++g)
      for (int64_t start = 0; start < call.width; start += WIDTH)
        run(g, start, std::min(WIDTH, call.width - start), std::min(WIDTH, call.padded - start));
  }

  // sums = x · factors, of all ranks (`down`) or for each group of those that it sees (`up`), in the order of groups.
  template <typename T>
  void project_strip(const Samples<const T>& x, int64_t sample, int64_t token, int64_t rows, const float* matrix,
                     bool grouped) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for_each_block([&](int64_t g, int64_t start, int64_t width, int64_t padded) {
      load_tile(x.at(sample, token, g * call.width + start), rows, width, tile.data());
      project(tile.data(), rows, matrix + g * call.padded + start, call.stride(), padded,
              reinterpret_cast<Vector*>(sums.data()), grouped ? g * call.seen : 0,
              grouped ? call.seen : call.ranks, call.ranks);
    });
  }

  // hidden = drop(act(z)) for each group, and a 1 for the bias.
  void activate_strip(int64_t first_row, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      call.factors(first_row + i, factors.data());
      const float* z_i = z.data() + i * call.ranks;
      for (int64_t g = 0; g < call.groups; ++g) {
        float* to = hidden_of(g) + i * (call.seen + 1);
        for (int64_t p = 0; p < call.seen; ++p) {
          const int64_t q = call.rank(g, p);
          // A dropped element is 0 even if it is infinite or NaN.
          to[p] = factors[q] == 0.0f ? 0.0f : activate(call.activation, z_i[q]) * factors[q];
        }
        to[call.seen] = 1.0f;
      }
    }
  }

  // grad = the gradient of z, from the sums of the gradient with `up`.
  void gradient_of_z(int64_t first_row, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      call.factors(first_row + i, factors.data());
      for (int64_t g = 0; g < call.groups; ++g)
        for (int64_t p = 0; p < call.seen; ++p) {
          const int64_t q = call.rank(g, p), at = i * call.ranks + q;
          const float through = sum_of(i, g * call.seen + p) * factors[q];
          const bool linear = call.activation == Activation::identity;
          grad[at] = factors[q] == 0.0f ? 0.0f : linear ? through : through * slope(call.activation, z[at]);
        }
    }
  }
};

// ---- forward

template <typename T>
void forward(const Call& call, const Samples<const T>& x, const Samples<T>& y, float* z, int threads) {
  const int64_t strips = (call.tokens + STRIP - 1) / STRIP;
#pragma omp parallel num_threads(worthwhile_threads(call.batch * call.tokens * call.columns, threads))
  {
    Strip strip(call);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < call.batch * strips; ++n) {
      const int64_t sample = n / strips, token = n % strips * STRIP, row = sample * call.tokens + token;
      const int64_t rows = std::min(STRIP, call.tokens - token);
      strip.project_strip(x, sample, token, rows, call.down, false);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t q = 0; q < call.ranks; ++q)
          strip.z[i * call.ranks + q] =
              strip.sum_of(i, q) + (call.down_bias ? call.down_bias[q] : 0.0f);
      if (z) std::copy_n(strip.z.data(), rows * call.ranks, z + row * call.ranks);
      strip.activate_strip(row, rows);
      strip.for_each_block([&](int64_t g, int64_t start, int64_t width, int64_t padded) {
        const float* up = call.up_of(sample) + g * call.padded + start;
        const int64_t column = g * call.width + start;
        load_tile(x.at(sample, token, column), rows, width, strip.tile.data());
        expand(strip.hidden_of(g), call.seen + 1, rows, up, call.stride(), call.seen, up + call.seen * call.stride(),
               padded, strip.tile.data());
        store_tile(strip.tile.data(), rows, width, y.at(sample, token, column));
      });
    }
  }
}

// ---- backward

// How rows are cut into units, each of which makes a part of the sums: pieces of a long sample, or some short ones.
struct Cut {
  int64_t pieces, piece;   // of a sample, and tokens of a piece
  int64_t samples, units;  // whole samples of a unit, and all units

  explicit Cut(const Call& call)
      : pieces(std::max<int64_t>(1, (call.tokens + UNIT - 1) / UNIT)),
        piece(((call.tokens + pieces - 1) / pieces + STRIP - 1) / STRIP * STRIP),
        samples(std::max<int64_t>(1, UNIT / std::max<int64_t>(1, call.tokens))),
        units((call.batch + samples - 1) / samples * pieces) {}
};

// Adds `count` parts of `size` numbers to `total`, in order.
void add_parts(const float* parts, int64_t count, int64_t size, float* total) {
  std::copy_n(parts, size, total);
  for (int64_t i = 1; i < count; ++i)
    for (int64_t d = 0; d < size; ++d) total[d] += parts[i * size + d];
}

template <typename T>
void backward(const Call& call, const Samples<const T>& grad, const Samples<const T>& x, const float* z,
              const Samples<T>& grad_x, float* grad_down, float* grad_down_bias, float* grad_up, int threads) {
  const Cut cut(call);
  const int64_t ranks = call.ranks, down_size = ranks * call.stride(), up_size = (call.seen + 1) * call.stride();
  const bool need_z_gradient = grad_x.data || grad_down || grad_down_bias;
  using Parts = std::unique_ptr<float[]>;
  const Parts down_parts = grad_down ? std::make_unique_for_overwrite<float[]>(cut.units * down_size) : Parts();
  const Parts bias_parts = std::make_unique<float[]>(cut.units * ranks);
  const bool split = grad_up && cut.pieces > 1;
  const Parts up_parts =
      split ? std::make_unique_for_overwrite<float[]>(call.batch * cut.pieces * up_size) : Parts();
  float* const up_sums = split ? up_parts.get() : grad_up;
  threads = worthwhile_threads(call.batch * call.tokens * call.columns, threads);

#pragma omp parallel num_threads(threads)
  {
    Strip strip(call);
    std::vector<float> x_tile(STRIP * WIDTH);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < cut.units; ++unit) {
      float* const down_sum = grad_down ? down_parts.get() + unit * down_size : nullptr;
      float* const bias_sum = bias_parts.get() + unit * ranks;
      if (down_sum) std::fill_n(down_sum, down_size, 0.0f);
      const int64_t piece = unit % cut.pieces, first_sample = unit / cut.pieces * cut.samples;
      for (int64_t sample = first_sample; sample < std::min(first_sample + cut.samples, call.batch); ++sample) {
        float* const up_sum = grad_up ? up_sums + (sample * cut.pieces + piece) * up_size : nullptr;
        if (up_sum) std::fill_n(up_sum, up_size, 0.0f);
        const int64_t last = std::min((piece + 1) * cut.piece, call.tokens);
        for (int64_t token = piece * cut.piece; token < last; token += STRIP) {
          const int64_t rows = std::min(STRIP, last - token), row = sample * call.tokens + token;
          if (z) std::copy_n(z + row * ranks, rows * ranks, strip.z.data());
          if (need_z_gradient) {
            strip.project_strip(grad, sample, token, rows, call.up_of(sample), true);
            strip.gradient_of_z(row, rows);
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t q = 0; q < ranks; ++q) bias_sum[q] += strip.grad[i * ranks + q];
          }
          if (up_sum) strip.activate_strip(row, rows);
          strip.for_each_block([&](int64_t g, int64_t start, int64_t width, int64_t padded) {
            const int64_t column = g * call.width + start, offset = g * call.padded + start;
            if (up_sum || grad_x.data) load_tile(grad.at(sample, token, column), rows, width, strip.tile.data());
            if (up_sum)
              add_outer(strip.hidden_of(g), call.seen + 1, call.seen + 1, rows, strip.tile.data(), padded,
                        up_sum + offset, call.stride());
            if (down_sum) {
              load_tile(x.at(sample, token, column), rows, width, x_tile.data());
              add_outer(strip.grad.data(), ranks, ranks, rows, x_tile.data(), padded, down_sum + offset,
                        call.stride());
            }
            if (grad_x.data) {
              expand(strip.grad.data(), ranks, rows, call.down + offset, call.stride(), ranks, nullptr, padded,
                     strip.tile.data());
              store_tile(strip.tile.data(), rows, width, grad_x.at(sample, token, column));
            }
          });
        }
      }
    }
    // Rows of the sums, one to a thread.
#pragma omp for schedule(static)
    for (int64_t q = 0; q < ranks; ++q) {
      if (!grad_down) continue;
      std::fill_n(grad_down + q * call.stride(), call.stride(), 0.0f);
      for (int64_t unit = 0; unit < cut.units; ++unit)
        for (int64_t d = 0; d < call.stride(); ++d)
          grad_down[q * call.stride() + d] += down_parts[unit * down_size + q * call.stride() + d];
    }
    if (split) {
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < call.batch; ++sample)
        add_parts(up_parts.get() + sample * cut.pieces * up_size, cut.pieces, up_size, grad_up + sample * up_size);
    }
  }
  if (grad_down_bias) {
    std::fill_n(grad_down_bias, ranks, 0.0f);
    for (int64_t unit = 0; unit < cut.units; ++unit)
      for (int64_t q = 0; q < ranks; ++q) grad_down_bias[q] += bias_parts[unit * ranks + q];
  }
}

}  // namespace

// y [B, T, H] = x + h U_bᵀ + b_b; z [B · T, Q] = x Aᵀ + a, if it is to be kept. x and y are of one dtype (f32, f16,
// bf16), last stride 1; down [Q, H'], down_bias [Q], up [B, P + 1, H'] and z are f32 and packed; H' is H with the columns
// of each group padded by zeros to a multiple of 32.
void mixture_adapter_fwd_cpu(TensorView x, TensorView down, std::optional<TensorView> down_bias, TensorView up,
                             int64_t groups, int64_t downs, const std::string& activation,
                             std::optional<int64_t> seed, int64_t threshold, TensorView y,
                             std::optional<TensorView> z, int threads) {
  const Call call = call_of(x, down, down_bias, up, groups, downs, activation, seed, threshold);
  check_like("y", y, x);
  if (z) z->expect("z", DType::f32, {call.batch * call.tokens, call.ranks});
  with_scalar(OP, x.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    forward<T>(call, samples<T, const T>(x), samples<T>(y), z ? z->as<float>() : nullptr, threads);
  });
}

// Each gradient that is given: grad_x [B, T, H] of the dtype of grad; grad_down [Q, H'], grad_down_bias [Q] and
// grad_up [B, P + 1, H'], f32 and packed. grad_down needs x; grad_up, and all others where act is no identity, need z.
void mixture_adapter_bwd_cpu(TensorView grad, std::optional<TensorView> x, std::optional<TensorView> z,
                             TensorView down, TensorView up, int64_t groups, int64_t downs,
                             const std::string& activation, std::optional<int64_t> seed, int64_t threshold,
                             std::optional<TensorView> grad_x, std::optional<TensorView> grad_down,
                             std::optional<TensorView> grad_down_bias, std::optional<TensorView> grad_up,
                             int threads) {
  const Call call = call_of(grad, down, {}, up, groups, downs, activation, seed, threshold);
  check_like("x", x, grad);
  check_like("grad_x", grad_x, grad);
  check(x || !grad_down, OP, ": grad_down needs x");
  check(z || (!grad_up && call.activation == Activation::identity), OP, ": z is missing");
  if (z) z->expect("z", DType::f32, {call.batch * call.tokens, call.ranks});
  if (grad_down) grad_down->expect("grad_down", DType::f32, {call.ranks, call.stride()});
  if (grad_down_bias) grad_down_bias->expect("grad_down_bias", DType::f32, {call.ranks});
  if (grad_up) grad_up->expect("grad_up", DType::f32, {call.batch, call.seen + 1, call.stride()});
  const auto floats = [](const std::optional<TensorView>& view) { return view ? view->as<float>() : nullptr; };
  with_scalar(OP, grad.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    backward<T>(call, samples<T, const T>(grad), samples<T, const T>(x), floats(z), samples<T>(grad_x),
                floats(grad_down), floats(grad_down_bias), floats(grad_up), threads);
  });
}

}  // namespace mmfast
