// Tensors of PyTorch without its headers: read by the table of C functions that DLPack 1.3 defines (dmlc/dlpack,
// include/dlpack/dlpack.h, DLPackExchangeAPI) and torch.Tensor.__dlpack_c_exchange_api__ holds.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>

#include "tensor_view.h"

namespace mmfast::dlpack {

namespace py = pybind11;

constexpr uint32_t MAJOR_VERSION = 1;
constexpr int32_t CPU = 1;

// Shape, strides and data stay the tensor's own.
struct Tensor {
  void* data;
  int32_t device_type, device_index, dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;

  std::optional<DType> dtype() const {
    enum { INT, UINT, FLOAT, BFLOAT = 4, BOOL = 6 };
    switch (code << 8 | bits) {
      case FLOAT << 8 | 32: return DType::f32;
      case FLOAT << 8 | 16: return DType::f16;
      case BFLOAT << 8 | 16: return DType::bf16;
      case FLOAT << 8 | 64: return DType::f64;
      case INT << 8 | 64: return DType::i64;
      case INT << 8 | 32: return DType::i32;
      case BOOL << 8 | 8: return DType::boolean;
      case UINT << 8 | 8: return DType::u8;
      case INT << 8 | 8: return DType::i8;
      default: return std::nullopt;
    }
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int32_t i = 0; i < dims; ++i) product *= shape[i];
    return product;
  }

  // What kernels take; none if they have no such dtype, or it is on another device.
  std::optional<TensorView> view() const {
    const auto known = dtype();
    if (!known || device_type != CPU) return std::nullopt;
    return TensorView{static_cast<char*>(data) + byte_offset, *known, {shape, shape + dims}, {strides, strides + dims}};
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int32_t i = dims - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

struct Table {
  uint32_t major, minor;
  const void *older, *allocate, *export_tensor, *import_tensor;
  int (*read)(void* object, Tensor* tensor);  // not 0: a Python exception is set
  const void* current_stream;
};

// torch.Tensor, torch.nn.Parameter and their table; before `take_tensors` nothing is a tensor.
inline PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
inline const Table* table = nullptr;

// From now on kernels take tensors of these two types, if `capsule` holds a table of a known version: whether it does.
inline bool take_tensors(py::type tensor, py::type parameter, py::capsule capsule) {
  const auto* found = static_cast<const Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  if (found->major != MAJOR_VERSION || !found->read) return false;
  table = found;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
  return true;
}

// What is asked of Python, see `ask`; null before.
inline PyObject *describe = nullptr, *dispatch_modes = nullptr, *transforms = nullptr, *forward_ad = nullptr;

// From now on `description` is called with what C++ cannot read by itself, and `overheard` knows whom to ask:
// torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack and what is in
// torch.autograd.forward_ad.
inline void ask(py::function description, py::function modes, py::function functions, py::dict levels) {
  describe = description.release().ptr();
  dispatch_modes = modes.release().ptr();
  transforms = functions.release().ptr();
  forward_ad = levels.release().ptr();
}

// See mmfast.ops.extension.overheard. What cannot be told counts as heard.
inline bool overheard() {
  for (PyObject* of : {dispatch_modes, transforms}) {
    PyObject* const found = of ? PyObject_CallNoArgs(of) : nullptr;
    const int truth = found ? PyObject_IsTrue(found) : -1;
    Py_XDECREF(found);
    PyErr_Clear();
    if (truth) return true;
  }
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  PyObject* const level = PyDict_GetItem(forward_ad, name);
  return !level || PyLong_AsLong(level) >= 0;
}

// None for what is no tensor of the two types, and where the table cannot tell (a sparse one, say).
inline std::optional<Tensor> read(PyObject* object) {
  Tensor found{};
  if (!table || (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type)) return std::nullopt;
  if (table->read(object, &found) == 0) return found;
  PyErr_Clear();
  return std::nullopt;
}

// What the words of a pattern have met so far: the size of each letter, -1 before that, and the tensor of a *.
struct Sizes {
  int64_t letters[26];
  std::optional<Tensor> starred;
  int32_t leading = 0;

  Sizes() { std::fill(letters, letters + 26, -1); }

  // Whether `word` tells the shape of the tensor.
  bool match(std::string_view word, const Tensor& tensor) {
    if (word.starts_with('~')) {
      if (tensor.dims == 0 || (tensor.dims == 1 && tensor.shape[0] == 1)) return true;
      word.remove_prefix(1);
    }
    const bool star = word.starts_with('*');
    if (star) word.remove_prefix(1);
    const int32_t named = static_cast<int32_t>(word.size()), before = tensor.dims - named;
    if (before < 0 || (before > 0 && !star)) return false;
    if (star && starred && (before != leading || !std::equal(tensor.shape, tensor.shape + before, starred->shape)))
      return false;
    if (star) starred = tensor, leading = before;
    for (int32_t i = 0; i < named; ++i) {
      int64_t one = 1, &known = word[i] == '1' ? one : letters[word[i] - 'a'];
      if (known != -1 && known != tensor.shape[before + i]) return false;
      known = tensor.shape[before + i];
      if (known == 0) return false;
    }
    return true;
  }

  // The product of what a word stands for.
  int64_t product(std::string_view word) const {
    int64_t found = 1;
    if (word.starts_with('*')) {
      word.remove_prefix(1);
      for (int32_t i = 0; i < leading; ++i) found *= starred->shape[i];
    }
    for (const char letter : word) found *= letters[letter - 'a'];
    return found;
  }
};

inline std::string_view next_word(std::string_view& pattern) {
  const size_t end = std::min(pattern.find(' '), pattern.size());
  const std::string_view word = pattern.substr(0, end);
  pattern.remove_prefix(std::min(end + 1, pattern.size()));
  return word;
}

// See mmfast.ops.backends.fits: the product of the pattern's first word if all objects fit the others; else -1. With
// `packed` nobody listens, each is packed, and each * of a dtype that kernels have.
inline int64_t fits(std::string_view pattern, PyObject* const* objects, Py_ssize_t count, bool packed) {
  if (packed && overheard()) return -1;
  Sizes sizes;
  std::optional<DType> first;
  const std::string_view counted = next_word(pattern);
  for (Py_ssize_t i = 0; i < count; ++i) {
    std::string_view word = next_word(pattern);
    const auto ends_in = [&](char mark) {
      const bool found = word.ends_with(mark);
      if (found) word.remove_suffix(1);
      return found;
    };
    if (ends_in('?') && objects[i] == Py_None) continue;
    const bool alike = ends_in('='), integer = ends_in('#');
    const auto tensor = read(objects[i]);
    if (!tensor || tensor->device_type != CPU || !sizes.match(word, *tensor)) return -1;
    const auto dtype = tensor->dtype();
    if (i == 0) first = dtype;
    if (!dtype || (integer ? *dtype != DType::i64 : *dtype > DType::f64) || (alike && dtype != first)) return -1;
    if (packed && (!tensor->is_contiguous() || (word.starts_with('*') && *dtype > DType::bf16))) return -1;
  }
  return sizes.product(counted);
}

// What `fits` counts for linear_cross_entropy's hidden states, weight and labels, if one of these is not ignored: over no
// row PyTorch's mean is NaN. Else -1.
inline int64_t labelled(PyObject* const* tensors, int64_t ignore_index) {
  const int64_t work = fits("*tvh *th vh= *t#", tensors, 3, false);
  const auto labels = work > 0 ? read(tensors[2]) : std::nullopt;
  if (!labels) return -1;
  const auto* first = reinterpret_cast<const int64_t*>(static_cast<const char*>(labels->data) + labels->byte_offset);
  for (int64_t row = labels->numel() - 1; row >= 0; --row) {
    int64_t offset = 0, rest = row;
    for (int32_t i = labels->dims - 1; i >= 0; rest /= labels->shape[i--])
      offset += rest % labels->shape[i] * labels->strides[i];
    if (first[offset] != ignore_index) return work;
  }
  return -1;
}

}  // namespace mmfast::dlpack
