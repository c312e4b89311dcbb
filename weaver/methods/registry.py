"""The table of conversion methods: a method is one file in this package and one row here."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from weaver.errors import WeaverError
from weaver.methods import (
    cmoe,
    dive,
    expertweaver,
    flap,
    random_split,
    wanda_sp,
    weave,
    weight_kmeans,
)
from weaver.methods.base import MethodOptions, MethodSpec
from weaver.methods.routers import ROUTERS, RouterSpec

METHODS: dict[str, MethodSpec[Any]] = {
    spec.name: spec
    for spec in (
        MethodSpec(
            name="weave",
            summary="clusters that a linear router can separate, closed-form compensation",
            source="weaver",
            partition=weave.partition,
            shared_scores=weave.shared_scores,
            options=weave.WeaveOptions,
            num_experts=16,
            router="ridge",
            sequential=True,
            refit=True,
            constants=True,
        ),
        MethodSpec(
            name="expertweaver",
            summary="balanced k-means on gate profiles, layer-adaptive shared expert",
            source="arXiv:2602.15521",
            partition=expertweaver.partition,
            shared_scores=expertweaver.shared_scores,
            options=expertweaver.ExpertWeaverOptions,
            num_experts=64,
            router="mean-gate",
            sequential=False,
        ),
        MethodSpec(
            name="cmoe",
            summary="balanced clustering of activation markers, frequent neurons shared",
            source="arXiv:2502.04416",
            partition=cmoe.partition,
            shared_scores=cmoe.shared_scores,
            options=cmoe.CmoeOptions,
            num_experts=8,
            router="representative",
            sequential=True,
        ),
        MethodSpec(
            name="dive",
            summary="the FFN pruned once per cluster of domains, overlapping experts",
            source="arXiv:2506.09351",
            partition=dive.partition,
            shared_scores=None,
            options=dive.DiveOptions,
            num_experts=4,
            router="error-ridge",
            sequential=False,
            constants=True,
        ),
        MethodSpec(
            name="flap",
            summary="static pruning by output fluctuation, with bias compensation",
            source="arXiv:2312.11983",
            partition=flap.partition,
            shared_scores=flap.shared_scores,
            options=flap.FlapOptions,
            num_experts=None,
            router=None,
            sequential=False,
        ),
        MethodSpec(
            name="wanda-sp",
            summary="static pruning by activation norm times weight size",
            source="arXiv:2306.11695, arXiv:2312.11983",
            partition=wanda_sp.partition,
            shared_scores=wanda_sp.shared_scores,
            options=wanda_sp.WandaSpOptions,
            num_experts=None,
            router=None,
            sequential=True,
        ),
        MethodSpec(
            name="random",
            summary="random equal experts, the baseline for clusterings",
            source="arXiv:2406.16554",
            partition=random_split.partition,
            shared_scores=None,
            options=random_split.RandomOptions,
            num_experts=8,
            router="mean-gate",
            sequential=False,
        ),
        MethodSpec(
            name="weight-kmeans",
            summary="balanced k-means on up-projection rows",
            source="arXiv:2406.16554",
            partition=weight_kmeans.partition,
            shared_scores=None,
            options=weight_kmeans.WeightKmeansOptions,
            num_experts=8,
            router="mean-gate",
            sequential=False,
        ),
    )
}


def get_method(name: str) -> MethodSpec[Any]:
    """The row of the method table with this name.

    Raises:
        WeaverError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise WeaverError(
            f"unknown method {name!r}",
            why=f"the methods are {', '.join(METHODS)}",
            fix="--method weave",
        )
    return METHODS[name]


def get_router(name: str) -> RouterSpec:
    """The row of the router table with this name.

    Raises:
        WeaverError: there is none; the message lists those there are.
    """
    if name not in ROUTERS:
        raise WeaverError(
            f"unknown router {name!r}",
            why=f"the routers are {', '.join(ROUTERS)}",
            fix="--router ridge",
        )
    return ROUTERS[name]


def resolve_options(spec: MethodSpec[Any], raw: dict[str, Any]) -> MethodOptions:
    """The options of a method, validated, with its defaults for what is not given.

    Raises:
        WeaverError: naming every key that is unknown or whose value does not fit.
    """
    options: type[MethodOptions] = spec.options
    try:
        return options.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'options'}: {item['msg']}"
            for item in error.errors()
        )
        known = ", ".join(options.model_fields) or "none"
        raise WeaverError(
            f"options of method {spec.name}: {problems}",
            why=f"the options of {spec.name} are: {known}",
            fix="change or remove the named keys under partition.options",
        ) from error
