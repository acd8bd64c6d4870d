// rotary: heads turned by the positions of their rows. See fastprompt/ops/rotary.

#include "isa.h"
#include "parallel.h"
#include "rotary_kernels.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace fastprompt {
namespace {

using torch::stable::Tensor;

// x, out [batch, rows, heads, width]; cosine, sine [batch or 1, rows, width].
void rotary(Tensor x, Tensor cosine, Tensor sine, bool backward, Tensor out) {
  for (auto const t : {&x, &cosine, &sine, &out}) STD_TORCH_CHECK(t->is_contiguous(), "tensors must be contiguous");
  auto const kernels = FASTPROMPT_BEST(rotary_kernels)(dtype_of(x));
  auto const kernel = backward ? kernels.backward : kernels.forward;
  auto const rows = x.size(0) * x.size(1), heads = x.size(2), width = x.size(3), element = int64_t(x.element_size());
  auto const tables = cosine.size(0) * cosine.size(1), stride = heads * width * element;
  auto const from = static_cast<const char*>(x.const_data_ptr());
  auto const cosines = static_cast<const char*>(cosine.const_data_ptr());
  auto const sines = static_cast<const char*>(sine.const_data_ptr());
  auto const to = static_cast<char*>(out.data_ptr());
  constexpr int64_t NUMBERS = 1 << 15;  // as many as are worth a thread
  parallel_for(0, rows, std::max<int64_t>(1, NUMBERS / std::max<int64_t>(1, heads * width)),
               [&](int64_t begin, int64_t end) {
    for (auto i = begin; i < end; ++i) {
      auto const table = i % tables * width * element;
      kernel({from + i * stride, cosines + table, sines + table, heads, width}, to + i * stride);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("rotary_cpu(Tensor x, Tensor cosine, Tensor sine, bool backward, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) { m.impl("rotary_cpu", TORCH_BOX(&rotary)); }

}  // namespace fastprompt
