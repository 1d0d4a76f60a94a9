// Everything that Python may call. Kernels see pointers and sizes; no torch header is included anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tensor_view.h"

namespace py = pybind11;

namespace pybind11::detail {

// (address, dtype code, shape, strides), made by mmfast.ops.extension.view.
template <>
struct type_caster<mmfast::TensorView> {
  PYBIND11_TYPE_CASTER(mmfast::TensorView, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]]"));

  bool load(handle source, bool) {
    if (!isinstance<tuple>(source)) return false;
    const auto fields = reinterpret_borrow<tuple>(source);
    if (fields.size() != 4) return false;
    value.data = reinterpret_cast<void*>(fields[0].cast<uintptr_t>());
    value.dtype = static_cast<mmfast::DType>(fields[1].cast<int>());
    value.shape = fields[2].cast<std::vector<int64_t>>();
    value.strides = fields[3].cast<std::vector<int64_t>>();
    return true;
  }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of mmfast; called through mmfast.ops only.";
#ifdef MMFAST_WITH_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_architectures") = MMFAST_CUDA_ARCHITECTURES;
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_architectures") = "";
#endif
}
