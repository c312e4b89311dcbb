"""Type of the stored result of ``weaver verify``: an export compared with its model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Verification(BaseModel):
    """An export against the model it was made from, on the same tokens.

    Args:
        target: what was exported.
        loaded_as: the class or program that ran it.
        dtype: dtype of both models' computation; of the file for GGUF.
        tokens: predicted tokens that were compared.
        kl: mean KL(native || export), nats per token; in llama.cpp and vLLM, which list the
            likeliest tokens, a lower bound (``weaver.evaluation.listed``).
        native_perplexity, export_perplexity: on these tokens; None in llama.cpp and vLLM.
        top1_agreement: share of positions where both put the same token first.
        topk_agreement: share of selected pairs of token and expert that the export selects too;
            None where routers cannot be watched.
        same_text: share of greedily generated tokens before the first difference.
        max_logprob_difference: largest difference of the native model's ten most likely tokens'
            log-probabilities, nats; None in transformers.
        mean_logprob_difference: their mean absolute difference.
        stored_dtype, stored_kl: where the export is stored in another dtype than it was compared
            in: that dtype, and KL on the first window with the export computing in it. Rounding is
            part of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    loaded_as: str
    dtype: str
    tokens: int
    kl: float
    top1_agreement: float
    same_text: float
    native_perplexity: float | None = None
    export_perplexity: float | None = None
    topk_agreement: float | None = None
    max_logprob_difference: float | None = None
    mean_logprob_difference: float | None = None
    stored_dtype: str | None = None
    stored_kl: float | None = None
