// The host's side of prompt_lstm.cu.
#pragma once

#include "prompt_lstm.h"

#include <cuda_runtime.h>

namespace fastprompt {
namespace lstm {

cudaError_t run(const Args& args, Dtype dtype, bool backward, cudaStream_t stream);

// Whether the current device grants the clusters of a plan, those of all directions side by side.
bool runs_at_once(const Plan& plan, int directions, Dtype dtype, bool backward);

}  // namespace lstm
}  // namespace fastprompt
