#include "sgemm.h"

#include <cstdint>
#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace mmfast {
namespace {

// BLAS in Fortran's convention, with 64-bit sizes.
using Size = const int64_t*;
using Sgemm = void(const char* turn_a, const char* turn_b, Size m, Size n, Size k, const float* alpha, const float* a,
                   Size lda, const float* b, Size ldb, const float* beta, float* c, Size ldc);

Sgemm* sgemm() {
#if defined(__linux__)
  static Sgemm* const found = [] {
    void* const library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);  // Python has loaded it before this
    return library ? reinterpret_cast<Sgemm*>(dlsym(library, "SGEMM_64")) : nullptr;
  }();
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

bool has_sgemm() { return sgemm() != nullptr; }

void sgemm_add(const TensorView& x, const TensorView& w, bool transposed, const TensorView& out) {
  const int64_t rows = out.size(0), columns = out.size(1), depth = x.size(1);
  check(has_sgemm(), "sgemm_add: PyTorch's library exports no SGEMM_64");
  x.expect("x", DType::f32, {rows, depth});
  out.expect("out", DType::f32, {rows, columns});
  if (transposed)
    w.expect("w", DType::f32, {columns, depth});
  else
    w.expect("w", DType::f32, {depth, columns});
  check(rows > 0 && columns > 0 && depth > 0, "sgemm_add: a matrix is empty");
  // Its matrices are stored by columns: what it sees of each is the transpose, and outᵀ = wᵀ xᵀ.
  const float one = 1.0f;
  const int64_t w_stride = transposed ? depth : columns;
  sgemm()(transposed ? "T" : "N", "N", &columns, &rows, &depth, &one, w.as<float>(), &w_stride, x.as<float>(), &depth,
          &one, out.as<float>(), &columns);
}

}  // namespace mmfast
