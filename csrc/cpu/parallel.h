// Loops on torch's own threads: torch.get_num_threads() of them, one inside a parallel region, and none of ours.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace fastprompt {

inline int64_t num_threads() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return threads;
}

// How many threads so many multiplications are worth: one takes microseconds to wake.
inline int64_t threads_for(int64_t products) { return products / (1 << 20) + 1; }

// What the first of several threads failed with. An exception must not leave the thread it was thrown in: nobody up the
// stack of a worker catches it, and the process would end.
class FirstError {
 public:
  template <typename Function>
  void guard(const Function& function) noexcept {
    try {
      function();
    } catch (...) {
      if (!taken_.test_and_set()) error_ = std::current_exception();
    }
  }
  // Once all threads are done.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::exception_ptr error_;
};

// Call body(begin, end) on pieces of [begin, end), each of at least `grain` but the last. What a body throws, such as
// std::bad_alloc, is thrown here after all pieces have ended; so no body may wait for another one that could throw.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  FirstError error;
  auto const piece = [&](int64_t from, int64_t to) { error.guard([&] { body(from, to); }); };
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer cannot see how OpenMP's threads wait for one another, but knows of threads started and joined.
  auto const pieces = std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, num_threads());
  auto const size = (end - begin + pieces - 1) / pieces;
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += size) threads.emplace_back(piece, from, std::min(from + size, end));
  for (auto& thread : threads) thread.join();
#else
  using Piece = std::remove_const_t<decltype(piece)>;
  auto const call = [](int64_t from, int64_t to, void* f) { (*static_cast<const Piece*>(f))(from, to); };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, call, const_cast<Piece*>(&piece)));
#endif
  error.rethrow();
}

}  // namespace fastprompt
