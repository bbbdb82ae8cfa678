// What each instruction set provides.
#pragma once

#include "performers_native.h"

namespace performers {

// `forward` returns false where it read NaN or infinity, and its results mean nothing; the others
// always return true.
struct Kernels {
    bool (*forward)(const performers_call &);
    bool (*backward)(const performers_call &);
    bool (*products)(const performers_call &);
    bool (*listed_forward)(const performers_listed_call &);
    bool (*listed_backward)(const performers_listed_call &);
};

// clang-format off
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace portable { extern const Kernels kernels; }
// clang-format on

}  // namespace performers
