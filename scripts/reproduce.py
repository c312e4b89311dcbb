"""Make the measured tables of docs/ again: ``make reproduce DATA_DIR=...``.

A table stands between ``<!-- table NAME of SWEEP -->`` and ``<!-- end -->``. It is what ``TABLES``
makes of the runs of ``configs/sweeps/SWEEP.yaml``, which are conversions below ``runs/reproduce``.
What is finished there is skipped, so that the same command goes on where the last one stopped, and
a page whose tables are what the runs say is left alone. All of it takes hours.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tables.headline import headline
from tables.pacing import flops, positions
from tables.prediction import conversions, layers
from tables.quality import quality, routers
from tables.rows import Measured, Row, read_rows
from tables.tasks import tasks
from tables.training import dive, downcycling, recovery
from texts import TEXTS

from weaver.artifacts.manifest import MANIFEST
from weaver.artifacts.store import write_text
from weaver.cli.session import quiet_libraries
from weaver.config.sweeping import load_sweep
from weaver.stages.sweep import cells_of, run_sweep

DOCS, CONFIGS, RUNS = Path("docs"), Path("configs/sweeps"), Path("runs/reproduce")
BLOCK = re.compile(r"(<!-- table (\w+) of (\w+) -->\n\n).*?(<!-- end -->)", re.DOTALL)
TABLES: Mapping[str, Callable[[Measured], str]] = {
    table.__name__: table
    for table in (
        *(quality, routers, tasks, recovery, dive, downcycling),
        *(headline, layers, conversions, positions, flops),
    )
}


@dataclass
class Reproduction:
    """Pages made again from sweeps, each of which is run once.

    Args:
        data_dir: folder of the data sets.
    """

    data_dir: Path
    _rows: dict[str, list[Row] | None] = field(default_factory=dict)

    def page(self, page: Path) -> bool:
        """Write the tables of a page; one with a failed cell stays as it is.

        Returns:
            Whether no cell failed.
        """
        text = page.read_text(encoding="utf-8")
        sweeps = {match[3] for match in BLOCK.finditer(text)}

        def table(match: re.Match[str]) -> str:
            rows = self._measured(match[3])
            if rows is None:
                return match[0]
            made = TABLES[match[2]](Measured(rows, page, self.data_dir))
            return f"{match[1]}{made}\n{match[4]}"

        made = BLOCK.sub(table, text)
        failed = sorted(name for name in sweeps if self._rows[name] is None)
        if made != text:
            write_text(page, made)
        state = "written" if made != text else "up to date"
        print(f"{page}: {f'failed: {failed}' if failed else state}", flush=True)
        return not failed

    def _measured(self, name: str) -> list[Row] | None:
        """The rows of a sweep, run as far as it is not finished; None if a cell failed."""
        if name not in self._rows:
            file = load_sweep(CONFIGS / f"{name}.yaml")
            cells, folder = cells_of(file), RUNS / name
            finished = [c for c in cells if (folder / c.name / "eval" / MANIFEST).exists()]
            print(f"{name}: {len(finished)} of {len(cells)} conversions are measured", flush=True)
            if name in TEXTS:
                (RUNS / "texts").mkdir(parents=True, exist_ok=True)
                TEXTS[name](self.data_dir, RUNS / "texts")
            failures = run_sweep(
                file, folder, data_dir=self.data_dir, say=lambda line: print("", line, flush=True)
            )
            self._rows[name] = None if failures else read_rows(cells, folder)
        return self._rows[name]


def pages(docs: Path) -> list[Path]:
    """The documents that hold tables of sweeps."""
    return [page for page in sorted(docs.glob("*.md")) if BLOCK.search(page.read_text("utf-8"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make pages again.

    Returns:
        1 if a conversion failed, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("pages", type=Path, nargs="*", help="Such as docs/results.md; all.")
    given = parser.parse_args(arguments)
    quiet_libraries()
    reproduction = Reproduction(given.data_dir)
    done = [reproduction.page(page) for page in given.pages or pages(DOCS)]
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
