"""The README.md that lies beside a converted model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import yaml

from weaver.artifacts.types import Selection
from weaver.report.tables import format_count, format_percent, markdown_table
from weaver.report.terminal import plain_line


@dataclass(frozen=True)
class LayerFacts:
    """The layout of one layer.

    Args:
        intermediate_size: F of the dense FFN.
        num_shared_neurons: S, neurons every token uses.
        num_routed_experts: E; 0 for a static layer.
        expert_width: N, neurons per routed expert.
        top_k: K, routed experts per token; for a threshold the mean that the router is set to.
        selection: how a token's experts are chosen.
        token_share: share of the tokens that reach the FFN, below 1 for an expert of a model that
            was a Mixture of Experts before.
    """

    intermediate_size: int
    num_shared_neurons: int
    num_routed_experts: int
    expert_width: int
    top_k: int
    selection: Selection = "top-k"
    token_share: float = 1.0

    @property
    def shared_share(self) -> float:
        """S / F."""
        return self.num_shared_neurons / self.intermediate_size

    @property
    def active_share(self) -> float:
        """(S + K * N) / F."""
        active = self.num_shared_neurons + self.top_k * self.expert_width
        return active / self.intermediate_size


@dataclass(frozen=True)
class ModelCardFacts:
    """Facts of a model card: origin, method, layouts, parameters and measured values.

    Args:
        name: title, such as the model's folder name.
        base_model: the dense model as its user named it.
        method: partition method.
        method_source: arXiv id or where the method comes from.
        router: kind of router; None for a static method.
        layers: layout of every layer, in order; of every FFN, where ``two_level``.
        total_parameters: parameters of the converted model.
        active_parameters: parameters that one token uses.
        dense_parameters: parameters of the dense model.
        recipe: the resolved configuration that made the model.
        weaver_version: version of the program that made it.
        base_model_id: name on the Hugging Face hub, for the front matter; None for a local model.
        license: identifier of the base model's licence, as the hub spells it; None if unknown.
        finetune_steps: training steps after the conversion.
        results: measured values by name, such as ``{"perplexity": "24.1 (dense 20.1)"}``.
        loading: how to load it; by default as a model of weaver's own type.
        notes: limitations of this copy of the model.
        two_level: whether the model was a Mixture of Experts before, and its experts were split.
    """

    name: str
    base_model: str
    method: str
    method_source: str
    router: str | None
    layers: Sequence[LayerFacts]
    total_parameters: int
    active_parameters: int
    dense_parameters: int
    recipe: dict[str, Any]
    weaver_version: str
    base_model_id: str | None = None
    license: str | None = None
    finetune_steps: int = 0
    results: dict[str, str] = field(default_factory=dict)
    loading: str | None = None
    notes: Sequence[str] = ()
    two_level: bool = False

    @property
    def ffn_sparsity(self) -> float:
        """1 - active FFN neurons / those that a token used before, over all layers."""
        neurons = [layer.token_share * layer.intermediate_size for layer in self.layers]
        active = [n * layer.active_share for n, layer in zip(neurons, self.layers, strict=True)]
        return 1 - sum(active) / sum(neurons)


def model_card(facts: ModelCardFacts) -> str:
    """README.md of a converted model: YAML front matter as the hub reads it, then the text.

    Names out of files and folders are text in it, whatever markup they hold.
    """
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(facts), sort_keys=False)}---\n",
        f"# {plain_line(facts.name)}\n",
        _summary(facts),
        "## Loading\n",
        facts.loading or _LOADING,
        "## Layout\n",
        _layout(facts),
        *(["## Results\n", _results(facts)] if facts.results else []),
        "## Recipe\n",
        "`weaver run` with this configuration makes the same model again.\n",
        _fenced(yaml.safe_dump(facts.recipe, sort_keys=False)),
        "## Limitations\n",
        _limitations(facts),
    ]
    return "\n".join(parts)


_LOADING = """\
The architecture is weaver's own (`pip install weaver-moe`):

```python
import weaver

model, tokenizer = weaver.load(".")  # the folder of this file
```

After `weaver.register()` transformers' `AutoModelForCausalLM.from_pretrained` loads it too.
"""


def _front_matter(facts: ModelCardFacts) -> dict[str, Any]:
    matter: dict[str, Any] = {}
    if facts.license is not None:
        matter["license"] = facts.license
    if facts.base_model_id is not None:
        matter["base_model"] = facts.base_model_id
    matter["library_name"] = "transformers"
    matter["pipeline_tag"] = "text-generation"
    matter["tags"] = ["weaver", "moe"]
    return matter


def _summary(facts: ModelCardFacts) -> str:
    training = (
        f"{facts.finetune_steps} steps of fine-tuning after the conversion"
        if facts.finetune_steps
        else "none"
    )
    rows = [
        ("base model", plain_line(facts.base_model)),
        ("method", f"{facts.method} ({facts.method_source})"),
        ("router", facts.router or "none: the same neurons are active for every token"),
        ("FFN sparsity", format_percent(facts.ffn_sparsity)),
        ("parameters, dense model", format_count(facts.dense_parameters)),
        ("parameters", format_count(facts.total_parameters)),
        ("parameters active per token", format_count(facts.active_parameters)),
        ("training", training),
        ("made with", f"weaver {facts.weaver_version}"),
    ]
    split = _EVERY_FFN if facts.two_level else "every feed-forward layer"
    return (
        f"A {'static pruning' if facts.router is None else 'Mixture-of-Experts conversion'} of "
        f"{plain_line(facts.base_model)}: {split} is "
        "split into neurons that all tokens use"
        f"{'' if facts.router is None else ' and experts that a router chooses per token'}.\n\n"
        + markdown_table(("", "value"), rows)
    )


# The routers that the model had before stay.
_EVERY_FFN = "every expert, and every other feed-forward layer,"


def _layout(facts: ModelCardFacts) -> str:
    rows: list[Sequence[object]] = []
    first = 0
    for layer, run in groupby(facts.layers):
        last = first + len(list(run)) - 1
        rows.append(
            (
                first if first == last else f"{first}-{last}",
                layer.intermediate_size,
                layer.num_shared_neurons,
                format_percent(layer.shared_share),
                f"{layer.num_routed_experts} x {layer.expert_width}",
                f"{layer.top_k} on average" if layer.selection == "threshold" else layer.top_k,
                format_percent(layer.active_share),
            )
        )
        first = last + 1
    # FFNs are counted through the model, those of a layer one after the other.
    headers = (
        "FFNs" if facts.two_level else "layers",
        "neurons",
        "shared",
        "shared share",
        "experts",
        "top-k",
        "active share",
    )
    return markdown_table(headers, rows)


def _results(facts: ModelCardFacts) -> str:
    rows = [tuple(map(plain_line, row)) for row in facts.results.items()]
    return markdown_table(("measure", "value"), rows)


def _fenced(text: str) -> str:
    """YAML as code, in a fence longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}{fence}\n"


def _limitations(facts: ModelCardFacts) -> str:
    training = (
        f"trained for {facts.finetune_steps} steps only"
        if facts.finetune_steps
        else "not trained after the conversion"
    )
    lines = [
        f"The model was {training}: its quality is below that of the dense model, and what it "
        "keeps depends on the text it was calibrated on.",
        "Sparsity counts neurons of the feed-forward layers; attention and embeddings are as "
        "large as before.",
        "Fewer active neurons are not always faster: measure with `weaver bench` on your machine.",
        "Bias and knowledge limits of the base model remain, and so does its licence.",
    ]
    lines += facts.notes
    if facts.license is None:
        lines.append("The licence of the base model was not recorded; look it up before use.")
    return "".join(f"- {line}\n" for line in lines)
