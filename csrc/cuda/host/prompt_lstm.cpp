// The kernels of prompt_lstm under emulation, for tests that call them through ctypes.

#include "../prompt_lstm.cu"

using namespace fastprompt;
using namespace fastprompt::lstm;

// The error; empty if there is none.
extern "C" const char* run_emulated(const Args* args, int dtype, bool backward, uint64_t seed) {
  emulation::seed = seed;
  run(*args, Dtype(dtype), backward, nullptr);
  return emulation::error.c_str();
}
