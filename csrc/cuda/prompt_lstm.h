// The recurrence of prompt_lstm on a GPU: what a call is given, and which kernel runs it. Plain C++: no GPU is asked.
//
// Of one layer and both of its directions, over all steps, in one launch. The products with the input and the gradients
// of the weights are matrix products of all steps at once and are left to torch (fastprompt/ops/prompt_lstm/cuda.py).
//
// A *pass* multiplies a matrix [rows, columns] by a vector in each step, and the result is the next step's vector:
//
//            matrix          rows of a unit      columns, the vector
//   forward  W_hh [4H, H]    4, one a gate       H hidden states
//   backward its transpose   1                   4H gradients of the gates
//
// Each direction has `blocks` blocks, and a block owns all rows of some hidden units, so that cells never leave it. A
// warp computes the rows of one *tile* of units together. Of each row, as chunks of 16 bytes,
//
//   held      the first stand in registers from before the first step: 2 chunks for each lane and gate, so
//             4 units x 4 gates x 2 chunks x 4 registers = 128 of the 255 registers of a thread. 8 such warps fill the
//             65536 registers of a multiprocessor; a block with more tiles than that holds nothing in registers;
//   kept      the next stand in shared memory;
//   streamed  the rest is read from the L2 cache in every step.
//
// The vector goes from block to block in one of two ways (Exchange):
//
//   cluster   The blocks of a direction are one cluster and write into each other's shared memory; from sm_90 on, with
//             16 blocks or what the card grants, 8 at least. Nothing is streamed.
//   grid      All multiprocessors take part, and the vector goes through global memory (the L2 cache).
//
// All stands in registers up to H = 256 in fp32 and 512 in half precision, of 32 units a block. The largest H by the
// budget of shared memory too, 2 directions, the worse of both passes (tests/test_prompt_lstm_cuda.py checks these):
//
//                 cluster                        nothing streamed
//                 16 x 227 KiB  8 x 227  8 x 99  A100  H100  B200  RTX 5090
//   fp32          512           320      256     800   1024  1024  680
//   fp16, bf16    640           448      288     1168  1472  1480  1024
//
// Streaming ends where the two buffers of 4H floats alone are too large: near H = 3000 with 99 KiB of shared memory a
// block, 5100 with 163, 7100 with 227.
#pragma once

#include <algorithm>

namespace fastprompt {

enum class Dtype { fp32, bf16, fp16 };

namespace lstm {

constexpr int WARP = 32;
constexpr int CHUNK = 16;  // bytes that a thread loads at once

constexpr int UNITS = 4;   // of a tile
constexpr int WARPS = 8;   // of a block
constexpr int HELD = 2;    // chunks of a gate that a lane holds in registers, for each unit of its tile

enum class Exchange { cluster, grid };

struct Chip {
  int processors;  // multiprocessors
  int shared;      // bytes of shared memory that a block may have
  int cluster;     // blocks of the largest cluster; 0: there are none
};

struct Problem {
  int hidden, directions, element;  // H, 1 or 2, bytes of a weight
  bool backward;

  int columns() const { return backward ? 4 * hidden : hidden; }
  int rows_per_unit() const { return backward ? 1 : 4; }
};

struct Plan {
  Exchange exchange;
  int blocks;      // of a direction
  int tiles;       // of a block
  int warps;       // of a block; those without a tile help to receive the vector
  int held, kept;  // chunks of each row in registers and in shared memory
  int shared;      // bytes of shared memory of a block
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Chunks of a row; the last may be incomplete.
constexpr int chunks(int columns, int element) { return ceil_div(columns, CHUNK / element); }

// Floats of a buffer of the vector: whole chunks for every lane, zero past the end.
constexpr int padded(int columns, int element) {
  return ceil_div(chunks(columns, element), WARP) * WARP * (CHUNK / element);
}

// With as much of the rows in registers, unless told not to, and in `room` bytes of shared memory as there is space
// for.
inline Plan plan_of(const Problem& p, Exchange exchange, int blocks, int room, bool registers = true) {
  auto const tiles = ceil_div(ceil_div(p.hidden, UNITS), blocks);
  // A block of a grid without units would send nothing, and nobody would wait until it has received what it is sent.
  if (exchange == Exchange::grid) blocks = ceil_div(ceil_div(p.hidden, UNITS), tiles);
  auto const rows = UNITS * p.rows_per_unit(), all = chunks(p.columns(), p.element);
  auto const held = registers && tiles <= WARPS ? std::min(all, HELD * 4 / p.rows_per_unit() * WARP) : 0;
  // Two buffers of the vector, and for each lane of a tile what it carries to the next step.
  auto const fixed = int(sizeof(float)) * (2 * padded(p.columns(), p.element) + tiles * WARP);
  auto kept = std::max(0, std::min(all - held, (room - fixed) / (tiles * rows * CHUNK)));
  if (held + kept < all) kept = kept / WARP * WARP;  // all lanes of a warp go one way
  return {exchange, blocks, tiles, WARPS, held, kept, fixed + kept * tiles * rows * CHUNK};
}

// A cluster before a grid. The fewest blocks that hold all in registers, for they wait for each other in every step;
// else as many as there are, for reading shared memory then takes most of a step.
inline Plan choose(const Problem& p, const Chip& chip) {
  auto const all = chunks(p.columns(), p.element), tiles = ceil_div(p.hidden, UNITS);
  for (auto blocks = 1; blocks <= chip.cluster; blocks *= 2) {
    auto const plan = plan_of(p, Exchange::cluster, blocks, chip.shared);
    if (plan.held == all || (blocks == chip.cluster && plan.held + plan.kept == all)) return plan;
  }
  auto const plan = plan_of(p, Exchange::grid, ceil_div(tiles, WARPS), chip.shared);
  if (plan.held == all && plan.blocks * p.directions <= chip.processors) return plan;
  return plan_of(p, Exchange::grid, std::max(1, chip.processors / p.directions), chip.shared);
}

// Whether a block's buffers alone are not too large.
inline bool fits(const Plan& plan, const Chip& chip) { return plan.shared <= chip.shared; }

// What a kernel is given. D directions, P steps; all contiguous. `matrix` has the dtype of the weights. Row r of
// `input` and `output` belongs to row r of the sequence, which the second direction runs from the last to the first;
// `steps` are in the order in which a direction runs them.
struct Args {
  const void* matrix[2];      // of each direction, [4H, H], backward [H, 4H]; rows filled up to whole chunks by zeros
  const float* input;         // forward: what the input adds to the gates, [D, P, 4H]; backward: dhidden, [P, D * H]
  float* steps;               // [D, P, 5, H]: gates i, f, g, o and cells; backward only reads them
  float* output;              // forward: hidden states, [P, D * H]; backward: dgates, [D, P, 4H]
  unsigned long long* words;  // [D, 2, columns], zero; for Exchange::grid
  int count, hidden, directions;  // count: P
  Plan plan;
};

}  // namespace lstm
}  // namespace fastprompt
