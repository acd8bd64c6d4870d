// prompt_concat: rows gathered from two tensors, and the sums of what was gathered. See fastprompt/ops/prompt_concat.

#include "isa.h"
#include "parallel.h"
#include "prompt_concat_kernels.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

namespace fastprompt {
namespace {

using torch::stable::Tensor;

constexpr int64_t BYTES_PER_PIECE = 1 << 15;  // less is not worth a thread

// A tensor of rows whose columns stand side by side.
struct Rows {
  char* data;
  int64_t count, width, stride, element;  // stride and element in bytes

  explicit Rows(const Tensor& x)
      : data(static_cast<char*>(x.data_ptr())), count(x.size(0)), width(x.size(1)), element(x.element_size()) {
    stride = x.stride(0) * element;
    STD_TORCH_CHECK(width <= 1 || x.stride(1) == 1, "columns must stand side by side");
  }
  char* operator[](int64_t i) const { return data + i * stride; }
  int64_t grain() const { return std::max<int64_t>(1, BYTES_PER_PIECE / std::max<int64_t>(1, width * element)); }
};

// For each row of a source, the positions that read it. A counting sort, so they stand in rising order.
class Readers {
 public:
  // Position r reads row key(source[r]), or none of these where that is negative.
  template <typename Key>
  Readers(Ints source, int64_t rows, Key key) : begin_(rows + 1) {
    const std::unique_ptr<int64_t[]> readers(new int64_t[source.size()]);
    int64_t count = 0;
    for (int64_t r = 0; r < source.size(); ++r) {  // no branch: tokens and prompts alternate as they like
      readers[count] = r;
      count += key(source[r]) >= 0;
    }
    for (int64_t i = 0; i < count; ++i) ++begin_[key(source[readers[i]]) + 1];
    for (int64_t i = 0; i < rows; ++i) begin_[i + 1] += begin_[i];
    order_.resize(count);
    auto next = begin_;
    for (int64_t i = 0; i < count; ++i) order_[next[key(source[readers[i]])]++] = readers[i];
  }
  const int64_t* of(int64_t row) const { return order_.data() + begin_[row]; }
  int64_t count(int64_t row) const { return begin_[row + 1] - begin_[row]; }
  int64_t average() const { return int64_t(order_.size() / begin_.size()); }

 private:
  std::vector<int64_t> begin_, order_;
};

void sum_readers(const Rows& grad, const Readers& readers, const Rows& out, float factor, Dtype dtype) {
  auto const sum_rows = FASTPROMPT_BEST(row_kernels)(dtype).sum_rows;
  auto const pieces = (grad.width + COLUMNS - 1) / COLUMNS;  // of a row
  auto const bytes = std::min(COLUMNS, std::max<int64_t>(grad.width, 1)) * grad.element * (readers.average() + 1);
  parallel_for(0, out.count * pieces, std::max<int64_t>(1, BYTES_PER_PIECE / bytes), [&](int64_t begin, int64_t end) {
    for (auto i = begin; i < end; ++i) {
      auto const row = i / pieces, column = i % pieces * COLUMNS, offset = column * grad.element;
      auto const width = std::min(COLUMNS, grad.width - column);
      auto const to = out[row] + offset;
      if (readers.count(row) == 1 && factor == 1) {
        std::memcpy(to, grad[*readers.of(row)] + offset, width * grad.element);
      } else {
        sum_rows({to, grad.data + offset, grad.stride / grad.element, width, readers.of(row), readers.count(row),
                  factor});
      }
    }
  });
}

// False where a source is out of range; the rows are then not all written.
bool forward(Tensor source, Tensor table, Tensor prompt, double scale, Tensor rows) {
  const Ints from(source);
  const Rows tokens(table), vectors(prompt), out(rows);
  use_large_pages(rows);
  auto const scale_row = FASTPROMPT_BEST(row_kernels)(dtype_of(table)).scale;
  auto const inside = [&](int64_t s) { return -vectors.count <= s && s < tokens.count; };
  auto const row = [&](int64_t s) { return s >= 0 ? tokens[s] : vectors[-1 - s]; };
  auto const bytes = out.width * out.element;
  auto const ahead = 1 + 4096 / std::max<int64_t>(1, bytes);  // rows; enough of them to hide the way to memory
  std::atomic<bool> in_range{true};
  parallel_for(0, out.count, out.grain(), [&](int64_t begin, int64_t end) {
    for (auto r = begin; r < end; ++r) {
      auto const s = from[r];
      if (!inside(s)) {
        in_range = false;
        continue;
      }
      if (r + ahead < end && inside(from[r + ahead])) portable::prefetch(row(from[r + ahead]), bytes);
      if (s >= 0 && scale != 1) {
        scale_row({out[r], row(s), out.width, float(scale)});
      } else if (bytes) {
        std::memcpy(out[r], row(s), bytes);
      }
    }
  });
  return in_range;
}

// Each of the gradients may be missing. False where a source is out of range; nothing is written then.
bool backward(Tensor grad, Tensor source, double scale, std::optional<Tensor> dtable, std::optional<Tensor> dprompt,
              int64_t table_rows, int64_t prompt_rows) {
  const Ints from(source);
  bool in_range = true;
  for (int64_t r = 0; r < from.size(); ++r) {
    in_range &= uint64_t(from[r]) + prompt_rows < uint64_t(table_rows + prompt_rows);
  }
  if (!in_range) return false;
  const Rows rows(grad);
  if (dtable) {
    sum_readers(rows, Readers(from, table_rows, [](int64_t s) { return s; }), Rows(*dtable), float(scale),
                dtype_of(grad));
  }
  if (dprompt) {
    sum_readers(rows, Readers(from, prompt_rows, [](int64_t s) { return -1 - s; }), Rows(*dprompt), 1, dtype_of(grad));
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("prompt_concat_cpu(Tensor source, Tensor table, Tensor prompt, float scale, Tensor(a!) rows) -> bool");
  m.def("prompt_concat_backward_cpu(Tensor grad, Tensor source, float scale, Tensor(a!)? dtable, Tensor(b!)? dprompt, "
        "int table_rows, int prompt_rows) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) {
  m.impl("prompt_concat_cpu", TORCH_BOX(&forward));
  m.impl("prompt_concat_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace fastprompt
