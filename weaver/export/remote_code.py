"""``--remote-code``: a model folder that loads where weaver is not installed."""

from __future__ import annotations

from pathlib import Path

from weaver.artifacts.store import read_json, write_json, write_text
from weaver.errors import WeaverError
from weaver.models import pacing
from weaver.models.families import ALL_FAMILIES
from weaver.models.hf import CONVERTED

SOURCE = Path(__file__).parent / "remote" / "modeling_weaver.py"
PACING = Path(pacing.__file__)


def add_remote_code(folder: Path) -> None:
    """Add the code of weaver's types to a model folder, and ``auto_map`` to its ``config.json``.

    ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` then needs nothing but
    torch and transformers. Where weaver is imported, its own classes are used as before. Weights
    stay as they are; a second call changes nothing.

    Args:
        folder: a model of weaver's own type, as ``assemble`` or ``save_pretrained`` wrote it.

    Raises:
        WeaverError: the folder has no readable ``config.json``, holds another type of model, or
            cannot be written.
    """
    path = folder / "config.json"
    values = read_json(path, rebuild="weaver export RUN --to weaver --out DIR --remote-code")
    model_type = str(values.get("model_type"))
    family = ALL_FAMILIES.get(model_type.removeprefix("weaver_"))
    if family is None or family.converted_model_type != model_type:
        raise WeaverError(
            f"{path}: model_type {model_type!r} needs no code of weaver's",
            why="remote code is for models of weaver's own type, weaver_llama and the like",
            fix="export with --to weaver, or without --remote-code",
        )
    classes = CONVERTED[family.model_type]
    values["auto_map"] = {
        "AutoConfig": f"{SOURCE.stem}.{classes.config.__name__}",
        "AutoModel": f"{SOURCE.stem}.{classes.backbone.__name__}",
        "AutoModelForCausalLM": f"{SOURCE.stem}.{classes.causal_lm.__name__}",
    }
    for source in (SOURCE, PACING):
        write_text(folder / source.name, source.read_text(encoding="utf-8"))
    write_json(path, values)
