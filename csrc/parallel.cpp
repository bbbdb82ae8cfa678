#include "parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace performers {
namespace {

struct Loop {
    void (*body)(void *, int64_t);
    void *context;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};
};

void work(void *argument) {
    Loop &loop = *static_cast<Loop *>(argument);
    try {
        for (int64_t i = loop.next++; i < loop.count && !loop.failed; i = loop.next++) {
            loop.body(loop.context, i);
        }
    } catch (...) {
        if (!loop.failed.exchange(true)) loop.error = std::current_exception();
    }
}

// Entry points of OpenMP runtimes. A runtime of our own would keep a second pool of threads that
// spin against torch's after every call, so the one in the process is looked up and used.
using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
using InParallel = int (*)();

struct Runtime {
    GompParallel gomp = nullptr;
    InParallel in_parallel = nullptr;

    Runtime() {
#if !defined(_WIN32)
        gomp = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        in_parallel = reinterpret_cast<InParallel>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
        if (!in_parallel) gomp = nullptr;
#endif
    }
};

const Runtime &runtime() {
    static const Runtime found;
    return found;
}

}  // namespace

void parallel_for(int64_t threads, int64_t count, void (*body)(void *, int64_t), void *context) {
    Loop loop{body, context, count};
    const Runtime &openmp = runtime();
    if (threads <= 1 || count <= 1 || (openmp.in_parallel && openmp.in_parallel())) {
        work(&loop);
    } else if (openmp.gomp) {
        // As many as torch uses even when there are fewer tasks: a smaller team would end the
        // threads that are left over, and torch's next operation would have to start them again.
        openmp.gomp(work, &loop, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        try {
            for (int64_t i = 1; i < threads && i < count; ++i) others.emplace_back(work, &loop);
        } catch (const std::exception &) {
            // Fewer threads than asked for; the loop is finished by those there are.
        }
        work(&loop);
        for (std::thread &other : others) other.join();
    }
    if (loop.error) std::rethrow_exception(loop.error);
}

const char *parallelism() { return runtime().gomp ? "openmp" : "threads"; }

namespace {

constexpr std::align_val_t kAlignment{64};

float *allocate(size_t count) {
    return static_cast<float *>(::operator new(count * sizeof(float), kAlignment));
}

void release(float *memory) { ::operator delete(memory, kAlignment); }

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kMostKept = 0;  // Memory that is used again would hide what is read too late.
#else
constexpr size_t kMostKept = (size_t{64} << 20) / sizeof(float);
#endif

struct Memory {
    float *data;
    size_t capacity;  // In floats.
};

class KeptMemory {
public:
    // The smallest that is large enough, or none.
    Memory take(size_t count) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        // Somebody else's turn, or for ever so in a child that was forked at the wrong moment.
        if (!lock) return {};
        Memory *best = nullptr;
        for (Memory &kept : kept_) {
            if (kept.data && kept.capacity >= count && (!best || kept.capacity < best->capacity)) {
                best = &kept;
            }
        }
        if (!best) return {};
        total_ -= best->capacity;
        return std::exchange(*best, {});
    }

    // Whether it was kept.
    bool keep(const Memory &memory) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock || total_ + memory.capacity > kMostKept) return false;
        for (Memory &kept : kept_) {
            if (kept.data) continue;
            kept = memory;
            total_ += memory.capacity;
            return true;
        }
        return false;
    }

private:
    std::mutex mutex_;
    Memory kept_[4]{};
    size_t total_ = 0;
};

// Never destroyed: a call may end after the destructors of the process have begun.
KeptMemory &kept_memory() {
    static KeptMemory &kept = *new KeptMemory;
    return kept;
}

struct Scratch {
    Memory memory{};
    ~Scratch() { release(memory.data); }
};

}  // namespace

SharedMemory::SharedMemory(int64_t count) {
    if (count == 0) return;
    Memory memory = kept_memory().take(static_cast<size_t>(count));
    if (!memory.data) memory = {allocate(static_cast<size_t>(count)), static_cast<size_t>(count)};
    data = memory.data;
    capacity = memory.capacity;
}

SharedMemory::~SharedMemory() {
    if (data && !kept_memory().keep({data, capacity})) release(data);
}

float *scratch(size_t count) {
    thread_local Scratch mine;
    if (mine.memory.capacity < count) {
        release(std::exchange(mine.memory, {}).data);
        mine.memory = {allocate(count), count};
    }
    return mine.memory.data;
}

}  // namespace performers
