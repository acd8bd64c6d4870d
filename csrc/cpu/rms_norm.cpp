// rms_norm: rows over their root mean square, times a weight. See fastprompt/ops/rms_norm.

#include "isa.h"
#include "parallel.h"
#include "rms_norm_kernels.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace fastprompt {
namespace {

using torch::stable::Tensor;

// Call row(i, the row) for each row of x [n, width].
template <typename Function>
void each_row(const Tensor& x, const Tensor& weight, const Function& row) {
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous(), "tensors must be contiguous");
  constexpr int64_t NUMBERS = 1 << 15;  // as many as are worth a thread
  auto const width = x.size(1), stride = int64_t(width * x.element_size());
  auto const rows = static_cast<const char*>(x.const_data_ptr());
  parallel_for(0, x.size(0), std::max<int64_t>(1, NUMBERS / std::max<int64_t>(1, width)),
               [&](int64_t begin, int64_t end) {
    for (auto i = begin; i < end; ++i) row(i, stride, NormRow{rows + i * stride, weight.const_data_ptr(), width});
  });
}

// out [n, width], factors [n] fp32: written.
void forward(Tensor x, Tensor weight, double eps, Tensor out, Tensor factors) {
  auto const kernel = FASTPROMPT_BEST(norm_kernels)(dtype_of(x)).forward;
  auto const to = static_cast<char*>(out.data_ptr());
  auto const factor = static_cast<float*>(factors.data_ptr());
  each_row(x, weight, [&](int64_t i, int64_t stride, const NormRow& row) {
    factor[i] = kernel(row, float(eps), to + i * stride);
  });
}

// dx [n, width]: written.
void backward(Tensor grad, Tensor x, Tensor weight, Tensor factors, Tensor dx) {
  STD_TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  auto const kernel = FASTPROMPT_BEST(norm_kernels)(dtype_of(x)).backward;
  auto const from = static_cast<const char*>(grad.const_data_ptr());
  auto const to = static_cast<char*>(dx.data_ptr());
  auto const factor = static_cast<const float*>(factors.const_data_ptr());
  each_row(x, weight, [&](int64_t i, int64_t stride, const NormRow& row) {
    kernel(row, factor[i], from + i * stride, to + i * stride);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("rms_norm_cpu(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) factors) -> ()");
  m.def("rms_norm_backward_cpu(Tensor grad, Tensor x, Tensor weight, Tensor factors, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) {
  m.impl("rms_norm_cpu", TORCH_BOX(&forward));
  m.impl("rms_norm_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace fastprompt
