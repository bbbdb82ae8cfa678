// Parallel loops on the thread pool that torch already runs, and memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace performers {

// Calls body(context, i) for every i in [0, count), on at most `threads` threads. Tasks are handed
// out one at a time, in order.
void parallel_for(int64_t threads, int64_t count, void (*body)(void *, int64_t), void *context);

const char *parallelism();

// At least `count` floats, aligned to 64 bytes, owned by the calling thread and reused by its next
// call of scratch. Throws std::bad_alloc.
float *scratch(size_t count);

// `count` floats, aligned to 64 bytes, until release. Throws std::bad_alloc.
float *allocate(size_t count);
void release(float *memory);

struct Memory {
    float *data;
    size_t capacity;  // In floats.
};

// At least `count` floats, aligned to 64 bytes, until give_back, which keeps some (64 MiB in all, in
// the whole process) for the next who borrows. Throws std::bad_alloc.
Memory borrow(size_t count);
void give_back(const Memory &memory);

}  // namespace performers
