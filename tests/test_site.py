"""The site of the documents builds, and no link of it leads nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from site_pages import relinked

ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_its_links_hold(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="weaver.api.convert"' in reference
    assert 'id="weaver.config.sections.PartitionConfig"' in reference
    assert (tmp_path / "examples" / "index.html").exists()


def test_links_lead_to_pages_of_the_site() -> None:
    text = "[a](docs/usage.md) [b](../README.md#methods) [c](../examples) [d](https://x.org/docs/)"
    assert relinked(text) == (
        "[a](usage.md) [b](index.md#methods) [c](examples.md) [d](https://x.org/docs/)"
    )
