"""Type of the stored result of ``weaver verify``: an export compared with its model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Verification(BaseModel):
    """An export against the model it was made from, on the same tokens.

    Args:
        target: what was exported.
        loaded_as: the class or program that ran it.
        dtype: dtype of both models' computation; of the file for GGUF.
        tokens: predicted tokens that were compared; for GGUF positions.
        kl: mean KL(native || export), nats per token; None for GGUF.
        native_perplexity, export_perplexity: on these tokens; None for GGUF.
        top1_agreement: share of positions where both put the same token first.
        topk_agreement: share of selected pairs of token and expert that the export selects too;
            None where routers cannot be watched.
        same_text: share of greedily generated tokens before the first difference.
        max_logprob_difference: largest difference of the native model's ten most likely tokens'
            log-probabilities, nats; None except for GGUF.
        mean_logprob_difference: their mean absolute difference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    loaded_as: str
    dtype: str
    tokens: int
    top1_agreement: float
    same_text: float
    kl: float | None = None
    native_perplexity: float | None = None
    export_perplexity: float | None = None
    topk_agreement: float | None = None
    max_logprob_difference: float | None = None
    mean_logprob_difference: float | None = None
