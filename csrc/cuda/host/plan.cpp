// The arithmetic of prompt_lstm.h, for callers through ctypes.

#include "../prompt_lstm.h"

using namespace fastprompt::lstm;

extern "C" {

// What `choose` picks.
void choose_plan(const Problem* problem, const Chip* chip, Plan* plan) { *plan = choose(*problem, *chip); }

// A plan of the caller's own choice; room: bytes of shared memory that a block may have, negative: weights in registers.
void make_plan(const Problem* problem, int cluster, int blocks, int room, Plan* plan) {
  auto const exchange = cluster ? Exchange::cluster : Exchange::grid;
  *plan = room < 0 ? in_registers(*problem, exchange, blocks) : in_shared(*problem, exchange, blocks, room);
}

}
