// Parallel loops on the thread pool that torch already runs, and memory, aligned to 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace performers {

// Calls body(context, i) for every i in [0, count), on at most `threads` threads. Tasks are handed
// out one at a time, in order.
void parallel_for(int64_t threads, int64_t count, void (*body)(void *, int64_t), void *context);

const char *parallelism();

// At least `count` floats, owned by the calling thread and reused by its next call of scratch.
float *scratch(size_t count);

// Floats for the duration of a call, shared by its tasks. Some (64 MiB in all, in the whole process)
// are kept for later calls: fresh memory costs a fault for each page at its first use, and the threads
// of a call wait for each other there.
struct SharedMemory {
    float *data = nullptr;
    size_t capacity = 0;

    explicit SharedMemory(int64_t count);
    ~SharedMemory();
    SharedMemory(const SharedMemory &) = delete;
    SharedMemory &operator=(const SharedMemory &) = delete;
};

}  // namespace performers
