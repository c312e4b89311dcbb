"""Results of eval and bench that are missing or damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from weaver.errors import WeaverError
from weaver.rundir.measurements import read_bench, read_eval


@pytest.mark.parametrize(("stage", "read"), [("eval", read_eval), ("bench", read_bench)])
@pytest.mark.parametrize("text", ["{}", "[]", "[1]", "3", '{"kl": "x"}'])
def test_what_no_stage_writes_is_refused(
    tmp_path: Path, stage: str, read: Callable[[Path], object], text: str
) -> None:
    path = tmp_path / stage / "results.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(WeaverError) as caught:
        read(tmp_path)
    assert caught.value.what == f"{path}: not what {stage} writes"
    assert caught.value.fix == f"weaver {stage} --run-dir {tmp_path} --force"
