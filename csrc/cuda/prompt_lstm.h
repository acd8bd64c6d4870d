// The recurrence of prompt_lstm on a GPU: what a call is given, and which kernel runs it. Plain C++, no GPU is asked here.
//
// Of one layer and both of its directions, over all steps, in one launch. The products with the input and the gradients of
// the weights are matrix products of all steps at once and are left to torch (see fastprompt/ops/prompt_lstm/cuda.py).
//
// A *pass* multiplies a matrix [rows, columns] by a vector in each step and hands the result on as the next step's vector:
//
//            matrix          rows of a unit      columns, the vector
//   forward  W_hh [4H, H]    4, one a gate       H hidden states
//   backward its transpose   1                   4H gradients of the gates
//
// Each direction has `blocks` blocks, and a block owns all rows of some hidden units, so that cells never leave it. Its rows
// stay where it has loaded them before the first step (Storage); the vector goes from block to block (Exchange). Units come
// in tiles: a warp computes the rows of one tile together.
//
// Where the rows stay, and which way the vector takes (`choose`):
//
//   registers  The rows of 4 units in a warp's registers: 4 units x 4 gates x H / 32 lanes weights, that is 128 of the 255
//              registers of a thread at H = 256 in fp32 and at H = 512 in half precision. 8 such warps fill the 65536
//              registers of a multiprocessor and own 32 units, so a direction has at most 8, respectively 16, blocks.
//   shared     In the shared memory of the blocks, 4 H^2 weights of a direction in all.
//   cluster    The blocks of a direction form a cluster and write into each other's shared memory; from sm_90 on, with 16
//              blocks or what the card grants, 8 at least.
//   grid       All multiprocessors take part, and the vector goes through global memory (the L2 cache).
//   streaming  A grid whose shared memory holds a part of each row; the rest is read from the L2 cache in every step.
//
// The largest H, by shared memory and for both passes, 2 directions (tests/test_prompt_lstm_cuda.py holds these to account):
//
//                               cluster                      not streaming
//                               16 x 227 KiB  8 x 227  8 x 99   A100  H100  B200  RTX 5090
//   fp32                        448           320      256      648   896   896   624
//   fp16, bf16                  640           456      288      936   1200  1304  848
//
// Streaming ends where the two buffers of 4H floats alone are too large: at H = 2750 with 99 KiB of shared memory a block,
// 4990 with 163, 7040 with 227.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastprompt {

enum class Dtype { fp32, bf16, fp16 };

namespace lstm {

constexpr int WARP = 32;
constexpr int CHUNK = 16;  // bytes that a thread loads at once

// What `Storage` means for a tile: its units, and the most warps of a block.
struct InRegisters {
  static constexpr int UNITS = 4, WARPS = 8;
  static constexpr int CHUNKS = 2;  // of a gate's row, a lane
};
struct InShared {
  static constexpr int UNITS = 2, WARPS = 12;
};

enum class Exchange { cluster, grid };
enum class Storage { registers, shared };

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
  Storage storage;
  int blocks;  // of a direction
  int tiles;   // of a block
  int warps;   // of a block
  int kept;    // chunks of each row in the block's shared memory; the rest is streamed
  int shared;  // bytes of shared memory of a block
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Chunks of a row; the last may be incomplete.
constexpr int chunks(int columns, int element) { return ceil_div(columns, CHUNK / element); }

// Floats of a buffer of the vector: whole chunks for every lane, zero past the end.
constexpr int padded(int columns, int element) {
  return ceil_div(chunks(columns, element), WARP) * WARP * (CHUNK / element);
}

// Two buffers of the vector, and for each lane of a tile what it carries to the next step.
inline int fixed_bytes(const Problem& p, int tiles) {
  return int(sizeof(float)) * (2 * padded(p.columns(), p.element) + tiles * WARP);
}

inline Plan in_registers(const Problem& p, Exchange exchange, int blocks) {
  auto const tiles = ceil_div(ceil_div(p.hidden, InRegisters::UNITS), blocks);
  return {exchange, Storage::registers, blocks, tiles, tiles, 0, fixed_bytes(p, tiles)};
}

// With as much of the rows in shared memory as `room` bytes allow.
inline Plan in_shared(const Problem& p, Exchange exchange, int blocks, int room) {
  auto const tiles = ceil_div(ceil_div(p.hidden, InShared::UNITS), blocks);
  auto const rows = tiles * InShared::UNITS * p.rows_per_unit();
  auto const all = chunks(p.columns(), p.element), fixed = fixed_bytes(p, tiles);
  auto kept = std::max(0, std::min(all, (room - fixed) / (rows * CHUNK)));
  if (kept < all) kept = kept / WARP * WARP;  // no warp takes both ways at once
  return {exchange, Storage::shared, blocks, tiles, std::min(tiles, InShared::WARPS), kept, fixed + kept * rows * CHUNK};
}

// A cluster before a grid, and registers before shared memory; in registers with few blocks, for they all wait for each other
// in every step. In shared memory with as many as there are, for reading it takes most of a step.
inline Plan choose(const Problem& p, const Chip& chip) {
  auto const narrow = chunks(p.hidden, p.element) <= InRegisters::CHUNKS * WARP;
  auto const least = ceil_div(ceil_div(p.hidden, InRegisters::UNITS), InRegisters::WARPS);
  auto blocks = 1;
  while (blocks < least) blocks *= 2;
  if (narrow && blocks <= chip.cluster) return in_registers(p, Exchange::cluster, blocks);
  if (chip.cluster) {
    auto const plan = in_shared(p, Exchange::cluster, chip.cluster, chip.shared);
    if (plan.kept == chunks(p.columns(), p.element)) return plan;
  }
  if (narrow && blocks * p.directions <= chip.processors) return in_registers(p, Exchange::grid, blocks);
  auto const tiles = ceil_div(p.hidden, InShared::UNITS);
  auto const most = std::max(1, std::min(tiles, chip.processors / p.directions));
  return in_shared(p, Exchange::grid, ceil_div(tiles, ceil_div(tiles, most)), chip.shared);
}

// Whether a block's buffers alone are not too large.
inline bool fits(const Plan& plan, const Chip& chip) { return plan.shared <= chip.shared; }

// Whether rows of a matrix can be read a chunk at a time.
inline bool rows_aligned(const void* matrix, const Problem& p) {
  return reinterpret_cast<uintptr_t>(matrix) % CHUNK == 0 && p.columns() * p.element % CHUNK == 0;
}

// What a kernel is given. D directions, P steps; all contiguous. `matrix` has the dtype of the weights. Row r of `input` and
// `output` belongs to row r of the sequence, which the second direction runs from the last to the first; `steps` are in the
// order in which a direction runs them.
struct Args {
  const void* matrix[2];      // of each direction, [4H, H]; backward: [H, 4H]
  const float* input;         // forward: what the input adds to the gates, [D, P, 4H]; backward: dhidden, [P, D * H]
  float* steps;               // [D, P, 5, H]: gates i, f, g, o and cells; backward only reads them
  float* output;              // forward: hidden states, [P, D * H]; backward: dgates, [D, P, 4H]
  unsigned long long* words;  // [D, 2, columns], zero; for Exchange::grid
  int count, hidden, directions;  // count: P
  bool aligned;               // rows_aligned of all matrices
  Plan plan;
};

}  // namespace lstm
}  // namespace fastprompt
