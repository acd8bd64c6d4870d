// The kernels of prompt_lstm under emulation, for tests that call them through ctypes.

#include "../prompt_lstm.cu"

using namespace fastprompt;
using namespace fastprompt::lstm;

// Runs `args`, whose `aligned` is found here. The error; empty if there is none.
extern "C" const char* run_emulated(const Args* args, const Problem* problem, int dtype, uint64_t seed) {
  auto given = *args;
  given.aligned = rows_aligned(given.matrix[0], *problem) && rows_aligned(given.matrix[given.directions - 1], *problem);
  emulation::seed = seed;
  run(given, Dtype(dtype), problem->backward, nullptr);
  return emulation::error.c_str();
}
