"""The explicit table of model families: where a Hugging Face decoder keeps its GLU feed-forward.

To add a family: one row here, one tiny config in ``tests/support/tiny_models.py``; the identity
test then covers it (all experts active equals the dense model).
"""

from __future__ import annotations

from dataclasses import dataclass

from weaver.errors import WeaverError


@dataclass(frozen=True)
class Family:
    """Names of one family's modules and configuration fields.

    Args:
        model_type: ``config.model_type``.
        causal_lm: class name in ``transformers``.
        gate: name of the gate projection inside the FFN; with ``fused``, of the fused projection.
        up: name of the up projection; the same as ``gate`` when fused.
        activation_field: config field that holds the activation's name.
        layers: path of the decoder layers.
        ffn: name of the FFN inside a decoder layer.
        down: name of the down projection.
    """

    model_type: str
    causal_lm: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    activation_field: str = "hidden_act"
    layers: str = "model.layers"
    ffn: str = "mlp"
    down: str = "down_proj"

    @property
    def fused(self) -> bool:
        """Gate and up are the two halves of one projection."""
        return self.gate == self.up

    @property
    def converted_model_type(self) -> str:
        """``model_type`` of the converted model."""
        return f"weaver_{self.model_type}"


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM"),
        Family("gemma", "GemmaForCausalLM"),
        Family("gemma2", "Gemma2ForCausalLM", activation_field="hidden_activation"),
        Family("gemma3_text", "Gemma3ForCausalLM", activation_field="hidden_activation"),
        Family("olmo2", "Olmo2ForCausalLM"),
        Family("phi3", "Phi3ForCausalLM", gate="gate_up_proj", up="gate_up_proj"),
    )
}

# Names of transformers' activations, and what weaver.algorithms.glu calls the same function.
ACTIVATION_NAMES: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def find_family(model_type: str, *, model: str) -> Family:
    """The row of a model type.

    Raises:
        WeaverError: the type has no row: it is converted already, multimodal, not a GLU, or new.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.startswith("weaver_"):
        raise WeaverError(
            f"{model}: model_type {model_type!r} is converted already",
            why="weaver starts from a dense model",
            fix="pass the dense model that this one was made from (see its README.md)",
        )
    raise WeaverError(
        f"{model}: model_type {model_type!r} is not in the family table",
        why=f"weaver looked for one of {', '.join(FAMILIES)}: decoders whose FFN is "
        "down(act(gate(x)) * up(x))",
        fix="for another GLU decoder add a row to weaver/models/families.py "
        "(CONTRIBUTING.md, 'Add a model family')",
    )


def activation_name(hf_name: str, *, model: str) -> str:
    """weaver's name of a transformers activation.

    Raises:
        WeaverError: the activation is not known.
    """
    try:
        return ACTIVATION_NAMES[hf_name]
    except KeyError as error:
        raise WeaverError(
            f"{model}: activation {hf_name!r} is not known",
            why=f"known are {', '.join(ACTIVATION_NAMES)}",
            fix="add it to ACTIVATION_NAMES in weaver/models/families.py and to "
            "ACTIVATIONS in weaver/algorithms/glu.py",
        ) from error
