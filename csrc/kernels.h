// What each instruction set provides.
#pragma once

#include "performers_native.h"

namespace performers {

struct Kernels {
    // Whether all that was read was finite; otherwise the results mean nothing.
    bool (*forward)(const performers_call &);
    void (*backward)(const performers_call &);
    void (*products)(const performers_call &);
    void (*listed_forward)(const performers_listed_call &);
    void (*listed_backward)(const performers_listed_call &);
};

namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

}  // namespace performers
