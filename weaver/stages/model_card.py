"""The model card of a converted model, from what its folder and its recipe say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weaver.artifacts.manifest import versions
from weaver.artifacts.store import write_text
from weaver.methods.registry import get_method
from weaver.models.accounting import DenseFfnSize, LayerShape, ModelAccount
from weaver.report.model_card import LayerFacts, ModelCardFacts, model_card


def write_card(
    folder: Path,
    account: ModelAccount,
    recipe: dict[str, Any],
    *,
    loading: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write ``README.md`` beside a converted model.

    Args:
        folder: the model folder.
        account: sizes of the model, with the shape of every layer.
        recipe: the resolved configuration of every stage that made the model; the number of
            training steps stands in its section ``finetune``, phase by phase, if there is one.
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
        loading=loading,
        notes=notes,
        two_level=bool(account.sites),
    )
    write_text(folder / "README.md", model_card(facts))


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
