"""A clock for tests of timings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Clock:
    """Stands still unless something sleeps on it; takes the place of ``perf_counter``."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def around(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, taking so long."""

        def slow(*arguments: Any, **named: Any) -> Any:
            self.sleep(seconds)
            return function(*arguments, **named)

        return slow
