// An emulation of CUDA on a CPU, of as much of it as the kernels in the folder above use: with this folder first on the
// include path a C++ compiler compiles them unchanged. It is for tests of what they compute, and says nothing about
// their speed.
//
// Every CUDA thread is a fiber of one system thread. A fiber runs up to its next point of synchronisation (a barrier, a
// shuffle, an atomic access, a look at another block's shared memory); then any fiber of the grid that waits for
// nothing may be the next, as a generator with the seed `emulation::seed` decides; one thread of a grid is far slower
// than the others. A kernel that forgets a barrier so meets orders that a GPU shows too rarely to be found. All blocks
// of a grid run at once, as cooperative launches and clusters demand.
//
// Not covered: caches and the order in which one thread's accesses reach others (an access is seen by all at once),
// warps that are incomplete or whose lanes part, static shared memory. Dynamic shared memory is the array
// `dynamic_shared` of uint4, declared outside any namespace, and starts as NaN. Its address is the same in all blocks:
// an address that another block's memory was mapped to is good until the next point of synchronisation.
//
// For tests of the tests, -DEMULATION_WITHOUT_SYNCTHREADS and -DEMULATION_WITHOUT_CLUSTER_SYNC leave out that barrier.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }

template <typename To, typename From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }

// Those of the thread that runs; one-dimensional.
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

constexpr size_t EMULATED_SHARED = 227 * 1024;
inline uint4 dynamic_shared[EMULATED_SHARED / sizeof(uint4)];

namespace emulation {

inline uint64_t seed = 0;
inline std::string error;  // of the last launch; empty: none

struct Fiber;

// Where a number of fibers wait for each other.
struct Meeting {
  size_t expected = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Meeting meeting;
  float given[2][32];  // of even and odd shuffles: a lane may be one ahead
};

struct Cluster {
  Meeting meeting;
  unsigned first, blocks;
};

struct Block {
  std::vector<unsigned char> shared;  // while no thread of the block runs
  Meeting meeting;
  std::vector<Warp> warps;
  Cluster* cluster;
  size_t ended = 0;  // threads
};

struct Fiber {
  unsigned block, thread;
  unsigned shuffles = 0;
  bool started = false;
  std::unique_ptr<char[]> stack;
  jmp_buf context;
};

class Grid {
 public:
  Grid(unsigned blocks, unsigned threads, unsigned cluster, size_t shared, std::function<void()> kernel);
  void run();

  void pass();            // let others go first
  void meet(Meeting&);    // wait for the others
  void poll();            // let others go first, and notice when all only wait for words
  void progress() { polls_ = 0; }
  void fail(const char* why);  // ends the grid
  Block& block() { return blocks_[running_->block]; }
  Block& block(unsigned i) { return blocks_[i]; }
  Fiber& fiber() { return *running_; }

 private:
  static constexpr size_t STACK = 1 << 16, MARGIN = 64;  // bytes; behind shared memory stands what nobody may touch

  static void enter();
  void next();
  unsigned draw(unsigned below);

  std::function<void()> kernel_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Fiber> fibers_;
  std::vector<Fiber*> ready_;
  Fiber* running_ = nullptr;
  int live_ = -1;  // the block whose memory is in dynamic_shared
  size_t bytes_, ended_ = 0, polls_ = 0;
  uint64_t state_;
  unsigned haste_;  // of 8 times that a fiber is chosen, how often it is the one that was ready last
  Fiber* slow_;     // of 64 times that it would be chosen, it is once
  jmp_buf caller_;
};

inline Grid* grid = nullptr;  // that runs

inline Grid::Grid(unsigned blocks, unsigned threads, unsigned cluster, size_t shared, std::function<void()> kernel)
    : kernel_(std::move(kernel)), blocks_(blocks), clusters_(blocks / cluster), fibers_(blocks * threads),
      bytes_(shared + MARGIN), state_(seed) {
  for (unsigned c = 0; c < clusters_.size(); ++c) {
    clusters_[c].meeting.expected = cluster * threads;
    clusters_[c].first = c * cluster;
    clusters_[c].blocks = cluster;
  }
  for (unsigned b = 0; b < blocks; ++b) {
    blocks_[b].shared.assign(bytes_, 0xff);
    blocks_[b].meeting.expected = threads;
    blocks_[b].warps.resize(threads / 32);
    for (auto& warp : blocks_[b].warps) warp.meeting.expected = 32;
    blocks_[b].cluster = &clusters_[b / cluster];
    for (unsigned t = 0; t < threads; ++t) {
      auto& fiber = fibers_[b * threads + t];
      fiber.block = b, fiber.thread = t;
      ready_.push_back(&fiber);
    }
  }
  gridDim = dim3(blocks), blockDim = dim3(threads);
  haste_ = draw(8);
  slow_ = &fibers_[draw(unsigned(fibers_.size()))];
}

inline unsigned Grid::draw(unsigned below) {
  state_ = state_ * 6364136223846793005u + 1442695040888963407u;
  return unsigned(state_ >> 33) % below;
}

inline void Grid::run() {
  grid = this;
  if (!_setjmp(caller_)) next();
  grid = nullptr;
  std::memcpy(blocks_[live_].shared.data(), dynamic_shared, bytes_);
  for (auto& block : blocks_) {
    for (auto at = bytes_ - MARGIN; at < bytes_; ++at) {
      if (block.shared[at] != 0xff && error.empty()) error = "a block wrote past its shared memory";
    }
  }
}

// Never returns: continues a fiber that is ready.
inline void Grid::next() {
  if (ready_.empty()) fail(ended_ == fibers_.size() ? "" : "all threads wait at barriers");
  auto const last = unsigned(ready_.size()) - 1;
  auto chosen = draw(8) < haste_ ? last : draw(last + 1);
  if (ready_[chosen] == slow_ && last > 0 && draw(64)) chosen = (chosen + 1 + draw(last)) % (last + 1);
  std::swap(ready_[chosen], ready_[last]);
  running_ = ready_[last];
  ready_.pop_back();
  if (live_ != int(running_->block)) {
    if (live_ >= 0) std::memcpy(blocks_[live_].shared.data(), dynamic_shared, bytes_);
    live_ = running_->block;
    std::memcpy(dynamic_shared, block().shared.data(), bytes_);
  }
  blockIdx = dim3(running_->block, 0, 0), threadIdx = dim3(running_->thread, 0, 0);
  if (running_->started) _longjmp(running_->context, 1);
  running_->started = true;
  running_->stack.reset(new char[STACK]);
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = running_->stack.get();
  fresh.uc_stack.ss_size = STACK;
  fresh.uc_link = nullptr;
  makecontext(&fresh, &Grid::enter, 0);
  setcontext(&fresh);
}

inline void Grid::enter() {
  grid->kernel_();
  ++grid->ended_;
  ++grid->block().ended;
  grid->progress();
  grid->next();
}

inline void Grid::fail(const char* why) {
  error = why;
  _longjmp(caller_, 1);
}

inline void Grid::pass() {
  ready_.push_back(running_);
  if (!_setjmp(running_->context)) next();
}

inline void Grid::poll() {
  if (++polls_ > 20000 * fibers_.size()) fail("all threads wait for a word that nobody writes");
  pass();
}

inline void Grid::meet(Meeting& meeting) {
  meeting.waiting.push_back(running_);
  if (meeting.waiting.size() == meeting.expected) {
    ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
    progress();
  }
  if (!_setjmp(running_->context)) next();
}

inline float shuffle(float value, unsigned lane_from) {
  auto& fiber = grid->fiber();
  auto& warp = grid->block().warps[fiber.thread / 32];
  auto& given = warp.given[fiber.shuffles++ % 2];
  given[fiber.thread % 32] = value;
  grid->meet(warp.meeting);
  return given[lane_from];
}

}  // namespace emulation

inline float __shfl_sync(unsigned, float value, int lane) { return emulation::shuffle(value, lane % 32); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return emulation::shuffle(value, threadIdx.x % 32 ^ unsigned(mask));
}

inline void __syncthreads() {
#ifdef EMULATION_WITHOUT_SYNCTHREADS
  emulation::grid->pass();
#else
  emulation::grid->meet(emulation::grid->block().meeting);
#endif
}

// The host's side.

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct { unsigned x, y, z; } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
  *clusters = 2;
  return cudaSuccess;
}

// Returns when the grid is done.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  }
  emulation::error.clear();
  if (config->gridDim.x % cluster || config->blockDim.x % 32 || config->dynamicSmemBytes + 64 > EMULATED_SHARED) {
    emulation::error = "not a launch that can be emulated";
    return cudaErrorLaunchFailure;
  }
  emulation::Grid(config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes,
                  [&] { kernel(arguments...); }).run();
  return emulation::error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
