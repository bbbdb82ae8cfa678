"""Which settings are worth having, and which one to take."""

from collections.abc import Sequence
from dataclasses import dataclass

from performers.planning.settings import Setting


def pareto_front(settings: Sequence[Setting]) -> list[Setting]:
    """Settings that no other one equals in error and time and betters in one, fastest first."""
    front: list[Setting] = []
    for setting in sorted(settings, key=lambda setting: (setting.seconds, setting.error)):
        if not front or setting.error < front[-1].error:
            front.append(setting)
    return front


@dataclass(frozen=True)
class Choice:
    """A setting, whether it meets the targets, and why it was taken."""

    setting: Setting
    met: bool
    reason: str


def choose(
    front: Sequence[Setting], target_error: float | None, target_time: float | None
) -> Choice:
    """Take one setting of the front.

    * With ``target_error``, the fastest that meets it; with ``target_time`` as well, within that.
    * With ``target_time`` alone, the most accurate within it.
    * Without either, the one with the least ``error^2 * seconds``, the inverse efficiency of a
      Monte Carlo method. A setting made ``n`` times as slow by more features has at best
      ``1 / n`` of its squared error: none of the others, given more features, would then have
      less error in less time.
    * Where nothing meets ``target_error``, the most accurate (within ``target_time``, if anything
      is); where nothing is as fast as ``target_time``, the fastest. Neither counts as met.
    """
    if target_error is None and target_time is None:
        knee = min(front, key=lambda setting: setting.error**2 * setting.seconds)
        return Choice(knee, True, "the least error^2 x time")
    in_time = [s for s in front if target_time is None or s.seconds <= target_time]
    limit = "" if target_time is None else f" within {1e3 * target_time:.4g} ms"
    if not in_time:
        return Choice(front[0], False, f"NOTHING is{limit}: the fastest")
    if target_error is None:
        return Choice(in_time[-1], True, f"the most accurate{limit}")
    good = [s for s in in_time if s.error <= target_error]
    if not good:
        reason = f"NOTHING reaches an error of {target_error:.4g}{limit}: the most accurate"
        return Choice(in_time[-1], False, reason)
    return Choice(good[0], True, f"the fastest with an error of at most {target_error:.4g}{limit}")
