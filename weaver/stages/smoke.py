"""The smoke test at the end of ``assemble``: both models, one after the other, if they fit."""

from __future__ import annotations

from pathlib import Path

import torch

from weaver.artifacts.results import SmokeResult
from weaver.artifacts.summaries import SkippedTest
from weaver.conversion.memory import available_memory
from weaver.evaluation.smoke import answer, smoke_result, smoke_windows
from weaver.models.accounting import ModelAccount
from weaver.models.checkpoint import Checkpoint
from weaver.models.loading import load_model
from weaver.report.tables import format_bytes
from weaver.rundir.stage_run import StageContext

# Log-probabilities that exist at once: the dense model's, and temporaries of one window.
_LOG_P_COPIES = 2
# Activations, caches, and what loading takes besides the weights.
_MARGIN = 1.2


def smoke_test(
    context: StageContext,
    folder: Path,
    dense: Checkpoint,
    dtype: torch.dtype,
    account: ModelAccount,
) -> SmokeResult | SkippedTest:
    """Compare the model that was just written with the dense one on little text.

    Both are loaded in the dtype that was written. The dense one is gone before the converted one is
    loaded, so that the larger of them has to fit.

    Args:
        context: progress, device.
        folder: the converted model.
        dense: the dense model.
        dtype: what the converted model is stored in.
        account: sizes of both.

    Returns:
        What was found, or why nothing was tried.
    """
    tokenizer = dense.tokenizer()
    windows_WT = smoke_windows(tokenizer)
    needs = memory_needed(account, dtype, windows_WT.numel() * int(dense.config.vocab_size))
    if needs > available_memory():
        lack = f"it needs {format_bytes(needs)}, more memory than was available"
        return SkippedTest(skipped=lack)
    with context.progress("smoke test", 2) as advance:
        model = load_model(
            dense.folder,
            dtype,
            device=context.device,
            trust_remote_code=dense.model.trust_remote_code,
        )
        answers = answer(model, windows_WT)
        del model
        advance("dense")
        model = load_model(folder, dtype, device=context.device)
        result = smoke_result(answers, model, windows_WT, tokenizer)
        advance("converted")
    return result


def memory_needed(account: ModelAccount, dtype: torch.dtype, log_probabilities: int) -> int:
    """Bytes of the larger model, and of the log-probabilities that are kept of the dense one.

    Args:
        account: sizes of both models.
        dtype: of their weights.
        log_probabilities: W * T * V, kept in float32.
    """
    parameters = max(account.total_dense_parameters, account.total_parameters)
    weights = parameters * dtype.itemsize
    return int(_MARGIN * (weights + _LOG_P_COPIES * log_probabilities * torch.float32.itemsize))
