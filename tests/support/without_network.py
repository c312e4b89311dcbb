"""Sets what huggingface_hub reads as it is imported: processes forked of tests ask no server."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
