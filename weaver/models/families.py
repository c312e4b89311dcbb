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
        shared: of a MoE layer, the name of the model's own shared expert, if it has one. The routed
            experts are called ``experts`` in every family.
        normed_output: the layer normalises the FFN's output before it adds it.
        renames: parts of tensor names on disk, and what the modules in memory call them.
    """

    model_type: str
    causal_lm: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    activation_field: str = "hidden_act"
    layers: str = "model.layers"
    ffn: str = "mlp"
    down: str = "down_proj"
    shared: str = "shared"
    normed_output: bool = False
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def fused(self) -> bool:
        """Gate and up are the two halves of one projection."""
        return self.gate == self.up

    @property
    def converted_model_type(self) -> str:
        """``model_type`` of the converted model."""
        return f"{CONVERTED_PREFIX}{self.model_type}"


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM"),
        Family("gemma", "GemmaForCausalLM"),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            activation_field="hidden_activation",
            normed_output=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            activation_field="hidden_activation",
            normed_output=True,
        ),
        Family("olmo2", "Olmo2ForCausalLM", normed_output=True),
        Family("phi3", "Phi3ForCausalLM", gate="gate_up_proj", up="gate_up_proj"),
    )
}

# Decoders whose layers are Mixtures of Experts, all of them or some: each expert is a GLU FFN.
MOE_FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("qwen2_moe", "Qwen2MoeForCausalLM", shared="shared_expert"),
        Family("qwen3_moe", "Qwen3MoeForCausalLM"),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            renames=(
                (".block_sparse_moe.", ".mlp."),
                (".w1.", ".gate_proj."),
                (".w3.", ".up_proj."),
                (".w2.", ".down_proj."),
            ),
        ),
        Family("olmoe", "OlmoeForCausalLM"),
        Family("glm4_moe", "Glm4MoeForCausalLM", shared="shared_experts"),
    )
}
ALL_FAMILIES: dict[str, Family] = FAMILIES | MOE_FAMILIES
CONVERTED_PREFIX = "weaver_"

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
    """The row of a model type; that of a converted model is the row it was converted from.

    Raises:
        WeaverError: the type has no row: it is multimodal, not a GLU, or new; or its experts are
            split already.
    """
    stock_type = model_type.removeprefix(CONVERTED_PREFIX)
    if stock_type in MOE_FAMILIES and stock_type != model_type:
        raise twice_split(f"{model}: model_type {model_type!r}")
    if stock_type in ALL_FAMILIES:
        return ALL_FAMILIES[stock_type]
    raise WeaverError(
        f"{model}: model_type {model_type!r} is not in the family table",
        why=f"weaver looked for one of {', '.join(ALL_FAMILIES)}: decoders whose FFN, or every "
        "expert of it, is down(act(gate(x)) * up(x))",
        fix="for another GLU decoder add a row to weaver/models/families.py "
        "(CONTRIBUTING.md, 'Add a model family')",
    )


def twice_split(what: str) -> WeaverError:
    """The error for a model with experts inside experts."""
    return WeaverError(
        f"{what} has experts that are split already",
        why="weaver makes two levels of experts, not three",
        fix="pass the model that this one was made from (see its README.md)",
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
