// The operator of the CUDA kernels, on torch's stable interface. A library of its own: what it asks torch for (a stream
// of CUDA's) is only in builds of torch with CUDA. See fastprompt/native.py.

#include "prompt_lstm_launch.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace fastprompt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

Dtype dtype_of(const Tensor& x) {
  auto const type = x.scalar_type();
  if (type == ScalarType::Float) return Dtype::fp32;
  if (type == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, "weights must be fp32, bf16 or fp16");
  return Dtype::fp16;
}

// With the largest clusters that the device grants, and none before sm_90.
lstm::Plan plan_for(const lstm::Problem& problem, Dtype dtype, int device) {
  lstm::Chip chip{attribute(cudaDevAttrMultiProcessorCount, device),
                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), 0};
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9) {
    for (int cluster : {16, 8}) {
      chip.cluster = cluster;
      auto const plan = lstm::choose(problem, chip);
      if (plan.exchange == lstm::Exchange::cluster &&
          lstm::runs_at_once(plan, problem.directions, dtype, problem.backward)) {
        return plan;
      }
    }
    chip.cluster = 0;
  }
  auto const plan = lstm::choose(problem, chip);
  STD_TORCH_CHECK(lstm::fits(plan, chip), "hidden size ", problem.hidden, " needs ", plan.shared,
                  " bytes of shared memory a block, the device has ", chip.shared);
  return plan;
}

const float* floats(const Tensor& x, const char* name, int64_t numel) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == numel, name,
                  " must be contiguous fp32 with ", numel, " elements");
  return static_cast<const float*>(x.const_data_ptr());
}

// Args in prompt_lstm.h says what the tensors are.
void recurrence(std::vector<Tensor> matrices, Tensor input, Tensor steps, Tensor output, Tensor words, bool backward) {
  STD_TORCH_CHECK(matrices.size() == 1 || matrices.size() == 2, "expected one or two directions, got ",
                  matrices.size());
  auto const device = matrices[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  lstm::Args args{};
  args.directions = int(matrices.size());
  args.hidden = int(steps.size(3));
  args.count = int(steps.size(1));
  const lstm::Problem problem{args.hidden, args.directions, int(matrices[0].element_size()), backward};
  auto const dtype = dtype_of(matrices[0]);
  auto const width = lstm::chunks(problem.columns(), problem.element) * (lstm::CHUNK / problem.element);
  for (int i = 0; i < args.directions; ++i) {
    auto const& matrix = matrices[i];
    args.matrix[i] = matrix.const_data_ptr();
    STD_TORCH_CHECK(matrix.is_contiguous() &&
                        matrix.numel() == int64_t(width) * args.hidden * problem.rows_per_unit() &&
                        dtype_of(matrix) == dtype && matrix.get_device_index() == device &&
                        reinterpret_cast<uintptr_t>(args.matrix[i]) % lstm::CHUNK == 0,
                    "matrices must be contiguous with rows of whole chunks, of one dtype and on one device");
  }
  auto const rows = int64_t(args.directions) * args.count * args.hidden;  // of H: the states of all steps
  args.input = floats(input, "input", backward ? rows : 4 * rows);
  args.steps = const_cast<float*>(floats(steps, "steps", 5 * rows));
  args.output = const_cast<float*>(floats(output, "output", backward ? 4 * rows : rows));
  STD_TORCH_CHECK(words.numel() == 2ll * args.directions * problem.columns() && words.element_size() == 8 &&
                      words.is_contiguous(), "words must be contiguous int64, two for each column of each direction");
  args.words = static_cast<unsigned long long*>(words.mutable_data_ptr());
  args.plan = plan_for(problem, dtype, device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no CUDA stream");
  check(lstm::run(args, dtype, backward, static_cast<cudaStream_t>(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("prompt_lstm_recurrence_cuda(Tensor[] matrices, Tensor input, Tensor(a!) steps, Tensor(b!) output, "
        "Tensor(c!) words, bool backward) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CUDA, m) { m.impl("prompt_lstm_recurrence_cuda", TORCH_BOX(&recurrence)); }

}  // namespace fastprompt
