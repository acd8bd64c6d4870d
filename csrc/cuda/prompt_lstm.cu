// Launches the kernels of prompt_lstm_kernels.cuh.

#include "prompt_lstm_launch.h"
#include "prompt_lstm_kernels.cuh"

namespace fastprompt {
namespace lstm {
namespace {

using Kernel = void (*)(Args);

template <typename Pass, typename T>
Kernel kernel_of(Exchange exchange) {
  return exchange == Exchange::cluster ? recurrence<Pass, T, ClusterExchange> : recurrence<Pass, T, GridExchange>;
}

template <typename Pass>
Kernel kernel_of(Exchange exchange, Dtype dtype) {
  if (dtype == Dtype::fp32) return kernel_of<Pass, float>(exchange);
  return dtype == Dtype::bf16 ? kernel_of<Pass, __nv_bfloat16>(exchange) : kernel_of<Pass, __half>(exchange);
}

// A kernel and how it is launched.
struct Launch {
  Kernel kernel;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  Launch(const Plan& plan, int directions, Dtype dtype, bool backward, cudaStream_t stream)
      : kernel(backward ? kernel_of<Backward>(plan.exchange, dtype) : kernel_of<Forward>(plan.exchange, dtype)) {
    if (plan.exchange == Exchange::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = plan.blocks;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;  // all blocks run at once, or none
      attribute.val.cooperative = 1;
    }
    config.gridDim = dim3(directions * plan.blocks);
    config.blockDim = dim3(plan.warps * WARP);
    config.dynamicSmemBytes = plan.shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;  // config points into it

  cudaError_t allow(const Plan& plan) const {
    auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    if (error != cudaSuccess || plan.exchange != Exchange::cluster || plan.blocks <= 8) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
};

}  // namespace

cudaError_t run(const Args& args, Dtype dtype, bool backward, cudaStream_t stream) {
  const Launch launch(args.plan, args.directions, dtype, backward, stream);
  auto const error = launch.allow(args.plan);
  return error == cudaSuccess ? cudaLaunchKernelEx(&launch.config, launch.kernel, args) : error;
}

bool runs_at_once(const Plan& plan, int directions, Dtype dtype, bool backward) {
  const Launch launch(plan, directions, dtype, backward, nullptr);
  int clusters = 0;
  auto const granted = launch.allow(plan) == cudaSuccess &&
                       cudaOccupancyMaxActiveClusters(&clusters, launch.kernel, &launch.config) == cudaSuccess;
  cudaGetLastError();  // a refusal is an answer here, not an error of the next launch
  return granted && clusters >= directions;
}

}  // namespace lstm
}  // namespace fastprompt
