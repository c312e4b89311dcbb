"""The model card of a converted model, from what its folder and its recipe say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from weaver.artifacts.manifest import CARD, versions
from weaver.artifacts.results import EvalResult
from weaver.artifacts.store import write_text
from weaver.methods.registry import get_method
from weaver.models.accounting import DenseFfnSize, LayerShape, ModelAccount
from weaver.report.comparison import score_cells, score_label, task_scores
from weaver.report.model_card import LayerFacts, ModelCardFacts, model_card
from weaver.report.tables import format_number, format_percent


def write_card(
    folder: Path,
    account: ModelAccount,
    recipe: dict[str, Any],
    base: Path,
    *,
    results: EvalResult | None = None,
    loading: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the model card beside a converted model; one that says the same stays as it is.

    Args:
        folder: the model folder.
        account: sizes of the model, with the shape of every layer.
        recipe: the resolved configuration of every stage that made the model; the number of
            training steps stands in its section ``finetune``, phase by phase, if there is one.
        base: folder of the dense model, whose licence holds for the converted one too.
        results: what ``weaver eval`` measured of this model.
        loading: how to load it, where it is not of weaver's own type.
        notes: limitations of this copy.
    """
    spec = get_method(recipe["partition"]["method"])
    path = recipe["model"]["path"]
    on_hub = not Path(path).exists()
    facts = ModelCardFacts(
        name=f"{Path(path).name}-{spec.name}-{round(100 * account.ffn_sparsity)}",
        base_model=path if on_hub else Path(path).name,
        base_model_id=path if on_hub else None,
        license=base_license(base),
        method=spec.name,
        method_source=spec.source,
        router=recipe["router"]["kind"],
        layers=[
            _layer_facts(shape, dense)
            for shape, dense in zip(account.layers, account.dense, strict=True)
        ],
        total_parameters=account.total_parameters,
        active_parameters=account.active_parameters,
        dense_parameters=account.total_dense_parameters,
        recipe=recipe,
        weaver_version=versions().get("weaver-moe", "unknown"),
        finetune_steps=sum(p["steps"] for p in recipe.get("finetune", {}).get("phases", [])),
        results=_measured(results) if results else {},
        loading=loading,
        notes=notes,
        two_level=bool(account.sites),
    )
    path, text = folder / CARD, model_card(facts)
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)


def base_license(folder: Path) -> str | None:
    """Identifier of a model's licence, as its card's front matter or its configuration says.

    Args:
        folder: of the model.
    """
    readers: dict[str, Callable[[str], Any]] = {CARD: _front_matter, "config.json": json.loads}
    for name, read in readers.items():
        try:
            said = read((folder / name).read_text(encoding="utf-8")).get("license")
        # Whatever a stranger wrote there: a licence that cannot be read is not recorded.
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
            continue
        if isinstance(said, str):
            return said
    return None


def _front_matter(card: str) -> Any:
    """YAML between the first two lines of dashes."""
    parts = card.split("---\n", 2)
    return yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}


def _measured(result: EvalResult) -> dict[str, str]:
    """Rows of the card: what the model lost, on which text, at which cost."""
    dense, moe = result.dense, result.moe
    flops = result.measured_ffn_flops_per_token / dense.ffn_flops_per_token
    # Folders of whoever measured are nobody's business.
    text = ", ".join(Path(name).name for name in result.config["data"])
    rows = {
        "text": f"{text}, {result.tokens} predicted tokens in windows of {result.sequence_length}",
        "perplexity": f"{format_number(moe.perplexity)} (dense {format_number(dense.perplexity)})",
        "KL(dense, converted), nats per token": format_number(result.kl),
        "top-1 agreement": format_percent(result.top1_agreement),
        "FFN FLOPs, measured, of the dense model's": format_percent(flops),
    }
    for score in task_scores(dense.tasks, moe.tasks):
        before, after, _ = score_cells(score)
        rows[score_label(score)] = f"{after} (dense {before})"
    return rows


def _layer_facts(shape: LayerShape, dense: DenseFfnSize) -> LayerFacts:
    return LayerFacts(
        intermediate_size=dense.shape.num_shared_neurons,
        num_shared_neurons=shape.num_shared_neurons,
        num_routed_experts=shape.n_routed_experts,
        expert_width=shape.moe_intermediate_size,
        top_k=shape.num_experts_per_tok,
        selection=shape.selection,
        token_share=dense.token_share,
    )
