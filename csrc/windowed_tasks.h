// Bidirectional calls with a window.
#pragma once

#include "tasks.h"
#include "windowed_gradients.h"

namespace performers::PERFORMERS_ISA {
namespace {

// One unit of work, done by the task that asks for it, or a batch whose steps are cut into `parts`
// tasks for each unit.
struct WindowTasks {
    const WindowUnit *units;
    int64_t count, parts;
    int64_t lane;  // of the task that asks

    // Calls body(unit, begin, end, lane) for all of length(unit) of every unit. No two calls at the
    // same time have the same lane.
    template <typename Length, typename Body>
    void run(const Problem &p, Length &&length, Body &&body) const {
        if (parts == 0) return body(units[0], 0, length(units[0]), lane);
        parallel(p, count * parts, [&](int64_t i) {
            const WindowUnit &unit = units[i / parts];
            const int64_t whole = length(unit), part = i % parts;
            const int64_t begin = part * whole / parts, end = (part + 1) * whole / parts;
            if (begin < end) body(unit, begin, end, i);
        });
    }
};

// The sequences of a bidirectional call with a window, and the memory of a few at a time. While there
// are as many as threads, each is one task; the rest are cut into parts, step by step.
class WindowWork {
public:
    WindowWork(const Problem &p, bool backward) : p_(p), backward_(backward) {}

    // Calls work(tasks) for every unit alone, in parallel, and for batches one after the other.
    template <typename Work>
    void run(Work &&work) const {
        const int64_t alone = slots_ < threads_ ? 0 : count_ / threads_ * threads_;
        parallel(p_, smaller(slots_, alone), [&](int64_t slot) {
            for (int64_t i = slot; i < alone; i += slots_) {
                const WindowUnit unit = at(i, slot);
                work(WindowTasks{&unit, 1, 0, slot});
            }
        });
        for (int64_t begin = alone; begin < count_; begin += slots_) {
            const int64_t size = smaller(slots_, count_ - begin);
            std::vector<WindowUnit> batch;
            for (int64_t i = 0; i < size; ++i) batch.push_back(at(begin + i, i));
            work(WindowTasks{batch.data(), size, (threads_ + size - 1) / size, 0});
        }
    }

private:
    static constexpr int64_t kLarge = int64_t{1} << 26;  // floats

    // Unit i, in the memory of a slot.
    WindowUnit at(int64_t i, int64_t slot) const {
        Arena arena(memory_.data + slot * size_);
        WindowUnit unit = units_[static_cast<size_t>(i)];
        unit.place(arena, p_, backward_);
        return unit;
    }

    std::vector<WindowUnit> all_units() const {
        std::vector<WindowUnit> units;
        const std::vector<Span> spans = sequences(p_.call);
        for (int64_t head = 0; head < p_.heads; ++head) {
            for (const Span &span : spans) units.push_back({head, {span, p_.window}});
        }
        return units;
    }

    int64_t largest_unit() const {
        int64_t size = 1;
        for (WindowUnit unit : units_) {
            Arena counting(nullptr);
            unit.place(counting, p_, backward_);
            size = larger(size, static_cast<int64_t>(counting.used()));
        }
        return size;
    }

    const Problem &p_;
    const bool backward_;
    const std::vector<WindowUnit> units_ = all_units();
    const int64_t threads_ = larger<int64_t>(1, p_.call.threads);
    const int64_t count_ = static_cast<int64_t>(units_.size()), size_ = largest_unit();
    // As many slots as threads, each large enough for any unit, or as fit in what is large.
    const int64_t slots_ = smaller(smaller(threads_, count_), larger<int64_t>(1, kLarge / size_));
    const SharedMemory memory_{slots_ * size_};
};

// Features and sums of keys, added up.
inline void sum_windowed_keys(const Problem &p, const WindowTasks &tasks) {
    const auto key_segments = [](const WindowUnit &unit) { return unit.grid.keys().count(); };
    tasks.run(p, key_segments, [&](const WindowUnit &unit, int64_t begin, int64_t end, int64_t) {
        auto b = in_scratch<WindowKeyBuffers>(p);
        windowed_keys(p, unit, begin, end, b);
    });
    const auto features = [&](const WindowUnit &) { return p.features; };
    tasks.run(p, features, [&](const WindowUnit &unit, int64_t begin, int64_t end, int64_t) {
        windowed_sums(unit, begin, end, tasks.parts > 0);
    });
}

inline int64_t query_segments(const WindowUnit &unit) { return unit.grid.queries().count(); }

inline void forward_windowed(const Problem &p) {
    WindowWork(p, false).run([&](const WindowTasks &tasks) {
        sum_windowed_keys(p, tasks);
        tasks.run(p, query_segments, [&](const WindowUnit &unit, int64_t begin, int64_t end, int64_t) {
            auto b = in_scratch<WindowQueryBuffers>(p);
            windowed_queries(p, unit, begin, end, b);
        });
    });
}

inline void backward_windowed(const Problem &p, const WeightGradients &trained) {
    const auto features = [&](const WindowUnit &) { return p.features; };
    const auto reading_keys = [](const WindowUnit &unit) { return unit.grid.reading_keys().count(); };
    WindowWork(p, true).run([&](const WindowTasks &tasks) {
        const auto run = [&](auto &&length, auto &&gradients) {
            tasks.run(p, length, [&](const WindowUnit &unit, int64_t begin, int64_t end, int64_t lane) {
                auto b = in_scratch<WindowGradientBuffers>(p);
                b.inputs.trained = trained.at(lane);
                gradients(p, unit, begin, end, b);
            });
        };
        sum_windowed_keys(p, tasks);
        run(query_segments, windowed_query_gradients);
        tasks.run(p, features, [&](const WindowUnit &unit, int64_t begin, int64_t end, int64_t) {
            if (unit.grid.reaches()) unit.grads.add_up(tasks.parts > 0, begin, end);
        });
        run(reading_keys, windowed_key_gradients);
    });
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
