// The one kernel of prompt_lstm.h, for each pass, dtype and exchange.
#pragma once

#include "prompt_lstm.h"

#include <cooperative_groups.h>
#include <cuda/atomic>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

extern __shared__ uint4 dynamic_shared[];

namespace fastprompt {
namespace lstm {

constexpr unsigned ALL = 0xffffffffu;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// tanh(x) or sigmoid(x), by one way so that lanes with different gates don't part, and with small results as exact as
// large ones.
__device__ inline float activation(float x, bool is_tanh) {
  const float y = is_tanh ? -2.0f * x : -x;
  const float e = expm1f(y > 80.0f ? 80.0f : y);  // not infinite, but NaN stays NaN
  return (is_tanh ? -e : 1.0f) / (e + 2.0f);
}

template <typename T>
constexpr int WIDTH = CHUNK / sizeof(T);  // elements of a chunk

template <typename T>
__device__ void multiply_add(const uint4& weights, const float (&vector)[WIDTH<T>], float& sum) {
  T values[WIDTH<T>];
  memcpy(values, &weights, CHUNK);
#pragma unroll
  for (int i = 0; i < WIDTH<T>; ++i) sum = fmaf(widen(values[i]), vector[i], sum);
}

template <int N>
__device__ void load(const float* from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// The sums over all lanes of N numbers, a power of two; lane l returns that of number l * N / 32. A lane gives away the
// half of its numbers that its partner goes on with, so N numbers take about N shuffles rather than 5 N.
template <int N>
__device__ float sum_over_lanes(const float (&x)[N], int lane, int offset = WARP / 2) {
  if constexpr (N > 1) {
    const bool upper = lane & offset;
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float kept = upper ? x[i + N / 2] : x[i], given = upper ? x[i] : x[i + N / 2];
      sums[i] = kept + __shfl_xor_sync(ALL, given, offset);
    }
    return sum_over_lanes(sums, lane, offset / 2);
  } else {
    float sum = x[0];
    for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL, sum, offset);
    return sum;
  }
}

constexpr int UNIT_LANES = WARP / UNITS, GATE_LANES = UNIT_LANES / 4;  // that have a unit's sums, and a gate's

// What a lane works on: a unit of a direction (there is none from `hidden` on), as one of the unit's lanes.
struct Place {
  int direction, unit, lane;

  __device__ int gate() const { return lane / GATE_LANES; }
  __device__ bool leads() const { return lane % GATE_LANES == 0; }  // of those that have the same gate
};

// The row of the sequence in a direction's step s.
__device__ inline int row_of(const Args& a, int direction, int s) { return direction ? a.count - 1 - s : s; }

__device__ inline float& step_value(const Args& a, int direction, int s, int which, int unit) {
  return a.steps[((long long)(direction * a.count + s) * 5 + which) * a.hidden + unit];
}

// A pass says which rows of the matrix a unit has, what a lane reads from memory for a step, and what it makes of both.

struct Forward {
  static constexpr bool BACKWARD = false;
  static constexpr int ROWS = 4;   // of a unit
  static constexpr int VALUES = 1;  // that a unit adds to the vector

  struct Inputs {
    float gate;
  };

  __device__ static int row(int unit, int gate, int hidden) { return gate * hidden + unit; }

  __device__ static Inputs read(const Args& a, const Place& at, int t) {
    if (at.unit >= a.hidden || t >= a.count) return {};
    const long long row = at.direction * a.count + row_of(a, at.direction, t);
    return {a.input[(row * 4 + at.gate()) * a.hidden + at.unit]};
  }

  // `sum` is that of this lane's gate. The cell is carried.
  __device__ static void step(const Args& a, const Place& at, int t, float sum, const Inputs& in, float& cell,
                              float (&sent)[VALUES]) {
    const float gate = activation(sum + in.gate, at.gate() == 2);
    const auto of_unit = [&](int which) {
      return __shfl_sync(ALL, gate, threadIdx.x % WARP - at.lane + which * GATE_LANES);
    };
    const float i = of_unit(0), f = of_unit(1), g = of_unit(2), o = of_unit(3);
    cell = f * cell + i * g;
    sent[0] = o * tanhf(cell);
    if (at.unit >= a.hidden) return;
    if (at.leads()) step_value(a, at.direction, t, at.gate(), at.unit) = gate;
    if (at.lane == 1) step_value(a, at.direction, t, 4, at.unit) = cell;
    if (at.lane == 3) {
      const long long row = row_of(a, at.direction, t);
      a.output[(row * a.directions + at.direction) * a.hidden + at.unit] = sent[0];
    }
  }
};

struct Backward {
  static constexpr bool BACKWARD = true;
  static constexpr int ROWS = 1;
  static constexpr int VALUES = 4;

  struct Inputs {
    float i, f, g, o, cell, cell_before, dhidden;
  };

  __device__ static int row(int unit, int, int) { return unit; }

  __device__ static Inputs read(const Args& a, const Place& at, int t) {
    const int s = a.count - 1 - t;
    if (at.unit >= a.hidden || s < 0) return {};
    const auto value = [&](int which) { return step_value(a, at.direction, s, which, at.unit); };
    const long long row = row_of(a, at.direction, s);
    return {value(0), value(1), value(2), value(3), value(4),
            s > 0 ? step_value(a, at.direction, s - 1, 4, at.unit) : 0.0f,
            a.input[(row * a.directions + at.direction) * a.hidden + at.unit]};
  }

  // `sum` is the gradient of the hidden state from the step before this one (after it, in the sequence); that of the
  // cell is carried.
  __device__ static void step(const Args& a, const Place& at, int t, float sum, const Inputs& in, float& dcell,
                              float (&sent)[VALUES]) {
    const float tanh_cell = tanhf(in.cell), dh = in.dhidden + sum;
    const float dc = dh * in.o * (1 - tanh_cell * tanh_cell) + dcell;
    sent[0] = in.g * in.i * (1 - in.i) * dc;
    sent[1] = in.cell_before * in.f * (1 - in.f) * dc;
    sent[2] = in.i * (1 - in.g * in.g) * dc;
    sent[3] = tanh_cell * in.o * (1 - in.o) * dh;
    dcell = dc * in.f;
    if (at.unit >= a.hidden || !at.leads()) return;
    const long long row = at.direction * a.count + row_of(a, at.direction, a.count - 1 - t);
    const float low = at.gate() == 0 ? sent[0] : sent[1], high = at.gate() == 2 ? sent[2] : sent[3];
    a.output[(row * 4 + at.gate()) * a.hidden + at.unit] = at.gate() < 2 ? low : high;
  }
};

// The rows of a block, from before the first step, and their products with a vector.
template <typename Pass, typename T>
class Rows {
 public:
  static constexpr int COUNT = UNITS * Pass::ROWS;  // of a tile

  // `shared`: [tiles, COUNT, kept]. The threads of the block must meet before `dot`.
  __device__ Rows(const uint4* matrix, const Args& a, int first_unit, uint4* shared)
      : matrix_(matrix), shared_(shared), first_unit_(first_unit), hidden_(a.hidden), held_(a.plan.held),
        kept_(a.plan.kept), all_(chunks(Pass::BACKWARD ? 4 * a.hidden : a.hidden, sizeof(T))) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j) {
        const bool some = lane + j * WARP < held_ && warp < a.plan.tiles;  // then a warp has one tile, or none
        weights_[r][j] = some ? chunk(warp, r, lane + j * WARP) : make_uint4(0, 0, 0, 0);
      }
    }
    for (int i = threadIdx.x; i < a.plan.tiles * COUNT * kept_; i += blockDim.x) {
      const int row = i / kept_;
      shared_[i] = chunk(row / COUNT, row % COUNT, held_ + i % kept_);
    }
  }

  // Adds a lane's share. What is streamed comes first: it takes the longest way.
  __device__ void dot(int tile, int lane, const float* vector, float (&sums)[COUNT]) const {
#pragma unroll
    for (int first = 0; first < COUNT; first += AT_ONCE) {
#pragma unroll UNROLL
      for (int c = held_ + kept_ + lane; c < all_; c += WARP) {
        add<AT_ONCE>(vector, c, first, sums, [&](int r) { return chunk(tile, r, c); });
      }
#pragma unroll UNROLL
      for (int c = lane; c < kept_; c += WARP) {
        add<AT_ONCE>(vector, held_ + c, first, sums, [&](int r) { return shared_[(tile * COUNT + r) * kept_ + c]; });
      }
    }
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) {
      if (j * WARP < held_) {
        add<COUNT>(vector, lane + j * WARP, 0, sums, [&](int r) {
          uint4 weights = weights_[r][j];
          // Or the compiler would widen them before the loop over the steps, and have no registers left.
          asm volatile("" : "+r"(weights.x), "+r"(weights.y), "+r"(weights.z), "+r"(weights.w));
          return weights;
        });
      }
    }
  }

 private:
  static constexpr int CHUNKS = HELD * 4 / Pass::ROWS;   // of a row that a lane holds
  // Rows whose chunks are loaded together: as many as there are registers for beside those held.
  static constexpr int AT_ONCE = COUNT < 8 ? COUNT : 8, UNROLL = 8 / AT_ONCE;

  // From the matrix; a tile may have rows of no unit.
  __device__ uint4 chunk(int tile, int r, int c) const {
    const int unit = first_unit_ + tile * UNITS + r / Pass::ROWS;
    if (unit >= hidden_) return make_uint4(0, 0, 0, 0);
    return matrix_[(long long)Pass::row(unit, r % Pass::ROWS, hidden_) * all_ + c];
  }

  // Of rows first to first + N.
  template <int N, typename Chunk>
  __device__ static void add(const float* vector, int c, int first, float (&sums)[COUNT], const Chunk& chunk) {
    float x[WIDTH<T>];
    load(vector + c * WIDTH<T>, x);
#pragma unroll
    for (int r = first; r < first + N; ++r) multiply_add<T>(chunk(r), x, sums[r]);
  }

  const uint4* matrix_;
  uint4 weights_[COUNT][CHUNKS];
  uint4* shared_;
  int first_unit_, hidden_, held_, kept_, all_;  // chunks of a row: all_
};

// Exchange: `receive` returns the vector of step t, complete; `send` adds what a unit has for the vector of step t + 1.
// All threads of the direction call both in every step, but `send` not in the last.
//
// There are two buffers, for even and for odd steps, and threads meet once a step, in `receive`. That is enough: the
// vector of step t + 2 goes into the buffer that step t has read, and whoever sends it has received all of t + 1, for
// which everybody had to be done with step t.

// Into the shared memory of all blocks of the cluster; the cluster's barrier is the meeting.
class ClusterExchange {
 public:
  // The barrier also says that the other blocks run, and that their buffers are zero and may be written.
  __device__ ClusterExchange(const Args& a, int, int, float* buffers, int padded)
      : buffers_(buffers), padded_(padded), blocks_(a.plan.blocks) {
    for (int i = threadIdx.x; i < 2 * padded; i += blockDim.x) buffers[i] = 0;
    meet();
  }

  __device__ const float* receive(int t) const {
    if (t > 0) meet();
    return buffers_ + t % 2 * padded_;
  }

  // The lanes of the unit share the blocks among them.
  template <int N>
  __device__ void send(int t, const Place& at, int first, int apart, const float (&values)[N]) const {
#ifdef _CG_HAS_CLUSTER_GROUP
    for (int block = at.lane; block < blocks_; block += UNIT_LANES) {
      float* to = cooperative_groups::this_cluster().map_shared_rank(buffers_ + (t + 1) % 2 * padded_, block);
#pragma unroll
      for (int n = 0; n < N; ++n) to[first + n * apart] = values[n];
    }
#endif
  }

 private:
  __device__ static void meet() {
#ifdef _CG_HAS_CLUSTER_GROUP  // from sm_90 on; elsewhere this class is compiled, but never chosen
    cooperative_groups::this_cluster().sync();
#endif
  }

  float* buffers_;
  int padded_, blocks_;
};

// Through global memory, without a barrier of its own: a word holds a number and the step that it is for, is written
// and read at once, and is asked for until the step is right. So a step costs one write and one read of the L2 cache,
// and no order of one memory access after another has to be enforced.
class GridExchange {
  using Word = cuda::atomic_ref<unsigned long long, cuda::thread_scope_device>;
  static constexpr int AT_ONCE = 8;  // words that a thread waits for together

 public:
  __device__ GridExchange(const Args& a, int direction, int columns, float* buffers, int padded)
      : words_(a.words + direction * 2ll * columns), buffers_(buffers), columns_(columns), padded_(padded) {
    for (int i = threadIdx.x; i < 2 * padded; i += blockDim.x) buffers[i] = 0;
    __syncthreads();
  }

  __device__ const float* receive(int t) const {
    float* buffer = buffers_ + t % 2 * padded_;
    if (t > 0) {
      for (int i = threadIdx.x; i < columns_; i += AT_ONCE * blockDim.x) {
        unsigned long long found[AT_ONCE];
        bool complete;
        do {
          complete = true;
#pragma unroll
          for (int n = 0; n < AT_ONCE; ++n) {
            const int at = min(i + n * int(blockDim.x), columns_ - 1);
            found[n] = Word(words_[t % 2 * columns_ + at]).load(cuda::memory_order_relaxed);
          }
#pragma unroll
          for (int n = 0; n < AT_ONCE; ++n) complete &= unsigned(found[n]) == unsigned(t);
        } while (!complete);
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
          const int at = i + n * int(blockDim.x);
          if (at < columns_) buffer[at] = __uint_as_float(unsigned(found[n] >> 32));
        }
      }
      __syncthreads();
    }
    return buffer;
  }

  template <int N>
  __device__ void send(int t, const Place& at, int first, int apart, const float (&values)[N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (at.lane != n) continue;
      const auto word = (unsigned long long)__float_as_uint(values[n]) << 32 | unsigned(t + 1);
      Word(words_[(t + 1) % 2 * columns_ + first + n * apart]).store(word, cuda::memory_order_relaxed);
    }
  }

 private:
  unsigned long long* words_;
  float* buffers_;
  int columns_, padded_;
};

template <typename Pass, typename T, typename Exchange>
__global__ void __launch_bounds__(WARPS* WARP, 1) recurrence(const __grid_constant__ Args a) {
  const int direction = blockIdx.x / a.plan.blocks, block = blockIdx.x % a.plan.blocks, tiles = a.plan.tiles;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int columns = Pass::BACKWARD ? 4 * a.hidden : a.hidden, room = padded(columns, sizeof(T));
  const int first_unit = block * tiles * UNITS;

  float* const buffers = reinterpret_cast<float*>(dynamic_shared);  // [2][room]
  float* const carried = buffers + 2 * room;                        // [tiles][WARP], each lane its own
  uint4* const kept = reinterpret_cast<uint4*>(carried + tiles * WARP);
  const Rows<Pass, T> rows(static_cast<const uint4*>(direction ? a.matrix[1] : a.matrix[0]), a, first_unit, kept);
  for (int tile = warp; tile < tiles; tile += a.plan.warps) carried[tile * WARP + lane] = 0;
  const Exchange exchange(a, direction, columns, buffers, room);

  const auto place = [&](int tile) {
    return Place{direction, first_unit + tile * UNITS + lane / UNIT_LANES, lane % UNIT_LANES};
  };
  auto next = Pass::read(a, place(warp), 0);
  for (int t = 0; t < a.count; ++t) {
    const float* const vector = exchange.receive(t);
    for (int tile = warp; tile < tiles; tile += a.plan.warps) {
      // What the next tile or step reads is on its way while this one is computed and waited for.
      const auto inputs = next;
      const bool last = tile + a.plan.warps >= tiles;
      next = Pass::read(a, place(last ? warp : tile + a.plan.warps), last ? t + 1 : t);
      float sums[Rows<Pass, T>::COUNT] = {};
      rows.dot(tile, lane, vector, sums);
      const float sum = sum_over_lanes(sums, lane);
      const Place at = place(tile);
      float values[Pass::VALUES];
      Pass::step(a, at, t, sum, inputs, carried[tile * WARP + lane], values);
      if (at.unit < a.hidden && t + 1 < a.count) exchange.send(t, at, at.unit, a.hidden, values);
    }
  }
}

}  // namespace lstm
}  // namespace fastprompt
