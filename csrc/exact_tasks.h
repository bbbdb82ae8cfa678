// Calls with exact pairs: the tasks of bidirectional calls with a window, and the exact share of all
// gradients.
#pragma once

#include "tasks.h"
#include "windowed_gradients.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The gradients of sinks that one task gathers.
struct SinkGradients {
    float *key, *value;
};

// The exact pairs alone.
inline void forward_exact(const Problem &p) {
    const std::vector<Span> whole = sequences(p.call);
    const bool cutting = whole.size() == 1 && p.heads < p.call.threads;
    const int64_t parts = cutting ? parts_of(p.call.length, 2 * p.call.threads / p.heads) : 1;
    const std::vector<Span> spans = parts > 1 ? cut(p.call.length, p.call.size, parts) : whole;
    const int64_t count = static_cast<int64_t>(spans.size());
    parallel(p, p.heads * count, [&](int64_t i) {
        const int64_t head = i / count;
        const Span &span = spans[static_cast<size_t>(i % count)];
        auto b = in_scratch<QueryBuffers>(p);
        for (int64_t group = 0; group < p.call.groups; ++group) {
            const Rows queries = p.query_rows(p.call.query, head, group);
            for (int64_t start = span.begin; start < span.end; start += kBlock) {
                const int64_t rows = smaller(kBlock, span.end - start);
                b.block.load_queries(p, queries, start, rows);
                for (int64_t r = 0; r < kBlock; ++r) b.scale[r] = b.inverse[r] = 0;
                for (int64_t j = 0; j < rows * p.padded_value; ++j) b.out[j] = 0;
                exact_sums(p, head, span, start, b.block, b.near);
                add_exact(p, rows, b.near, b.out, b.scale, b.inverse);
                for (int64_t r = 0; r < rows; ++r) b.inverse[r] = inverse_of(b.inverse[r]);
                finish_rows(p, head, group, start, rows, b.out, b.scale, b.inverse);
            }
        }
    });
}

// Adds the exact share to all gradients, before the features add theirs.
inline void backward_exact(const Problem &p) {
    std::vector<Span> spans = sequences(p.call);
    // Parts of a sequence share keys with those nearby: of `apart` parts one runs at a time.
    int64_t apart = 1;
    if (spans.size() == 1 && p.heads < p.call.threads) {
        const int64_t parts = parts_of(p.call.length, 2 * p.call.threads / p.heads);
        if (parts > 1) {
            spans = cut(p.call.length, p.call.size, parts);
            const int64_t size = spans[0].end;
            if (p.window > 0) apart += (2 * p.window + size - 1) / size;
        }
    }
    const int64_t count = static_cast<int64_t>(spans.size());
    const int64_t keys = p.call.sinks * p.head_dim, values = p.call.sinks * p.value_dim;
    SharedMemory memory(p.heads * count * (keys + values));
    const auto sinks_of = [&](int64_t head, int64_t part) {
        float *at = memory.data() + (head * count + part) * (keys + values);
        return SinkGradients{at, at + keys};
    };
    for (int64_t phase = 0; phase < smaller(apart, count); ++phase) {
        const int64_t tasks = (count - phase + apart - 1) / apart;
        parallel(p, p.heads * tasks, [&](int64_t i) {
            const int64_t head = i / tasks, part = phase + i % tasks * apart;
            const SinkGradients sinks = sinks_of(head, part);
            for (int64_t j = 0; j < keys + values; ++j) sinks.key[j] = 0;
            auto b = in_scratch<ExactGradientBuffers>(p);
            exact_gradients(p, head, spans[static_cast<size_t>(part)], sinks.key, sinks.value, b);
        });
    }
    if (p.call.sinks == 0) return;
    for (int64_t head = 0; head < p.heads; ++head) {
        for (int64_t part = 0; part < count; ++part) {
            const Span &span = spans[static_cast<size_t>(part)];
            const int64_t sequence = p.sequence_of(head, span);
            const int64_t index = sequence * p.call.key_heads + p.key_head_of(head);
            const SinkGradients sinks = sinks_of(head, part);
            add_rows(sinks.key, keys, 1, keys, p.call.grad_sink_key + index * keys, keys);
            add_rows(sinks.value, values, 1, values, p.call.grad_sink_value + index * values,
                     values);
        }
    }
}

// One unit of work, done by the task that asks for it, or a batch whose steps are cut into `parts`
// tasks for each unit.
struct FarTasks {
    const FarUnit *units;
    int64_t count, parts;
    int64_t lane;  // of the task that asks

    // Calls body(unit, begin, end, lane) for all of length(unit) of every unit. No two calls at the
    // same time have the same lane.
    template <typename Length, typename Body>
    void run(const Problem &p, Length &&length, Body &&body) const {
        if (parts == 0) return body(units[0], 0, length(units[0]), lane);
        parallel(p, count * parts, [&](int64_t i) {
            const FarUnit &unit = units[i / parts];
            const int64_t whole = length(unit), part = i % parts;
            const int64_t begin = part * whole / parts, end = (part + 1) * whole / parts;
            if (begin < end) body(unit, begin, end, i);
        });
    }
};

// The sequences of a bidirectional call with a window, and the memory of a few at a time. While there
// are as many as threads, each is one task; the rest are cut into parts, step by step.
class FarWork {
public:
    FarWork(const Problem &p, bool backward)
        : p_(p), units_(units_of(p)), memory_(place(backward)) {}

    // Calls work(tasks) for every unit alone, in parallel, and for batches one after the other.
    template <typename Work>
    void run(Work &&work) {
        const int64_t threads = larger<int64_t>(1, p_.call.threads);
        const int64_t alone = slots_ < threads ? 0 : count() / threads * threads;
        parallel(p_, smaller(slots_, alone), [&](int64_t slot) {
            for (int64_t i = slot; i < alone; i += slots_) {
                const FarUnit unit = at(i, slot);
                work(FarTasks{&unit, 1, 0, slot});
            }
        });
        for (int64_t begin = alone; begin < count(); begin += slots_) {
            const int64_t size = smaller(slots_, count() - begin);
            std::vector<FarUnit> batch;
            for (int64_t i = 0; i < size; ++i) batch.push_back(at(begin + i, i));
            work(FarTasks{batch.data(), size, (threads + size - 1) / size, 0});
        }
    }

private:
    static constexpr int64_t kLarge = int64_t{1} << 26;  // floats

    static std::vector<FarUnit> units_of(const Problem &p) {
        std::vector<FarUnit> units;
        const std::vector<Span> spans = sequences(p.call);
        for (int64_t head = 0; head < p.heads; ++head) {
            for (const Span &span : spans) units.push_back({head, FarGrid(p, span)});
        }
        return units;
    }

    int64_t count() const { return static_cast<int64_t>(units_.size()); }

    // As many slots as threads, each large enough for any unit, or as fit in what is large.
    int64_t place(bool backward) {
        backward_ = backward;
        for (const FarUnit &unit : units_) {
            Arena counting(nullptr);
            FarUnit copy = unit;
            copy.place(counting, p_, backward);
            size_ = larger(size_, static_cast<int64_t>(counting.used()));
        }
        const int64_t fitting = larger<int64_t>(1, kLarge / larger<int64_t>(1, size_));
        slots_ = smaller(smaller(larger<int64_t>(1, p_.call.threads), count()), fitting);
        return slots_ * size_;
    }

    FarUnit at(int64_t i, int64_t slot) const {
        FarUnit unit = units_[static_cast<size_t>(i)];
        Arena arena(memory_.data() + slot * size_);
        unit.place(arena, p_, backward_);
        return unit;
    }

    const Problem &p_;
    std::vector<FarUnit> units_;
    bool backward_ = false;
    int64_t size_ = 0, slots_ = 1;
    SharedMemory memory_;
};

inline int64_t key_segments_of(const FarUnit &unit) { return unit.grid.keys().count(); }
inline int64_t query_segments_of(const FarUnit &unit) { return unit.grid.queries().count(); }

// Features and sums of keys, added up.
inline void gather_far(const Problem &p, const FarTasks &tasks) {
    tasks.run(p, key_segments_of, [&](const FarUnit &unit, int64_t begin, int64_t end, int64_t) {
        auto b = in_scratch<FarKeyBuffers>(p);
        far_keys(p, unit, begin, end, b);
    });
    const auto features = [&](const FarUnit &) { return p.features; };
    tasks.run(p, features, [&](const FarUnit &unit, int64_t begin, int64_t end, int64_t) {
        far_sums(p, unit, begin, end, tasks.parts > 0);
    });
}

inline void forward_windowed(const Problem &p) {
    FarWork work(p, false);
    work.run([&](const FarTasks &tasks) {
        gather_far(p, tasks);
        tasks.run(p, query_segments_of,
                  [&](const FarUnit &unit, int64_t begin, int64_t end, int64_t) {
                      auto b = in_scratch<FarQueryBuffers>(p);
                      far_queries(p, unit, begin, end, b);
                  });
    });
}

inline void backward_windowed(const Problem &p, const WeightGradients &trained) {
    const auto features = [&](const FarUnit &) { return p.features; };
    const auto reading_keys = [](const FarUnit &unit) { return unit.grid.reading_keys().count(); };
    FarWork work(p, true);
    work.run([&](const FarTasks &tasks) {
        gather_far(p, tasks);
        tasks.run(p, query_segments_of,
                  [&](const FarUnit &unit, int64_t begin, int64_t end, int64_t lane) {
                      auto b = in_scratch<FarGradientBuffers>(p);
                      b.trained = trained.at(lane);
                      far_query_gradients(p, unit, begin, end, b);
                  });
        tasks.run(p, features, [&](const FarUnit &unit, int64_t begin, int64_t end, int64_t) {
            if (!unit.grid.reaches()) return;
            add_segments(p, unit.grads, query_segments_of(unit), false, tasks.parts > 0, begin,
                         end);
        });
        tasks.run(p, reading_keys,
                  [&](const FarUnit &unit, int64_t begin, int64_t end, int64_t lane) {
                      auto b = in_scratch<FarGradientBuffers>(p);
                      b.trained = trained.at(lane);
                      far_key_gradients(p, unit, begin, end, b);
                  });
    });
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
