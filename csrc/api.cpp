// The exported functions, and the choice of an instruction set.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"
#include "parallel.h"
#include "performers_native.h"

namespace performers {
namespace {

struct Candidate {
    const char *name;
    const Kernels *kernels;
    bool supported;
};

struct Candidates {
    Candidate list[3];
    int count = 0;
    char names[64] = "";

    void add(const char *name, const Kernels *kernels, bool supported) {
        list[count++] = {name, kernels, supported};
        if (!supported) return;
        if (names[0]) std::strcat(names, " ");
        std::strcat(names, name);
    }

    // Best first. Every processor with AVX2 also converts half precision (F16C), which compilers
    // before GCC 11 cannot ask for.
    Candidates() {
#if defined(__x86_64__)
        __builtin_cpu_init();
#endif
#if defined(PERFORMERS_HAS_AVX512)
        add("avx512", &avx512::kernels,
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("fma"));
#endif
#if defined(PERFORMERS_HAS_AVX2)
        add("avx2", &avx2::kernels,
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#endif
        add("portable", &portable::kernels, true);
    }
};

const Candidates &candidates() {
    static const Candidates all;
    return all;
}

const char *const kForcing = "PERFORMERS_NATIVE_ISA";

// The first that is supported, or the one that the environment asks for; null if that is not here.
const Candidate *chosen() {
    static const Candidate *const choice = []() -> const Candidate * {
        const char *forced = std::getenv(kForcing);
        const Candidates &all = candidates();
        for (int i = 0; i < all.count; ++i) {
            const bool wanted = !forced || !*forced || std::strcmp(forced, all.list[i].name) == 0;
            if (wanted && all.list[i].supported) return &all.list[i];
        }
        return nullptr;
    }();
    return choice;
}

template <typename Call>
int run(bool (*Kernels::*function)(const Call &), const Call *call) {
    const Candidate *choice = chosen();
    if (!choice) return 2;
    try {
        return (choice->kernels->*function)(*call) ? 0 : 4;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (...) {
        return 3;
    }
}

}  // namespace
}  // namespace performers

using performers::Kernels, performers::run;

int performers_forward(const performers_call *call) { return run(&Kernels::forward, call); }

int performers_backward(const performers_call *call) { return run(&Kernels::backward, call); }

int performers_products(const performers_call *call) { return run(&Kernels::products, call); }

int performers_listed_forward(const performers_listed_call *call) {
    return run(&Kernels::listed_forward, call);
}

int performers_listed_backward(const performers_listed_call *call) {
    return run(&Kernels::listed_backward, call);
}

int64_t performers_call_size(void) { return sizeof(performers_call); }

int64_t performers_listed_call_size(void) { return sizeof(performers_listed_call); }

int performers_abi_version(void) { return PERFORMERS_ABI_VERSION; }

const char *performers_isa(void) {
    const performers::Candidate *choice = performers::chosen();
    return choice ? choice->name : nullptr;
}

const char *performers_available_isas(void) { return performers::candidates().names; }

const char *performers_error(void) {
    if (performers::chosen()) return "";
    static char message[256];
    const char *forced = std::getenv(performers::kForcing);
    std::snprintf(message, sizeof message, "%s must be one of %s here, got \"%s\"",
                  performers::kForcing, performers_available_isas(), forced ? forced : "");
    return message;
}

const char *performers_parallelism(void) { return performers::parallelism(); }
