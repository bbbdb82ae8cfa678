// The C interface of the native kernels. Python fills these structures through ctypes, so that one
// library serves every version of Python and of torch. Change PERFORMERS_ABI_VERSION with them.
#pragma once

#include <stdint.h>

#define PERFORMERS_ABI_VERSION 7

#if defined(_WIN32)
#define PERFORMERS_API extern "C" __declspec(dllexport)
#else
#define PERFORMERS_API extern "C" __attribute__((visibility("default")))
#endif

enum performers_type { PERFORMERS_FLOAT32 = 0, PERFORMERS_BFLOAT16 = 1, PERFORMERS_FLOAT16 = 2 };

// exponential: phi(x) = exp(W x + b - |x|^2 / 2); rectified: phi(x) = max(W x + b, 0) + epsilon.
enum performers_kind { PERFORMERS_EXPONENTIAL = 0, PERFORMERS_RECTIFIED = 1 };

// Which pairs of a call are summed: all, those through features, or those that are exact. Each part is
// divided by a normaliser of its own.
enum performers_part { PERFORMERS_WHOLE = 0, PERFORMERS_FEATURES = 1, PERFORMERS_EXACT = 2 };

// A strided array (batch, key head, group, row, column); strides in elements.
typedef struct {
    void *data;
    int64_t strides[5];
    int64_t type;
} performers_array;

// Sums over keys: (batch, key_heads, features, value_dim), and twice (batch, key_heads, features). Log
// scales are natural logarithms, where nothing else is said.
typedef struct {
    float *key_value, *key_sum, *log_scale;
} performers_sums;

// One attention call. Pointers without a comment to the contrary are float32 and contiguous;
// those marked "or null" may be absent.
typedef struct {
    int64_t batch, key_heads, groups;
    int64_t length;      // queries
    int64_t size;        // keys; length + offset for causal calls, length for packed ones
    int64_t head_dim, value_dim, features;
    int64_t weight_heads;  // 1 or key_heads
    int64_t kind;
    int64_t quadratic;   // whether |x|^2 / 2 is subtracted
    int64_t causal;
    int64_t threads;
    // Query i stands at the position of key i + offset and meets exactly the keys within `window`
    // of it (negative: none) and the sinks that it sees; only for quadratic exponential features.
    int64_t offset, window, sinks;
    int64_t part;
    double scale, epsilon;
    double normalizer;   // of the products of features, where they stand beside exact pairs

    performers_array query, key, value;
    const float *weight;      // (weight_heads, features, head_dim)
    const float *bias;        // (weight_heads, features) or null
    const uint8_t *key_mask;  // (batch, size), nonzero takes part, or null
    const int64_t *segments;  // (size), equal within a packed sequence, or null
    // (batch, size), rising within each sequence, or null: what the window of exact pairs is measured
    // in, in place of rows; only for bidirectional calls of PERFORMERS_EXACT.
    const int64_t *positions;

    // The sinks of each sequence (batch row, or packed sequence by its segment): (sequence, key
    // head, -, sink, column), and the first query that sees each, (sequences, sinks).
    performers_array sink_key, sink_value;
    const int64_t *sink_first;

    performers_sums past;  // of a causal call, or null

    // Results of the forward pass, given back to the backward pass.
    performers_array out;  // float32
    float *row_scale;      // (batch, key_heads, groups, length): binary logarithm of a row's scale
    float *row_inverse;    // likewise: one over the normaliser at that scale; negative for rows
                           // whose pairs within the chunk had to be summed at a scale of their own
    // Over all keys. For causal calls over all but the last `window`, in the form of a past, or null;
    // for bidirectional ones (unless packed or with a window) with binary logarithms.
    performers_sums sums;

    // The backward pass.
    performers_array grad_out;
    const float *grad_log_normaliser;  // of the natural logarithm of each row's normaliser, or null
    float *grad_key_value, *grad_key_sum;  // of a causal call's final sums, or null
    // Written; but with a window, sinks or a part of the pairs they are float32, and added to.
    performers_array grad_query, grad_key, grad_value;
    float *grad_past_key_value, *grad_past_key_sum;  // or null
    float *grad_sink_key, *grad_sink_value;  // (sequences, key_heads, sinks, columns), added to
    float *grad_weight, *grad_bias;  // both, as weight and bias, or both null
} performers_call;

// Queries in blocks, and the list of keys that each block meets. The blocks of a list follow each
// other; every query is in one block.
typedef struct {
    // Sizes, projection and gradients, of exponential features: `size` keys in a list; query, key and
    // value are (batch, key head, -, groups * length, column) and, twice, (batch, key head, list, key,
    // column), and query i is at position i % length. Only keys farther than `window` from a query
    // meet it. Gradients of keys of lists without a block are left alone.
    performers_call call;
    int64_t blocks, rows;       // blocks of a head, and places in each, at most 64
    int64_t lists;              // of a head
    const int64_t *row;         // (batch, key_heads, blocks, rows): the query in each place, or -1
    const int64_t *position;    // (batch, key_heads, lists, size): of each key, or -1 for none
    const int64_t *list_begin;  // (batch, key_heads, lists + 1): the first block of each list
    const uint8_t *hidden;      // (batch, key_heads, blocks, size, rows), nonzero for pairs that do
                                // not meet all the same, or null

    // Of the estimates without the factor exp(-scale |q|^2 / 2) and the normalizer, and of the exact
    // weights: normalised rows (batch, key_heads, queries, value_dim), and the natural logarithms of
    // their normalisers, minus infinity for rows that meet no key; in double precision, because sums
    // are compared by them.
    float *estimate, *exact;
    double *estimate_log, *exact_log;
    const float *grad_estimate, *grad_estimate_log, *grad_exact, *grad_exact_log;
} performers_listed_call;

// 0, or 1 when memory ran out, or 2 when no instruction set can be chosen (performers_error), or 3
// for anything else that failed, or 4 when performers_forward met NaN or infinity among the queries,
// or the keys and values that take part: then its results mean nothing.
PERFORMERS_API int performers_forward(const performers_call *call);
PERFORMERS_API int performers_backward(const performers_call *call);
PERFORMERS_API int performers_listed_forward(const performers_listed_call *call);
PERFORMERS_API int performers_listed_backward(const performers_listed_call *call);

// The matrix products of a bidirectional forward pass of the call's sizes, alone and in the caches:
// what measurements compare with. Only sizes and threads are read.
PERFORMERS_API int performers_products(const performers_call *call);

PERFORMERS_API int performers_abi_version(void);
PERFORMERS_API int64_t performers_call_size(void);  // sizeof(performers_call)
PERFORMERS_API int64_t performers_listed_call_size(void);
// The instruction set in use; null when PERFORMERS_NATIVE_ISA asks for one that cannot be had.
PERFORMERS_API const char *performers_isa(void);
// Those this processor can run, best first, separated by spaces.
PERFORMERS_API const char *performers_available_isas(void);
PERFORMERS_API const char *performers_error(void);
// What runs tasks in parallel: "openmp" (the runtime that is already loaded, which is torch's) or
// "threads".
PERFORMERS_API const char *performers_parallelism(void);
