// gated_activation: activation(gate) * up, elementwise. See fastprompt/ops/gated_activation.

#include "gated_activation_kernels.h"
#include "isa.h"
#include "parallel.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastprompt {
namespace {

using torch::stable::Tensor;

constexpr int64_t NUMBERS = 1 << 14;  // as many as are worth a thread

GatedKernels kernels_of(const Tensor& gate, int64_t activation) {
  return FASTPROMPT_BEST(gated_kernels)(dtype_of(gate), static_cast<Activation>(activation));
}

const char* data_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "tensors must be contiguous");
  return static_cast<const char*>(x.const_data_ptr());
}

// out: written.
void forward(Tensor gate, Tensor up, int64_t activation, Tensor out) {
  auto const kernel = kernels_of(gate, activation).forward;
  auto const g = data_of(gate), u = data_of(up);
  auto const to = static_cast<char*>(out.data_ptr());
  auto const size = int64_t(gate.element_size());
  parallel_for(0, gate.numel(), NUMBERS, [&](int64_t begin, int64_t end) {
    auto const at = begin * size;
    kernel(g + at, u + at, to + at, end - begin);
  });
}

// dgate, dup: written; one without numbers is not needed.
void backward(Tensor grad, Tensor gate, Tensor up, int64_t activation, Tensor dgate, Tensor dup) {
  auto const kernel = kernels_of(gate, activation).backward;
  auto const d = data_of(grad), g = data_of(gate), u = data_of(up);
  auto const of_gate = dgate.numel() ? static_cast<char*>(dgate.data_ptr()) : nullptr;
  auto const of_up = dup.numel() ? static_cast<char*>(dup.data_ptr()) : nullptr;
  auto const size = int64_t(gate.element_size());
  parallel_for(0, gate.numel(), NUMBERS, [&](int64_t begin, int64_t end) {
    auto const at = begin * size;
    kernel(d + at, g + at, u + at, of_gate ? of_gate + at : nullptr, of_up ? of_up + at : nullptr, end - begin);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("gated_activation_cpu(Tensor gate, Tensor up, int activation, Tensor(a!) out) -> ()");
  m.def(
      "gated_activation_backward_cpu(Tensor grad, Tensor gate, Tensor up, int activation, Tensor(a!) dgate, "
      "Tensor(b!) dup) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) {
  m.impl("gated_activation_cpu", TORCH_BOX(&forward));
  m.impl("gated_activation_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace fastprompt
