"""Turns, rounds and medians, on a clock that only the calls move."""

import statistics

import pytest

from performers.benchmark.timing import interleave, summarize


class Clock:
    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def call(self, name, durations):
        durations = iter(durations)

        def run():
            self.log.append(name)
            self.now += next(durations)

        return run


def test_summary():
    timing = summarize([4.0, 1.0, 3.0, 2.0, 5.0], calls=7)
    assert timing == (3.0, 2.0, 4.0, 1.0, 5, 7)
    assert summarize([2.0])[:5] == (2.0, 2.0, 2.0, 2.0, 1)


def test_each_has_one_turn_in_every_round_in_changing_order():
    clock = Clock()
    calls = {name: clock.call(name, [2.0] * 99) for name in "abc"}
    timings, errors = interleave(calls, repeats=20, min_time=1.0, clock=clock)
    assert errors == {}
    assert clock.log[:3] == ["a", "b", "c"]
    rounds = [tuple(clock.log[i : i + 3]) for i in range(3, 63, 3)]
    assert len(clock.log) == 63
    assert {frozenset(names) for names in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 1
    assert all(timing.median == 2.0 and timing.rounds == 20 for timing in timings.values())


def test_medians_are_of_the_rounds_without_the_warm_up():
    clock = Clock()
    durations = [9.0, 3.0, 1.0, 2.0]
    timings, _ = interleave({"a": clock.call("a", durations)}, repeats=3, min_time=0, clock=clock)
    assert timings["a"].median == statistics.median(durations[1:]) == 2.0
    assert timings["a"].fastest == 1.0


def test_short_calls_are_repeated_until_the_time_is_reached():
    clock = Clock()
    calls = {"long": clock.call("long", [0.5] * 99), "short": clock.call("short", [0.01] * 999)}
    timings, _ = interleave(calls, repeats=4, min_time=0.8, clock=clock)
    assert timings["long"].calls == 1
    assert timings["short"].calls == 20
    assert timings["short"].median == pytest.approx(0.01)
    # A turn of what is short begins with a call that is not timed.
    assert clock.log.count("short") == 2 + 4 * (1 + 20)
    assert clock.log.count("long") == 2 + 4


@pytest.mark.parametrize("failing_call", [0, 4])
def test_an_error_takes_out_only_whose_it_is(failing_call):
    clock = Clock()
    good, calls = clock.call("good", [0.5] * 99), []

    def bad():
        calls.append(1)
        if len(calls) > failing_call:
            raise RuntimeError("broken")
        clock.now += 0.5

    timings, errors = interleave({"bad": bad, "good": good}, repeats=5, min_time=0, clock=clock)
    assert list(timings) == ["good"]
    assert timings["good"].rounds == 5
    assert str(errors["bad"]) == "broken"
    assert len(calls) == failing_call + 1
