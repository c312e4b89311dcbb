"""weaver: dense GLU language models into Mixture-of-Experts models, without training.

Importing the package registers the converted model types with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads them. The ``weaver`` command leaves that to the
stages that need it: registration imports torch, and ``--help`` should not wait for it.
"""

from __future__ import annotations

import sys
from pathlib import Path


def _started_as_command() -> bool:
    # While ``python -m weaver`` imports the package, sys.argv[0] is still "-m".
    as_module = "-m" in sys.orig_argv and "weaver" in sys.orig_argv and sys.argv[:1] == ["-m"]
    return as_module or (bool(sys.argv) and Path(sys.argv[0]).stem == "weaver")


if not _started_as_command():
    from weaver.models.hf import register

    register()
