"""Measurements that no stage makes, kept beside the run that they are of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weaver.artifacts.manifest import MANIFEST
from weaver.artifacts.store import write_json


def kept(path: Path, stage: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement in a file, made unless it is there and not older than what it is of.

    Args:
        path: a JSON file.
        stage: folder of the finished stage that is measured.
        measure: makes what the file holds.
    """
    made = (stage / MANIFEST).stat().st_mtime
    if not path.exists() or path.stat().st_mtime < made:
        write_json(path, measure())
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
