// Everything that Python may call. Kernels see pointers and sizes; no torch header is included anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/amx.h"
#include "cpu/low_rank.h"
#include "cpu/product_f32.h"
#include "cpu/sgemm.h"
#include "tensor_view.h"
#include "torch_tensor.h"

namespace py = pybind11;

// One for each file in cpu/ and cuda/, where it is described.
namespace mmfast {
void bias_scale_linear_fwd_cpu(TensorView z, std::optional<TensorView> bias, std::optional<TensorView> scale,
                               TensorView y, int threads);
void bias_scale_linear_bwd_cpu(TensorView grad, std::optional<TensorView> z, std::optional<TensorView> bias,
                               std::optional<TensorView> scale, std::optional<TensorView> out,
                               std::optional<TensorView> grad_bias, std::optional<TensorView> grad_scale,
                               int threads);

void dropout_cpu(TensorView x, int64_t seed, int64_t threshold, int64_t first_row, TensorView out, int threads);

void gated_residual_fwd_cpu(TensorView x, TensorView y, TensorView factor, TensorView out, int threads,
                            int vector_bits);
void gated_residual_bwd_cpu(TensorView grad, std::optional<TensorView> y, TensorView factor,
                            std::optional<TensorView> grad_y, std::optional<TensorView> grad_gate, int threads);

void int8_quantize_cpu(TensorView weight, TensorView values, TensorView scale, int threads);
void int8_dequantize_cpu(TensorView values, TensorView scale, int64_t first, int64_t last, TensorView out,
                         int threads);
void int8_linear_cpu(TensorView x, TensorView values, TensorView scale, std::optional<TensorView> bias, TensorView out,
                     int threads);

void linear_cross_entropy_rows(TensorView logits, TensorView labels, std::optional<TensorView> scale,
                               float smoothing, bool write_gradient, TensorView losses, TensorView correct);

void lora_linear_fwd_cpu(TensorView x, std::optional<TensorView> weight, TensorView a, TensorView b, float scaling,
                         std::optional<TensorView> bias, TensorView s, TensorView out, bool in_tiles, int threads);
void lora_linear_bwd_cpu(TensorView grad, std::optional<TensorView> x, std::optional<TensorView> s,
                         std::optional<TensorView> weight, TensorView a, TensorView b, float scaling,
                         std::optional<TensorView> grad_x, std::optional<TensorView> grad_a,
                         std::optional<TensorView> grad_b, bool in_tiles, int threads);

void lora_linear_rows_cpu(TensorView x, std::optional<TensorView> weight, TensorView a, TensorView b, float scaling,
                          std::optional<TensorView> bias, TensorView out, int threads, int vector_bits);

void mixture_adapter_fwd_cpu(TensorView x, TensorView down, std::optional<TensorView> down_bias, TensorView up,
                             int64_t groups, int64_t downs, const std::string& activation,
                             std::optional<int64_t> seed, int64_t threshold, TensorView y,
                             std::optional<TensorView> z, int threads);
void mixture_adapter_bwd_cpu(TensorView grad, std::optional<TensorView> x, std::optional<TensorView> z,
                             TensorView down, TensorView up, int64_t groups, int64_t downs,
                             const std::string& activation, std::optional<int64_t> seed, int64_t threshold,
                             std::optional<TensorView> grad_x, std::optional<TensorView> grad_down,
                             std::optional<TensorView> grad_down_bias, std::optional<TensorView> grad_up,
                             int threads);

void nf4_quantize_cpu(TensorView weight, TensorView packed, TensorView absmax, int threads);
void nf4_dequantize_cpu(std::vector<TensorView> weight, int64_t first, int64_t last, TensorView out, int threads);
void nf4_linear_cpu(TensorView x, std::vector<TensorView> weight, std::optional<TensorView> bias, TensorView out,
                    int threads);

void quantized_linear(TensorView x, std::vector<TensorView> weight, std::optional<TensorView> bias, bool add,
                      TensorView out, int threads);
void quantized_grad(TensorView grad, std::vector<TensorView> weight, bool add, TensorView out, int threads);

void rms_norm_fwd_cpu(TensorView x, TensorView weight, std::optional<TensorView> residual, float eps, TensorView y,
                      std::optional<TensorView> sum, std::optional<TensorView> rstd, int threads, int vector_bits);
void rms_norm_bwd_cpu(TensorView grad_y, std::optional<TensorView> grad_sum, TensorView h, TensorView weight,
                      TensorView rstd, std::optional<TensorView> grad_x, std::optional<TensorView> grad_weight,
                      int threads, int vector_bits);

void rope_cpu(std::vector<TensorView> from, TensorView cos, TensorView sin, std::vector<TensorView> to, bool adjoint,
              int threads);
void flash_attention_bwd_cpu(TensorView grad_out, TensorView query, TensorView out, TensorView lse, TensorView key,
                             TensorView value, bool causal, float scale, std::optional<TensorView> grad_query,
                             std::optional<TensorView> grad_key, std::optional<TensorView> grad_value, int threads,
                             int vector_bits);
void gated_cross_attention_fwd_cpu(TensorView query, TensorView key, TensorView value, TensorView text_time,
                                   int64_t media_length, float scale, bool only_latest, TensorView out, TensorView lse,
                                   int vector_bits, int threads);
void gated_cross_attention_bwd_cpu(TensorView grad_out, TensorView query, TensorView out, TensorView lse,
                                   TensorView key, TensorView value, TensorView text_time, int64_t media_length,
                                   float scale, bool only_latest, std::optional<TensorView> grad_query,
                                   std::optional<TensorView> grad_key, std::optional<TensorView> grad_value,
                                   int vector_bits, int threads);
void resampler_attention_fwd_cpu(TensorView query, TensorView media_key, TensorView media_value,
                                 std::optional<TensorView> latent_key, std::optional<TensorView> latent_value,
                                 std::optional<TensorView> media_mask, float scale, TensorView out, TensorView lse,
                                 int vector_bits, int threads);
void resampler_attention_bwd_cpu(TensorView grad_out, TensorView query, TensorView out, TensorView lse,
                                 TensorView media_key, TensorView media_value, std::optional<TensorView> latent_key,
                                 std::optional<TensorView> latent_value, std::optional<TensorView> media_mask,
                                 float scale, std::optional<TensorView> grad_query,
                                 std::optional<TensorView> grad_media_key, std::optional<TensorView> grad_media_value,
                                 std::optional<TensorView> grad_latent_key,
                                 std::optional<TensorView> grad_latent_value, int vector_bits, int threads);

void spatio_temporal_pool_fwd_cpu(TensorView features, std::optional<TensorView> frame_mask, TensorView pooled,
                                  int threads);
void spatio_temporal_pool_bwd_cpu(TensorView grad_pooled, std::optional<TensorView> frame_mask,
                                  TensorView grad_features, int threads);

void swiglu_fwd_cpu(TensorView gate, TensorView up, TensorView out, int threads, int vector_bits);
void swiglu_bwd_cpu(TensorView grad, TensorView gate, std::optional<TensorView> up, std::optional<TensorView> grad_gate,
                    std::optional<TensorView> grad_up, int threads, int vector_bits);

void zero_init_attention_fwd_cpu(TensorView words, TensorView query, TensorView prompt_key, TensorView prompt_value,
                                 TensorView act, float scale, TensorView out, int threads, int vector_bits);
void zero_init_attention_bwd_cpu(TensorView grad, TensorView query, TensorView prompt_key, TensorView prompt_value,
                                 TensorView act, float scale, std::optional<TensorView> grad_query,
                                 std::optional<TensorView> grad_key, std::optional<TensorView> grad_value,
                                 std::optional<TensorView> grad_act, int threads, int vector_bits);
#ifdef MMFAST_WITH_CUDA
std::pair<int64_t, int64_t> spatio_temporal_pool_parts_cuda(TensorView features, int64_t rows);
void spatio_temporal_pool_fwd_cuda(TensorView features, std::optional<TensorView> frame_mask, TensorView pooled,
                                   TensorView temporal, TensorView spatial, uintptr_t stream);
void spatio_temporal_pool_bwd_cuda(TensorView grad_pooled, std::optional<TensorView> frame_mask,
                                   TensorView grad_features, uintptr_t stream);
#endif
}  // namespace mmfast

namespace {

// By the C API, which calls them in a third of the time.
template <bool PACKED>
PyObject* fits(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  Py_ssize_t size;
  const char* pattern = count ? PyUnicode_AsUTF8AndSize(arguments[0], &size) : nullptr;
  if (!pattern) return PyErr_Format(PyExc_TypeError, "%s(pattern, *tensors)", PACKED ? "packed" : "fits");
  const std::string_view words{pattern, static_cast<size_t>(size)};
  return PyLong_FromLongLong(mmfast::dlpack::fits(words, arguments + 1, count - 1, PACKED));
}

PyObject* overheard(PyObject*, PyObject*) { return PyBool_FromLong(mmfast::dlpack::overheard()); }

PyObject* labelled(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const long long ignore_index = count == 4 ? PyLong_AsLongLong(arguments[3]) : 0;
  if (count != 4) return PyErr_Format(PyExc_TypeError, "labelled(hidden, weight, labels, ignore_index)");
  if (PyErr_Occurred()) return nullptr;
  return PyLong_FromLongLong(mmfast::dlpack::labelled(arguments, ignore_index));
}

std::optional<mmfast::TensorView> view_of(PyObject* object) {
  const auto tensor = mmfast::dlpack::read(object);
  return tensor ? tensor->view() : std::nullopt;
}

// (x, weight, bias or None, out, threads) -> whether out = x Wᵀ + bias was made: it is where x and out are a packed row
// each and the kernel finds nothing wrong. The weight is an NF4Weight or an Int8Weight of mmfast.ops, which are tuples.
PyObject* quantized_linear_row(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5 || !PyTuple_Check(arguments[1]))
    return PyErr_Format(PyExc_TypeError, "quantized_linear_row(x, weight, bias, out, threads)");
  auto x = view_of(arguments[0]), bias = view_of(arguments[2]), out = view_of(arguments[3]);
  const int threads = static_cast<int>(PyLong_AsLong(arguments[4]));
  if (PyErr_Occurred()) return nullptr;
  std::vector<mmfast::TensorView> weight;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[1]); ++i)
    if (auto part = view_of(PyTuple_GET_ITEM(arguments[1], i))) weight.push_back(*std::move(part));
  const auto as_row = [](mmfast::TensorView& view) {
    if (view.dim() == 0 || view.size(view.dim() - 1) != view.numel() || !view.is_contiguous()) return false;
    view.shape = {1, view.numel()}, view.strides = {view.numel(), 1};
    return true;
  };
  if (!x || !out || !as_row(*x) || !as_row(*out) || (!bias && arguments[2] != Py_None)) Py_RETURN_FALSE;
  if (weight.size() < 2) Py_RETURN_FALSE;
  try {
    const py::gil_scoped_release release;
    if (weight[0].dtype == mmfast::DType::u8)
      mmfast::nf4_linear_cpu(*x, std::move(weight), bias, *out, threads);
    else
      mmfast::int8_linear_cpu(*x, weight[0], weight[1], bias, *out, threads);
  } catch (const std::exception&) {
    Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef FAST[] = {
    {"fits", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fits<false>)), METH_FASTCALL, nullptr},
    {"packed", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fits<true>)), METH_FASTCALL, nullptr},
    {"overheard", overheard, METH_NOARGS, nullptr},
    {"labelled", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(labelled)), METH_FASTCALL, nullptr},
    {"quantized_linear_row", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(quantized_linear_row)),
     METH_FASTCALL, nullptr},
    {},
};

}  // namespace

namespace pybind11::detail {

// (address, dtype code, shape, strides), made by mmfast.ops.extension.described; or a tensor on the CPU itself, which that
// is asked of unless `take_tensors` made it readable here.
template <>
struct type_caster<mmfast::TensorView> {
  PYBIND11_TYPE_CASTER(mmfast::TensorView, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]]"));

  // By the C API: what pybind11 casts a tuple with takes as long as a small kernel.
  bool load(handle source, bool) {
    PyObject* fields = source.ptr();
    if (const auto tensor = mmfast::dlpack::read(fields)) {
      auto view = tensor->view();
      if (view) value = *std::move(view);
      return view.has_value();
    }
    object described;
    if (!PyTuple_Check(fields) && mmfast::dlpack::describe) {
      described = reinterpret_steal<object>(PyObject_CallOneArg(mmfast::dlpack::describe, fields));
      if (!(fields = described.ptr())) throw error_already_set();
    }
    if (!PyTuple_Check(fields) || PyTuple_GET_SIZE(fields) != 4) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(fields, 0));
    value.dtype = static_cast<mmfast::DType>(PyLong_AsLong(PyTuple_GET_ITEM(fields, 1)));
    const bool found =
        read(PyTuple_GET_ITEM(fields, 2), value.shape) && read(PyTuple_GET_ITEM(fields, 3), value.strides);
    if (PyErr_Occurred()) throw error_already_set();
    return found;
  }

  static bool read(PyObject* numbers, std::vector<int64_t>& into) {
    if (!PyTuple_Check(numbers)) return false;
    into.resize(PyTuple_GET_SIZE(numbers));
    for (size_t i = 0; i < into.size(); ++i) into[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(numbers, i));
    return true;
  }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of mmfast; called through mmfast.ops only.";
  m.attr("compiler") = __VERSION__;
  m.def("has_amx", &mmfast::has_amx);
  m.def("has_avx512", &mmfast::has_avx512);
  m.def("has_sgemm", &mmfast::has_sgemm);
#ifdef MMFAST_WITH_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_architectures") = MMFAST_CUDA_ARCHITECTURES;
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_architectures") = "";
#endif

  m.def("take_tensors", &mmfast::dlpack::take_tensors, py::arg("tensor"), py::arg("parameter"), py::arg("table"));
  m.def("ask", &mmfast::dlpack::ask, py::arg("description"), py::arg("modes"), py::arg("functions"), py::arg("levels"));
  if (PyModule_AddFunctions(m.ptr(), FAST)) throw py::error_already_set();

  m.def("dropout_cpu", &mmfast::dropout_cpu, py::arg("x"), py::arg("seed"), py::arg("threshold"), py::arg("first_row"),
        py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("bias_scale_linear_fwd_cpu", &mmfast::bias_scale_linear_fwd_cpu, py::arg("z"), py::arg("bias"),
        py::arg("scale"), py::arg("y"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("bias_scale_linear_bwd_cpu", &mmfast::bias_scale_linear_bwd_cpu, py::arg("grad"), py::arg("z"),
        py::arg("bias"), py::arg("scale"), py::arg("out"), py::arg("grad_bias"), py::arg("grad_scale"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("gated_residual_fwd_cpu", &mmfast::gated_residual_fwd_cpu, py::arg("x"), py::arg("y"), py::arg("factor"),
        py::arg("out"), py::arg("threads"), py::arg("vector_bits") = 512, py::call_guard<py::gil_scoped_release>());
  m.def("gated_residual_bwd_cpu", &mmfast::gated_residual_bwd_cpu, py::arg("grad"), py::arg("y"), py::arg("factor"),
        py::arg("grad_y"), py::arg("grad_gate"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("int8_quantize_cpu", &mmfast::int8_quantize_cpu, py::arg("weight"), py::arg("values"), py::arg("scale"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("int8_dequantize_cpu", &mmfast::int8_dequantize_cpu, py::arg("values"), py::arg("scale"), py::arg("first"),
        py::arg("last"), py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("int8_linear_cpu", &mmfast::int8_linear_cpu, py::arg("x"), py::arg("values"), py::arg("scale"),
        py::arg("bias"), py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("linear_cross_entropy_rows", &mmfast::linear_cross_entropy_rows, py::arg("logits"), py::arg("labels"),
        py::arg("scale"), py::arg("smoothing"), py::arg("write_gradient"), py::arg("losses"), py::arg("correct"),
        py::call_guard<py::gil_scoped_release>());

  m.def("lora_linear_fwd_cpu", &mmfast::lora_linear_fwd_cpu, py::arg("x"), py::arg("weight"), py::arg("a"),
        py::arg("b"), py::arg("scaling"), py::arg("bias"), py::arg("s"), py::arg("out"), py::arg("in_tiles"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("lora_linear_bwd_cpu", &mmfast::lora_linear_bwd_cpu, py::arg("grad"), py::arg("x"), py::arg("s"),
        py::arg("weight"), py::arg("a"), py::arg("b"), py::arg("scaling"), py::arg("grad_x"), py::arg("grad_a"),
        py::arg("grad_b"), py::arg("in_tiles"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("lora_linear_rows_cpu", &mmfast::lora_linear_rows_cpu, py::arg("x"), py::arg("weight"), py::arg("a"),
        py::arg("b"), py::arg("scaling"), py::arg("bias"), py::arg("out"), py::arg("threads"),
        py::arg("vector_bits") = 512, py::call_guard<py::gil_scoped_release>());

  m.def("low_rank_read", &mmfast::low_rank_read, py::arg("x"), py::arg("factors"), py::arg("s"), py::arg("scale"),
        py::arg("projected"), py::arg("outer"), py::arg("add"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("low_rank_expand", &mmfast::low_rank_expand, py::arg("s"), py::arg("factors"), py::arg("scale"),
        py::arg("bias"), py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("low_rank_product", &mmfast::low_rank_product, py::arg("x"), py::arg("w"), py::arg("s"), py::arg("factors"),
        py::arg("scale"), py::arg("bias"), py::arg("out"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());

  m.def("mixture_adapter_fwd_cpu", &mmfast::mixture_adapter_fwd_cpu, py::arg("x"), py::arg("down"),
        py::arg("down_bias"), py::arg("up"), py::arg("groups"), py::arg("downs"), py::arg("activation"),
        py::arg("seed"), py::arg("threshold"), py::arg("y"), py::arg("z"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("mixture_adapter_bwd_cpu", &mmfast::mixture_adapter_bwd_cpu, py::arg("grad"), py::arg("x"), py::arg("z"),
        py::arg("down"), py::arg("up"), py::arg("groups"), py::arg("downs"), py::arg("activation"), py::arg("seed"),
        py::arg("threshold"), py::arg("grad_x"), py::arg("grad_down"), py::arg("grad_down_bias"), py::arg("grad_up"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("nf4_quantize_cpu", &mmfast::nf4_quantize_cpu, py::arg("weight"), py::arg("packed"), py::arg("absmax"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("nf4_dequantize_cpu", &mmfast::nf4_dequantize_cpu, py::arg("weight"), py::arg("first"), py::arg("last"),
        py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("nf4_linear_cpu", &mmfast::nf4_linear_cpu, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "product_f32",
      [](mmfast::TensorView x, mmfast::TensorView w, std::optional<mmfast::TensorView> bias, bool add,
         mmfast::TensorView out, int threads) {
        mmfast::product_f32(x, w, std::nullopt, bias, add, out, threads);
      },
      py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("add"), py::arg("out"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def("quantized_linear", &mmfast::quantized_linear, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("add"), py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("quantized_grad", &mmfast::quantized_grad, py::arg("grad"), py::arg("weight"), py::arg("add"),
        py::arg("out"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("rms_norm_fwd_cpu", &mmfast::rms_norm_fwd_cpu, py::arg("x"), py::arg("weight"), py::arg("residual"),
        py::arg("eps"), py::arg("y"), py::arg("sum"), py::arg("rstd"), py::arg("threads"),
        py::arg("vector_bits") = 512, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_bwd_cpu", &mmfast::rms_norm_bwd_cpu, py::arg("grad_y"), py::arg("grad_sum"), py::arg("h"),
        py::arg("weight"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("threads"),
        py::arg("vector_bits") = 512, py::call_guard<py::gil_scoped_release>());

  m.def("rope_cpu", &mmfast::rope_cpu, py::arg("from"), py::arg("cos"), py::arg("sin"), py::arg("to"),
        py::arg("adjoint"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("flash_attention_bwd_cpu", &mmfast::flash_attention_bwd_cpu, py::arg("grad_out"), py::arg("query"),
        py::arg("out"), py::arg("lse"), py::arg("key"), py::arg("value"), py::arg("causal"), py::arg("scale"),
        py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"), py::arg("threads"),
        py::arg("vector_bits") = mmfast::TILE_BITS, py::call_guard<py::gil_scoped_release>());
  m.def("gated_cross_attention_fwd_cpu", &mmfast::gated_cross_attention_fwd_cpu, py::arg("query"), py::arg("key"),
        py::arg("value"), py::arg("text_time"), py::arg("media_length"), py::arg("scale"), py::arg("only_latest"),
        py::arg("out"), py::arg("lse"), py::arg("vector_bits"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("gated_cross_attention_bwd_cpu", &mmfast::gated_cross_attention_bwd_cpu, py::arg("grad_out"), py::arg("query"),
        py::arg("out"), py::arg("lse"), py::arg("key"), py::arg("value"), py::arg("text_time"),
        py::arg("media_length"), py::arg("scale"), py::arg("only_latest"), py::arg("grad_query"), py::arg("grad_key"),
        py::arg("grad_value"), py::arg("vector_bits"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def("resampler_attention_fwd_cpu", &mmfast::resampler_attention_fwd_cpu, py::arg("query"), py::arg("media_key"),
        py::arg("media_value"), py::arg("latent_key"), py::arg("latent_value"), py::arg("media_mask"),
        py::arg("scale"), py::arg("out"), py::arg("lse"), py::arg("vector_bits"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("resampler_attention_bwd_cpu", &mmfast::resampler_attention_bwd_cpu, py::arg("grad_out"), py::arg("query"),
        py::arg("out"), py::arg("lse"), py::arg("media_key"), py::arg("media_value"), py::arg("latent_key"),
        py::arg("latent_value"), py::arg("media_mask"), py::arg("scale"), py::arg("grad_query"),
        py::arg("grad_media_key"), py::arg("grad_media_value"), py::arg("grad_latent_key"),
        py::arg("grad_latent_value"), py::arg("vector_bits"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());

  m.def("spatio_temporal_pool_fwd_cpu", &mmfast::spatio_temporal_pool_fwd_cpu, py::arg("features"),
        py::arg("frame_mask"), py::arg("pooled"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("spatio_temporal_pool_bwd_cpu", &mmfast::spatio_temporal_pool_bwd_cpu, py::arg("grad_pooled"),
        py::arg("frame_mask"), py::arg("grad_features"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());

  m.def("swiglu_fwd_cpu", &mmfast::swiglu_fwd_cpu, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("threads"),
        py::arg("vector_bits") = 512, py::call_guard<py::gil_scoped_release>());
  m.def("swiglu_bwd_cpu", &mmfast::swiglu_bwd_cpu, py::arg("grad"), py::arg("gate"), py::arg("up"),
        py::arg("grad_gate"), py::arg("grad_up"), py::arg("threads"), py::arg("vector_bits") = 512,
        py::call_guard<py::gil_scoped_release>());

  m.def("zero_init_attention_fwd_cpu", &mmfast::zero_init_attention_fwd_cpu, py::arg("words"), py::arg("query"),
        py::arg("prompt_key"), py::arg("prompt_value"), py::arg("act"), py::arg("scale"), py::arg("out"),
        py::arg("threads"), py::arg("vector_bits") = mmfast::TILE_BITS, py::call_guard<py::gil_scoped_release>());
  m.def("zero_init_attention_bwd_cpu", &mmfast::zero_init_attention_bwd_cpu, py::arg("grad"), py::arg("query"),
        py::arg("prompt_key"), py::arg("prompt_value"), py::arg("act"), py::arg("scale"), py::arg("grad_query"),
        py::arg("grad_key"), py::arg("grad_value"), py::arg("grad_act"), py::arg("threads"),
        py::arg("vector_bits") = mmfast::TILE_BITS, py::call_guard<py::gil_scoped_release>());
#ifdef MMFAST_WITH_CUDA
  m.def("spatio_temporal_pool_parts_cuda", &mmfast::spatio_temporal_pool_parts_cuda, py::arg("features"),
        py::arg("rows"));
  m.def("spatio_temporal_pool_fwd_cuda", &mmfast::spatio_temporal_pool_fwd_cuda, py::arg("features"),
        py::arg("frame_mask"), py::arg("pooled"), py::arg("temporal"), py::arg("spatial"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
  m.def("spatio_temporal_pool_bwd_cuda", &mmfast::spatio_temporal_pool_bwd_cuda, py::arg("grad_pooled"),
        py::arg("frame_mask"), py::arg("grad_features"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
#endif
}
