// The kernels of prompt_lstm under emulation, for tests that call them through ctypes.

#include "../prompt_lstm.cu"

using namespace fastprompt;
using namespace fastprompt::lstm;

extern "C" {

// What `choose` picks.
void choose_plan(const Problem* problem, const Chip* chip, Plan* plan) { *plan = choose(*problem, *chip); }

// A plan of our own choice; room: bytes of shared memory that a block may have, negative: weights in registers.
void make_plan(const Problem* problem, int cluster, int blocks, int room, Plan* plan) {
  auto const exchange = cluster ? Exchange::cluster : Exchange::grid;
  *plan = room < 0 ? in_registers(*problem, exchange, blocks) : in_shared(*problem, exchange, blocks, room);
}

// Runs `args`, whose `aligned` is found here. The error; empty if there is none.
const char* run_emulated(const Args* args, const Problem* problem, int dtype, uint64_t seed) {
  auto given = *args;
  given.aligned = rows_aligned(given.matrix[0], *problem) && rows_aligned(given.matrix[given.directions - 1], *problem);
  emulation::seed = seed;
  run(given, Dtype(dtype), problem->backward, nullptr);
  return emulation::error.c_str();
}

}
