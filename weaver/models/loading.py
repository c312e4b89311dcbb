"""Loading whole models, dense and converted, for evaluation, benchmarks and fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM

from weaver.artifacts.store import check_tensors_file
from weaver.errors import WeaverError
from weaver.models.device import CPU
from weaver.models.hf import register
from weaver.models.intake import library_errors, read_config
from weaver.models.locate import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class CausalLM(PreTrainedModel):
        """A loaded model with ``generate``, which transformers' annotations leave out."""

        def generate(self, *arguments: Any, **options: Any) -> Any: ...


_RERUN = "rerun the stage that wrote it with --force"


def load_model(
    folder: Path,
    dtype: torch.dtype | Literal["auto"],
    *,
    device: torch.device = CPU,
    trust_remote_code: bool = False,
    fix: str = _RERUN,
) -> CausalLM:
    """Load a causal language model for inference.

    Args:
        folder: a Hugging Face model folder.
        dtype: of the weights; ``auto`` as they are stored.
        device: where the weights go.
        trust_remote_code: whether code in the folder may run.
        fix: advice if the folder is damaged; by default that of a folder that weaver wrote.

    Raises:
        WeaverError: transformers cannot load it, or keys are missing or left over.
    """
    register()
    what = f"{folder}: cannot be loaded"
    try:
        for path in weight_files(folder):
            check_tensors_file(path)
        config = read_config(folder, trust_remote_code=trust_remote_code)
    except WeaverError as error:
        raise WeaverError(what, why=f"{error.what}: {error.why}", fix=fix) from error
    with library_errors(what, fix), device:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    model: CausalLM = loaded[0]
    info: dict[str, Any] = loaded[1]
    problems = {
        kind: sorted(info[kind])
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    }
    if problems:
        raise WeaverError(
            f"{folder}: weights do not fit the configuration: {problems}",
            why="every key of the checkpoint must belong to the model, and the other way round",
            fix=fix,
        )
    model.train(False)
    return model
