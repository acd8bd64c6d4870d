// What prompt_lstm computes on parts of a layer, once per instruction set; bf16 and fp16 are widened to fp32.
#pragma once

#include "simd.h"

#include <cstdint>

namespace fastprompt {

// Floats between two rows: an odd number of cache lines, or a column's rows would fall into few sets.
constexpr int64_t padded(int64_t width) { return ((width + 15) / 16 | 1) * 16; }

// One direction of one layer. Its steps are numbered in the order they run, its rows in that of the input: the backward
// direction's first step is row P - 1. What is not of the weights' dtype is fp32.
struct Cell {
  const void *w_input, *w_hidden;    // [4H, K], [4H, H]
  const void *b_input, *b_hidden;    // [4H], or null
  int64_t steps, inputs, hidden;     // P, K, H
  bool reversed;
  const float* rows;                 // [P, K], rows `row_stride` apart: the input
  int64_t row_stride;
  float* state;                      // [P, 5, H] by steps: i, f, g, o, c
  float* out;                        // [P, H] by rows, `out_stride` apart: the hidden states
  int64_t out_stride;
  const float* dout;                 // [P, H] by rows, `dout_stride` apart
  int64_t dout_stride;
  float* dgates;                     // [P, 4H] by rows, `gate_stride` apart
  float *dhidden, *dcell;            // [H]: what a step hands to the one before it

  int64_t gate_stride() const { return padded(4 * hidden); }
  int64_t row(int64_t step) const { return reversed ? steps - 1 - step : step; }
};

constexpr int64_t UNITS = 16;        // hidden units that a thread computes together; a multiple of every vector
constexpr int64_t GATES = 16;        // gates that it projects together; a multiple of 4

struct LstmKernels {
  int64_t tile_rows, panel;          // of the matrix products of the gradients

  // The part of the gates that comes from the input, of all steps, for the gates from `begin` to `end`: whole fours.
  void (*project)(const Cell&, int64_t begin, int64_t end);
  // One step, for the units from `begin` to `end`. Forward finds the part from the input in `state`.
  void (*forward)(const Cell&, int64_t step, int64_t begin, int64_t end);
  void (*backward)(const Cell&, int64_t step, int64_t begin, int64_t end);
  // The hidden states of a step, from `state`.
  void (*outputs)(const Cell&, int64_t step);

  // Operands of the products. `across`: [blocks of tile_rows gates][P][tile_rows], for the weights' gradients, and
  // [blocks of tile_rows rows][4H][tile_rows], for the inputs'; `panels`: [blocks of panel columns][P][panel].
  void (*pack_gates)(const Cell&, int64_t block, float* across);
  void (*pack_rows)(const Cell&, int64_t block, float* across);
  void (*pack_panel)(const float* rows, int64_t stride, int64_t count, int64_t width, int64_t block, float* panels);
  // One block of gates: out [4H, width] = dgates^T rows, over `count` rows. Past the caches where it would fill them
  // anyway.
  void (*weight_gradient)(const Cell&, const float* across, const float* panels, int64_t count, int64_t width,
                          int64_t block, void* out, bool past_caches);
  // One block of gates: the sum over all rows, which both biases have; null for one that nobody asked for.
  void (*bias_gradient)(const Cell&, const float* across, int64_t block, void* input, void* hidden);
  // Some panels: out [P, K], rows `stride` apart, (+)= dgates w_input.
  void (*input_gradient)(const Cell&, const float* across, int64_t begin, int64_t end, float* out, int64_t stride,
                         bool add);

  void (*widen)(const void* from, float* to, int64_t count);
  void (*narrow)(const float* from, void* to, int64_t count);
};

namespace portable { LstmKernels lstm_kernels(Dtype); }
namespace avx2 { LstmKernels lstm_kernels(Dtype); }
namespace avx512 { LstmKernels lstm_kernels(Dtype); }

}  // namespace fastprompt
