"""The entry point of the group ``vllm.general_plugins``: every process of vLLM calls it."""

from __future__ import annotations

from weaver.models.hf import CONVERTED, register

_MODELS = "weaver.serving.models"


def register_models() -> None:
    """Make weaver's model types known to transformers and to vLLM (may be called again).

    vLLM is given names only and imports a class when a model asks for it. Types without a dense
    model of vLLM's are registered too: what they get is the reason, not a list of other models.
    """
    from vllm import ModelRegistry

    register()
    for classes in CONVERTED.values():
        name = classes.causal_lm.__name__
        ModelRegistry.register_model(name, f"{_MODELS}:{name}")
