"""vLLM's dense models with converted FFNs, one class per family: ``WeaverLlamaForCausalLM``, ...

Each is vLLM's own class of the family whose FFNs are replaced after it is built, as
``weaver.models.hf`` does with transformers' classes. Attention, caches, batching, prefix caching,
sampling and the server are vLLM's.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from weaver.errors import WeaverError
from weaver.models.families import ALL_FAMILIES, Family, activation_name
from weaver.models.sites import TwoLevelShape, read_shape
from weaver.serving.ffn import ServedFfn
from weaver.serving.pacing import BatchPacer, current_batch

# Modules of vllm.model_executor.models that hold the dense model of a family.
MODULES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
# vLLM refuses float16 for these by the type of the dense model.
NO_FLOAT16 = ("gemma3_text",)


def check(config: VllmConfig, family: Family) -> None:
    """Refuse what was asked of vLLM and these models do not have.

    Raises:
        WeaverError: another way of splitting a model than tensor parallelism; LoRA; quantisation;
            experts inside experts; float16 where the dense model refuses it.
    """
    parallel, model = config.parallel_config, config.model_config
    lacking = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "expert parallelism": parallel.enable_expert_parallel,
        "data parallelism": parallel.data_parallel_size > 1,
        "LoRA adapters": config.lora_config is not None,
        "quantisation": config.quant_config is not None,
        "speculative decoding": config.speculative_config is not None,
    }
    for what, asked in lacking.items():
        if asked:
            raise WeaverError(
                f"{model.model}: weaver's models in vLLM have no {what}",
                why="their FFNs are weaver's own; only tensor parallelism cuts them",
                fix="leave it out, or serve a stock export: weaver export RUN --to glm4-moe",
            )
    if family.model_type in NO_FLOAT16 and model.dtype == torch.float16:
        raise WeaverError(
            f"{model.model}: {family.model_type} in float16",
            why="its activations exceed float16; vLLM refuses the dense model as well",
            fix="--dtype bfloat16",
        )


def replace_ffns(model: nn.Module, family: Family, config: VllmConfig) -> BatchPacer | None:
    """Put a ``ServedFfn`` in place of every FFN of vLLM's dense model.

    One layer after the other, so that no more than one dense FFN lies in memory beside them.

    Args:
        model: vLLM's causal LM.
        family: names of its parts.
        config: of vLLM; its ``hf_config.weaver`` holds the layers' shapes.

    Returns:
        What paces the layers that select by threshold; None without any.
    """
    hf: Any = config.model_config.hf_config
    activation = activation_name(getattr(hf, family.activation_field), model=hf.model_type)
    ffns: list[Any] = []
    layers: Any = model.get_submodule(family.layers)
    for index, (layer, entry) in enumerate(zip(layers, hf.weaver["layers"], strict=True)):
        shape = read_shape(entry)
        assert not isinstance(shape, TwoLevelShape), "a family of dense models has one level"
        name = f"{family.layers}.{index}.{family.ffn}"
        setattr(layer, family.ffn, ServedFfn(shape, hf.hidden_size, activation, name, config))
        ffns.append(getattr(layer, family.ffn))
    paced = [(ffn, ffn.paced) for ffn in ffns if ffn.paced is not None]
    if not paced:
        return None
    pacer = BatchPacer(
        [layer for _, layer in paced],
        hf.weaver.get("first_tokens", 0),
        hf.weaver.get("early_tokens", 0),
        config.scheduler_config.max_num_batched_tokens,
    )
    for index, (ffn, _) in enumerate(paced):
        ffn.pace = (pacer, index)
    return pacer


def _served(family: Family, name: str) -> type[nn.Module]:
    module = import_module(f"vllm.model_executor.models.{MODULES[family.model_type]}")
    dense: Any = getattr(module, family.causal_lm)

    class Served(dense):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            check(vllm_config, family)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.pacer = replace_ffns(self, family, vllm_config)
            self.block_size: int = vllm_config.cache_config.block_size

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
        ) -> Any:
            # Outside of what vLLM compiles, so that the batch's sequences are known to all layers.
            if self.pacer is not None:
                batch = current_batch(get_forward_context(), self.block_size)
                self.pacer.begin(positions, batch)
            output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
            if self.pacer is not None:
                self.pacer.end()
            return output

    Served.__name__ = Served.__qualname__ = name
    Served.__module__ = __name__
    return Served


def _refused(family: Family, name: str) -> type[nn.Module]:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    class Refused(LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            del prefix
            raise WeaverError(
                f"{vllm_config.model_config.model}: converted {family.model_type} does not run "
                "in vLLM",
                why="weaver replaces the FFNs of vLLM's own dense models, which are "
                f"{', '.join(MODULES)}",
                fix="run it in transformers: weaver generate RUN PROMPT, or weaver.load",
            )

    Refused.__name__ = Refused.__qualname__ = name
    return Refused


_NAMES = {f"Weaver{family.causal_lm}": family for family in ALL_FAMILIES.values()}


def __getattr__(name: str) -> type[nn.Module]:
    """The class of a family, made when vLLM asks for it by name."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family = _NAMES[name]
    cls = (_served if family.model_type in MODULES else _refused)(family, name)
    globals()[name] = cls
    return cls
