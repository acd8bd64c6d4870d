// The arithmetic of prompt_lstm.h, for callers through ctypes.

#include "../prompt_lstm.h"

using namespace fastprompt::lstm;

extern "C" {

// What `choose` picks.
void choose_plan(const Problem* problem, const Chip* chip, Plan* plan) { *plan = choose(*problem, *chip); }

// A plan of the caller's own choice; room: bytes of shared memory that a block may have.
void make_plan(const Problem* problem, int cluster, int blocks, int room, bool registers, Plan* plan) {
  *plan = plan_of(*problem, cluster ? Exchange::cluster : Exchange::grid, blocks, room, registers);
}

}
