// Which instructions the kernels may use, found at run time.
//
// A file named *_avx2.cpp, *_avx512.cpp or *_avx512_bf16.cpp is compiled with those instructions (see setup.py), all
// others without. Such a file includes no header of torch, and what it defines is static or in a namespace of its
// level: an inline function that two files share is linked once, and it may be the copy that an older CPU cannot run.
#pragma once

namespace fastprompt {

enum class Isa { portable, avx2, avx512, avx512_bf16 };  // each includes those before it

Isa isa();  // the highest that this CPU has, or what a test limited it to

}  // namespace fastprompt

// A function that each of these namespaces defines for its own instructions.
#if defined(FASTPROMPT_X86)
#define FASTPROMPT_BEST(function) \
  (isa() >= Isa::avx512 ? &avx512::function : isa() >= Isa::avx2 ? &avx2::function : &portable::function)
#else
#define FASTPROMPT_BEST(function) (&portable::function)
#endif
