// The definitions of prompt_lstm.h, for the instructions that the including file is compiled for.
//
// Forward, both products have the sum along the rows of the weights: vectors run along the sum, and LANES of them are
// added up together at the end, so that the weights are read where they are. Backward, vectors run along the rows of
// the weights or of the input, and blocks of products.h along the rest.
#pragma once

#include "products.h"
#include "prompt_lstm.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

constexpr int GROUP = LANES / 4;  // rows of one operand, times four of the other: a vector of sums
// Rows that are projected together, on four gates each: as many sums as hide the latency of an addition, and registers
// are left for both operands.
constexpr int PROJECTED = LANES == 8 ? 3 : GROUP;

// Past the caches. The address must be that of a whole vector.
inline void stream(float* p, floats x) {
#if FASTPROMPT_LANES == 16
  _mm512_stream_ps(p, x);
#elif FASTPROMPT_LANES == 8
  _mm256_stream_ps(p, x);
#else
  store(p, x);
#endif
}

inline floats sigmoid(floats x) { return 1.0f / (1.0f + exp(x < -88.0f ? broadcast(88.0f) : -x)); }

inline Multiply block_of(int64_t rows, int64_t columns) { return block<ROWS>(rows, (columns + LANES - 1) / LANES); }

template <typename T>
inline void project_four(const Cell& cell, int64_t gate) {
  auto const width = cell.inputs, whole = round_down(width, LANES), height = 4 * cell.hidden;
  const T* w[4];
  float bias[4] = {};
  for (int n = 0; n < 4; ++n) {
    w[n] = static_cast<const T*>(cell.w_input) + (gate + n) * width;
    if (cell.b_input) {
      bias[n] = load(static_cast<const T*>(cell.b_input) + gate + n, 1)[0] +
                load(static_cast<const T*>(cell.b_hidden) + gate + n, 1)[0];
    }
  }
  constexpr int VECTORS_OF_SUMS = (PROJECTED + GROUP - 1) / GROUP;
  for (int64_t row = 0; row < cell.steps; row += PROJECTED) {
    const float* x[PROJECTED];
    for (int m = 0; m < PROJECTED; ++m) x[m] = cell.rows + smaller(row + m, cell.steps - 1) * cell.row_stride;
    floats sums[VECTORS_OF_SUMS][LANES] = {};
    auto const add = [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
      floats number[PROJECTED];
#pragma GCC unroll 4
      for (int m = 0; m < PROJECTED; ++m) number[m] = load(x[m] + k, lanes);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        auto const column = load(w[n] + k, lanes);
#pragma GCC unroll 4
        for (int m = 0; m < PROJECTED; ++m) sums[m / GROUP][m % GROUP * 4 + n] += number[m] * column;
      }
    };
    for (int64_t k = 0; k < whole; k += LANES) add(k, LANES);
    if (whole < width) add(whole, width - whole);
    float result[VECTORS_OF_SUMS * GROUP][4];
    for (int i = 0; i < VECTORS_OF_SUMS; ++i) store(result[i * GROUP], totals(sums[i]));
    for (int m = 0; m < PROJECTED && row + m < cell.steps; ++m) {
      auto const gates = cell.state + cell.row(row + m) * (height + cell.hidden) + gate;
      for (int n = 0; n < 4; ++n) gates[n] = result[m][n] + bias[n];
    }
  }
}

template <typename T>
void project(const Cell& cell, int64_t begin, int64_t end) {
  for (auto gate = begin; gate < end; gate += 4) project_four<T>(cell, gate);
}

// sums [4][LANES] = the gates of LANES units from `unit` on, of the hidden state alone. Past the last unit, that again.
template <typename T>
inline void multiply_hidden(const Cell& cell, const float* h, int64_t unit, float (*sums)[LANES]) {
  auto const width = cell.hidden, whole = round_down(width, LANES);
  for (int64_t first = 0; first < LANES; first += GROUP) {
    floats x[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; ++i) {
      const T* w[4];
      for (int g = 0; g < 4; ++g) {
        w[g] = static_cast<const T*>(cell.w_hidden) + (g * width + smaller(unit + first + i, width - 1)) * width;
      }
      floats gates[4] = {};
      auto const add = [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
        auto const number = load(h + k, lanes);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) gates[g] += number * load(w[g] + k, lanes);
      };
      for (int64_t k = 0; k < whole; k += LANES) add(k, LANES);
      if (whole < width) add(whole, width - whole);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) x[g * GROUP + i] = gates[g];
    }
    float result[4][GROUP];
    store(result[0], totals(x));
    for (int g = 0; g < 4; ++g) std::memcpy(&sums[g][first], result[g], sizeof(result[g]));
  }
}

// Every other step goes through the weights from the end to the beginning: what a cache still holds is used at once,
// whereas in the same order it would be pushed out before its turn.
inline int64_t there_and_back(int64_t step, int64_t i, int64_t count) { return step % 2 ? count - 1 - i : i; }

template <typename T>
void forward(const Cell& cell, int64_t step, int64_t begin, int64_t end) {
  auto const width = cell.hidden;
  auto const state = cell.state + step * 5 * width;
  auto const vectors = (end - begin + LANES - 1) / LANES;
  for (int64_t v = 0; v < vectors; ++v) {
    auto const unit = begin + there_and_back(step, v, vectors) * LANES, lanes = smaller(LANES, end - unit);
    float sums[4][LANES] = {};
    floats before{};
    if (step > 0) {
      multiply_hidden<T>(cell, cell.out + cell.row(step - 1) * cell.out_stride, unit, sums);
      before = load(state - width + unit, lanes);
    }
    auto const gate = [&](int g) { return load(state + g * width + unit, lanes) + load(sums[g]); };
    auto const i = sigmoid(gate(0)), f = sigmoid(gate(1)), g = tanh(gate(2)), o = sigmoid(gate(3));
    auto const c = f * before + i * g;
    auto const to = state + unit;
    store(to, i, lanes), store(to + width, f, lanes), store(to + 2 * width, g, lanes), store(to + 3 * width, o, lanes);
    store(to + 4 * width, c, lanes);
    store(cell.out + cell.row(step) * cell.out_stride + unit, o * tanh(c), lanes);
  }
}

// dhidden += dgates w_hidden, for some columns and `count` rows of the weights from `row` on. These are added up on
// their own first: sums of like size round less.
template <int count, typename T>
inline void add_hidden(const Cell& cell, const float* dgates, int64_t row, int64_t begin, int64_t end) {
  auto const width = cell.hidden;
  auto const w = static_cast<const T*>(cell.w_hidden) + row * width;
  floats factor[count];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) factor[i] = broadcast(dgates[row + i]);
  auto const add = [&](int64_t column, int64_t lanes) __attribute__((always_inline)) {
    floats x = factor[0] * load(w + column, lanes);
#pragma GCC unroll 8
    for (int i = 1; i < count; ++i) x += factor[i] * load(w + i * width + column, lanes);
    store(cell.dhidden + column, load(cell.dhidden + column, lanes) + x, lanes);
  };
  auto column = begin;
  for (; column + LANES <= end; column += LANES) add(column, LANES);
  if (column < end) add(column, end - column);
}

template <typename T>
void backward(const Cell& cell, int64_t step, int64_t begin, int64_t end) {
  auto const width = cell.hidden, stride = cell.gate_stride();
  auto const state = cell.state + step * 5 * width;
  auto const last = step + 1 == cell.steps;
  std::memcpy(cell.dhidden + begin, cell.dout + cell.row(step) * cell.dout_stride + begin,
              (end - begin) * sizeof(float));
  if (!last) {
    auto const after = cell.dgates + cell.row(step + 1) * stride;
    auto const eights = width / 2;
    for (int64_t i = 0; i < eights; ++i) add_hidden<8, T>(cell, after, there_and_back(step, i, eights) * 8, begin, end);
    if (width % 2) add_hidden<4, T>(cell, after, eights * 8, begin, end);
  }
  auto const dgates = cell.dgates + cell.row(step) * stride;
  for (auto unit = begin; unit < end; unit += LANES) {
    auto const lanes = smaller(LANES, end - unit);
    auto const saved = [&](int64_t k) { return load(state + k * width + unit, lanes); };
    auto const i = saved(0), f = saved(1), g = saved(2), o = saved(3), tanh_c = tanh(saved(4));
    auto const before = step > 0 ? saved(-1) : floats{};
    auto const dh = load(cell.dhidden + unit, lanes);
    auto const dc = dh * o * (1.0f - tanh_c * tanh_c) + (last ? floats{} : load(cell.dcell + unit, lanes));
    store(cell.dcell + unit, dc * f, lanes);
    auto const to = dgates + unit;
    store(to, dc * g * i * (1.0f - i), lanes);
    store(to + width, dc * before * f * (1.0f - f), lanes);
    store(to + 2 * width, dc * i * (1.0f - g * g), lanes);
    store(to + 3 * width, dh * tanh_c * o * (1.0f - o), lanes);
  }
}

void outputs(const Cell& cell, int64_t step) {
  auto const o = cell.state + (step * 5 + 3) * cell.hidden, c = o + cell.hidden;
  auto const to = cell.out + cell.row(step) * cell.out_stride;
  for (int64_t unit = 0; unit < cell.hidden; unit += LANES) {
    auto const lanes = smaller(LANES, cell.hidden - unit);
    store(to + unit, load(o + unit, lanes) * tanh(load(c + unit, lanes)), lanes);
  }
}

// Packed blocks stand side by side and others may be writing the next: the last vector of a block ends with it.
void pack_gates(const Cell& cell, int64_t block, float* across) {
  auto const to = across + block * ROWS * cell.steps;
  auto const lanes = smaller(LANES, 4 * cell.hidden - block * ROWS);
  for (int64_t row = 0; row < cell.steps; ++row) {
    auto const x = load(cell.dgates + row * cell.gate_stride() + block * ROWS, lanes);
    store(to + row * ROWS, x, row + 1 < cell.steps ? LANES : ROWS);
  }
}

void pack_rows(const Cell& cell, int64_t block, float* across) {
  auto const height = 4 * cell.hidden, first = block * ROWS;
  auto const to = across + first * height;
  for (int64_t k = 0; k < height; k += LANES) {
    floats x[LANES];
    auto const lanes = smaller(LANES, height - k);
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) {
      auto const inside = i < ROWS && first + i < cell.steps;
      x[i] = inside ? load(cell.dgates + (first + i) * cell.gate_stride() + k, lanes) : floats{};
    }
    transpose(x);
#pragma GCC unroll 16
    for (int64_t j = 0; j < LANES; ++j) {
      if (j < lanes) store(to + (k + j) * ROWS, x[j], k + j + 1 < height ? LANES : ROWS);
    }
  }
}

void pack_panel(const float* rows, int64_t stride, int64_t count, int64_t width, int64_t block, float* panels) {
  auto const from = rows + block * PANEL;
  auto const to = panels + block * PANEL * count;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t k = 0; k < PANEL; k += LANES) {
      auto const lanes = larger<int64_t>(0, smaller(LANES, width - block * PANEL - k));
      store(to + row * PANEL + k, load(from + row * stride + k, lanes));
    }
  }
}

// `across` and `panels` may be those of more rows, `steps` of them.
template <typename T>
void weight_gradient(const Cell& cell, const float* across, const float* panels, int64_t count, int64_t width,
                     int64_t block, void* out, bool past_caches) {
  auto const rows = smaller<int64_t>(ROWS, 4 * cell.hidden - block * ROWS);
  auto const to = static_cast<T*>(out) + block * ROWS * width;
  past_caches = past_caches && width % LANES == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(floats) == 0;
  across += block * ROWS * cell.steps;
  for (int64_t column = 0; column < width; column += PANEL) {
    auto const columns = smaller(PANEL, width - column);
    auto const multiply = block_of(rows, columns);
    auto const panel = panels + column * cell.steps;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (columns % LANES == 0 && !past_caches) {
        multiply(count, across, panel, PANEL, to + column, width, false);
        continue;
      }
    }
    float tile[ROWS * PANEL];
    multiply(count, across, panel, PANEL, tile, PANEL, false);
    for (int64_t i = 0; i < rows; ++i) {
      if constexpr (sizeof(T) == sizeof(float)) {
        if (past_caches) {
          for (int64_t k = 0; k < columns; k += LANES) stream(to + i * width + column + k, load(tile + i * PANEL + k));
          continue;
        }
      }
      narrow<T>(tile + i * PANEL, to + i * width + column, columns);
    }
  }
#if FASTPROMPT_LANES >= 8
  _mm_sfence();
#endif
}

template <typename T>
void bias_gradient(const Cell& cell, const float* across, int64_t block, void* input, void* hidden) {
  floats sum{};
  across += block * ROWS * cell.steps;
  for (int64_t row = 0; row < cell.steps; ++row) {
    sum += load(across + row * ROWS, row + 1 < cell.steps ? LANES : ROWS);  // lanes past the block are not stored
  }
  auto const first = block * ROWS, rows = smaller<int64_t>(ROWS, 4 * cell.hidden - first);
  for (auto const bias : {input, hidden}) {
    if (bias) store(static_cast<T*>(bias) + first, sum, rows);
  }
}

template <typename T>
void input_gradient(const Cell& cell, const float* across, int64_t begin, int64_t end, float* out, int64_t stride,
                    bool add) {
  constexpr int64_t DEPTH = 128;  // gates: with so many a panel of the weights stays in the first-level cache
  float tile[DEPTH * PANEL];
  auto const width = cell.inputs, height = 4 * cell.hidden;
  for (int64_t gate = 0; gate < height; gate += DEPTH) {
    auto const depth = smaller(DEPTH, height - gate);
    for (auto block = begin; block < end; ++block) {
      auto const column = block * PANEL, columns = smaller(PANEL, width - column);
      auto const multiply = block_of(ROWS, columns);
      for (int64_t i = 0; i < depth; ++i) {
        auto const w = static_cast<const T*>(cell.w_input) + (gate + i) * width + column;
        for (int64_t k = 0; k < columns; k += LANES) {
          store(tile + i * PANEL + k, load(w + k, smaller(LANES, columns - k)));
        }
        for (int64_t k = PANEL; k < 2 * PANEL; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(w + k);
      }
      for (int64_t row = 0; row < cell.steps; row += ROWS) {
        auto const rows = smaller<int64_t>(ROWS, cell.steps - row);
        (rows == ROWS ? multiply : block_of(rows, columns))(depth, across + row * height + gate * ROWS, tile, PANEL,
                                                            out + row * stride + column, stride, add || gate > 0);
      }
    }
  }
}

template <typename T>
LstmKernels kernels_of() {
  return {ROWS,       PANEL,     project<T>, forward<T>,         backward<T>,      outputs,   pack_gates,
          pack_rows,  pack_panel, weight_gradient<T>, bias_gradient<T>, input_gradient<T>, widen<T>, narrow<T>};
}

LstmKernels lstm_kernels(Dtype dtype) {
  return dtype == Dtype::fp32 ? kernels_of<float>() : dtype == Dtype::bf16 ? kernels_of<bf16>() : kernels_of<fp16>();
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
