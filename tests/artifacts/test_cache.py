"""Where the cache lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from weaver.artifacts.cache import cache_folder


def test_the_cache_is_where_the_user_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("WEAVER_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "weaver"
