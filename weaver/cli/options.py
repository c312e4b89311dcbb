"""Options that subcommands share, as annotated types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunDir = Annotated[
    Path, typer.Option("--run-dir", "-r", help="Folder that holds one folder per stage.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; this stage's section is read.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="section.key=value, over the file; may be repeated."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Root of all randomness.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="auto (a GPU if there is one), cpu, cuda or cuda:N. \\[default: auto]",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Make the stage again, in place of what its folder holds.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run, be skipped or be refused.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="WEAVER_DATA",
        help="Where data files are looked for after the current folder.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="builtin:calibration, a .jsonl/.json/.parquet/.txt/.raw file or folder, or hf:NAME; "
        "with :WEIGHT for a mixture. May be repeated.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the dense model's own code run.")
]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="A calibrate folder of another run, instead of this one's."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and warnings alone, no progress.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON with the summary instead of tables.")
]
