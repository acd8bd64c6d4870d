// The instruction set that kernels choose by, and the operators through which tests read and lower it.

#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <string>

namespace fastprompt {
namespace {

const char* const NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16"};  // in the order of Isa

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this runs before the constructors of others
  auto const avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  auto const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

const Isa highest = detect();
std::atomic<Isa> chosen = highest;

std::string cpu_isa() { return NAMES[int(chosen.load())]; }

void limit_cpu_isa(std::string name) {
  auto const found = std::find(std::begin(NAMES), std::end(NAMES), name);
  STD_TORCH_CHECK(found != std::end(NAMES), "unknown instruction set ", name);
  chosen = std::min(highest, Isa(found - NAMES));
}

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("cpu_isa() -> str");
  m.def("limit_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("limit_cpu_isa", TORCH_BOX(&limit_cpu_isa));
}

}  // namespace fastprompt
