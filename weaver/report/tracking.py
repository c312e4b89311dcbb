"""Curves of a training for an experiment tracker, through accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weaver.errors import WeaverError

TRACKERS = ("tensorboard", "trackio", "wandb")
Log = Callable[[Mapping[str, float], int], None]


@contextmanager
def tracking(
    name: str | None, run_name: str, folder: Path, settings: Mapping[str, Any]
) -> Iterator[Log]:
    """A tracker that is open for the length of a ``with`` block.

    Args:
        name: one of ``TRACKERS``; None tracks nothing.
        run_name: what the tracker calls the run.
        folder: where a tracker that writes files does so.
        settings: the configuration, shown beside the curves.

    Yields:
        ``log(values, step)``.

    Raises:
        WeaverError: no such tracker, or its package is not installed.
    """
    if name is None:
        yield lambda _values, _step: None
        return
    check_tracker(name)
    # It takes seconds to import, and few runs need it.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (run_name, folder) if kind.requires_logging_directory else (run_name,)
    tracker = kind(*arguments)
    tracker.start()
    try:
        tracker.store_init_configuration({key: _plain(value) for key, value in settings.items()})
        yield lambda values, step: tracker.log(dict(values), step=step)
    finally:
        tracker.finish()


def check_tracker(name: str) -> None:
    """Check that a tracker is known and installed.

    Raises:
        WeaverError: it is not.
    """
    if name not in TRACKERS:
        raise WeaverError(
            f"no tracker is called {name}",
            why=f"known trackers are {', '.join(TRACKERS)}",
            fix=f"--report-to {TRACKERS[0]}",
        )
    from accelerate.tracking import get_available_trackers

    if name not in map(str, get_available_trackers()):
        raise WeaverError(
            f"the tracker {name} is not installed",
            why="trackers are packages of their own, and weaver needs none of them",
            fix=f"pip install {name}",
        )


def _plain(value: Any) -> bool | int | float | str:
    """A value as trackers take it: no lists, no mappings."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
