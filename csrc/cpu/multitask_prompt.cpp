// multitask_prompt: a shared prompt times a low-rank factor per task, which is never stored. See
// fastprompt/ops/multitask_prompt.

#include "isa.h"
#include "multitask_prompt_kernels.h"
#include "parallel.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace fastprompt {
namespace {

using torch::stable::Tensor;

struct Arguments : TaskPrompts {
  std::vector<int64_t> ids;
  bool in_range = true;

  Arguments(const Tensor& shared_, const Tensor& rows_, const Tensor& cols_, const Tensor& task_ids) {
    STD_TORCH_CHECK(shared_.is_contiguous() && rows_.is_contiguous() && cols_.is_contiguous(),
                    "tensors must be contiguous");
    const Ints given(task_ids);
    for (int64_t n = 0; n < given.size(); ++n) {
      ids.push_back(given[n]);
      in_range = in_range && 0 <= given[n] && given[n] < rows_.size(0);
    }
    shared = shared_.data_ptr();
    rows = rows_.data_ptr();
    cols = cols_.data_ptr();
    tasks = ids.data();
    count = given.size();
    length = shared_.size(0);
    width = shared_.size(1);
    rank = rows_.size(2);
  }
  int64_t room() const { return (CHUNK + BLOCK) * rank; }  // floats, for a kernel
};

// False where a task is out of range; nothing is written then.
bool forward(Tensor shared, Tensor rows, Tensor cols, Tensor task_ids, Tensor out) {
  const Arguments a(shared, rows, cols, task_ids);
  if (!a.in_range) return false;
  auto const kernel = FASTPROMPT_BEST(multitask_kernels)(dtype_of(shared)).forward;
  auto const blocks = (a.width + BLOCK - 1) / BLOCK;
  auto const work = a.length * BLOCK * (a.rank + 1);
  parallel_for(0, a.count * blocks, std::max<int64_t>(1, 20000 / std::max<int64_t>(1, work)),
               [&](int64_t begin, int64_t end) {
    std::vector<float> room(a.room());
    for (auto i = begin; i < end; ++i) kernel(a, out.data_ptr(), i / blocks, i % blocks * BLOCK, room.data());
  });
  return true;
}

// Prompts of one task, in rising order.
struct Readers {
  std::vector<int64_t> tasks, slots;  // the distinct tasks; for each prompt, which of them it is of

  explicit Readers(const std::vector<int64_t>& ids) : tasks(ids) {
    std::sort(tasks.begin(), tasks.end());
    tasks.erase(std::unique(tasks.begin(), tasks.end()), tasks.end());
    for (auto id : ids) slots.push_back(std::lower_bound(tasks.begin(), tasks.end(), id) - tasks.begin());
  }
};

// Each of the gradients may be missing; those of rows and cols are zero at first. False as for forward.
bool backward(Tensor grad, Tensor shared, Tensor rows, Tensor cols, Tensor task_ids, std::optional<Tensor> dshared,
              std::optional<Tensor> drows, std::optional<Tensor> dcols) {
  const Arguments a(shared, rows, cols, task_ids);
  if (!a.in_range) return false;
  STD_TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  const Readers readers(a.ids);
  auto const kernels = FASTPROMPT_BEST(multitask_kernels)(dtype_of(shared));
  auto const element = int64_t(shared.element_size());
  auto const blocks = (a.width + BLOCK - 1) / BLOCK, distinct = int64_t(readers.tasks.size());
  auto const per_task = a.length * a.rank, per_block = a.count * per_task;
  std::vector<float> row_sums(drows ? blocks * per_block : 0);  // [blocks, N, P, r]

  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> col_sums(dcols ? distinct * a.rank * BLOCK : 0), room(a.room());
    for (auto block = begin; block < end; ++block) {
      std::fill(col_sums.begin(), col_sums.end(), 0.f);
      kernels.backward(a, grad.data_ptr(), block * BLOCK,
                       {dshared ? dshared->data_ptr() : nullptr, drows ? row_sums.data() + block * per_block : nullptr,
                        dcols ? col_sums.data() : nullptr, readers.slots.data()},
                       room.data());
      for (int64_t i = 0; dcols && i < distinct * a.rank; ++i) {
        auto const row = readers.tasks[i / a.rank] * a.rank + i % a.rank;
        auto const to = static_cast<char*>(dcols->data_ptr()) + (row * a.width + block * BLOCK) * element;
        kernels.narrow(&col_sums[i * BLOCK], to, std::min(BLOCK, a.width - block * BLOCK));
      }
    }
  });

  if (drows) {  // the blocks of columns in order, and the prompts of one task
    std::vector<float> total(distinct * per_task);
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t n = 0; n < a.count; ++n) {
        auto const from = row_sums.data() + block * per_block + n * per_task;
        auto const to = total.data() + readers.slots[n] * per_task;
        for (int64_t i = 0; i < per_task; ++i) to[i] += from[i];
      }
    }
    for (int64_t slot = 0; slot < distinct; ++slot) {
      auto const to = static_cast<char*>(drows->data_ptr()) + readers.tasks[slot] * per_task * element;
      kernels.narrow(total.data() + slot * per_task, to, per_task);
    }
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("multitask_prompt_cpu(Tensor shared, Tensor rows, Tensor cols, Tensor task_ids, Tensor(a!) out) -> bool");
  m.def("multitask_prompt_backward_cpu(Tensor grad, Tensor shared, Tensor rows, Tensor cols, Tensor task_ids, "
        "Tensor(a!)? dshared, Tensor(b!)? drows, Tensor(c!)? dcols) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) {
  m.impl("multitask_prompt_cpu", TORCH_BOX(&forward));
  m.impl("multitask_prompt_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace fastprompt
