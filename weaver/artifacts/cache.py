"""The folder of what is made once per machine and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$WEAVER_CACHE``, or ``~/.cache/weaver``."""
    return Path(os.environ.get("WEAVER_CACHE") or Path.home() / ".cache" / "weaver")
