"""What every fuzz program shares: seeded mutations of JSON, and calls that must end soon, and in a declared way."""

import collections
import copy
import random
import signal
from collections.abc import Callable
from typing import Any

SECONDS = 10

ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        7,
        64,
        0.0,
        -0.0,
        0.5,
        50.0,
        -1.5,
        1e-300,
        1e300,
        10**12,
        10**30,
        2**31,
        2**63,
    ),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "false", "1", "\ud800", "\x00", "../x", "a" * 300, "é" * 9),
    *([], [1], [None], [True], ["x"], [[1]], [0.0] * 4, [1e308] * 4, {}, {"x": 1}, {"content": 3}, {"type": "yarn"}),
)
"""What no field, or few, expect."""


class Hang(BaseException):
    """A call that does not end."""


class Outcomes:
    """How calls ended, by the kind of mutation, and those that ended in no declared way."""

    def __init__(self, *declared: type[Exception]):
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.failures: list[str] = []
        self._declared = declared

    def of(self, kind: str, what: str, call: Callable[[], str], names: Callable[[str], bool]) -> None:
        """Run a call, which returns how it went; an error of it has to name what is to blame."""
        timer = signal.signal(signal.SIGALRM, _hang)
        signal.alarm(SECONDS)
        try:
            outcome = call()
        except self._declared as error:
            outcome = "refused" if names(str(error)) else self._fail(what, error)
        except (Exception, Hang) as error:
            outcome = self._fail(what, error)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, timer)
        self.counts[kind][outcome] += 1

    def _fail(self, what: str, error: BaseException) -> str:
        self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        return "failed"

    def table(self) -> str:
        """Counts, a row a kind of mutation."""
        outcomes = sorted({outcome for counts in self.counts.values() for outcome in counts})
        lines = ["".join(f"{name:>12}" for name in ("mutations", *outcomes))]
        rows = {**self.counts, "all": sum(self.counts.values(), collections.Counter())}
        for kind, counts in rows.items():
            lines.append("".join(f"{n:12}" for n in (counts.total(), *map(counts.__getitem__, outcomes))) + f"  {kind}")
        return "\n".join(lines)


def mutated(value: Any, rng: random.Random, fields: tuple[str, ...] = ()) -> tuple[Any, str]:
    """JSON with one value changed, taken away or added, and what was done; `fields` are names that may be added."""
    value = copy.deepcopy(value)
    places = [*_places(value, ())]
    *within, key = rng.choice(places) if places else ("x",)
    holder = value
    for step in within:
        holder = holder[step]
    odd = copy.deepcopy(rng.choice(ODD_VALUES))
    if isinstance(holder, dict) and fields and rng.random() < 0.4:
        key = rng.choice(fields)
        holder[key] = odd
    elif places and rng.random() < 0.1:
        del holder[key]
        return value, f"without {[*within, key]}"
    else:
        holder[key] = odd
    return value, f"{[*within, key]} = {odd!r:.80}"


def _places(value: Any, path: tuple) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:40]:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _hang(*_: Any) -> None:
    raise Hang(f"it does not end within {SECONDS} seconds")
