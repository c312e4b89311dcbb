"""``assemble``: write the converted model as a Hugging Face model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weaver.artifacts.manifest import StageManifest, StageRequest, versions
from weaver.artifacts.store import write_text
from weaver.artifacts.types import ExpertLayout
from weaver.config import AssembleConfig
from weaver.errors import WeaverError
from weaver.methods.registry import get_method
from weaver.models.accounting import LayerShape, ModelAccount
from weaver.models.checkpoint import Checkpoint
from weaver.models.hf import converted_config
from weaver.models.moe import converted_shape, converted_tensors
from weaver.models.writing import converted_parts, parse_size, write_shards
from weaver.report.model_card import LayerFacts, ModelCardFacts, model_card
from weaver.stages.converted import account_of
from weaver.stages.parents import Partition, open_partition, read_router
from weaver.stages.runner import StageContext, StageRun, parent

STAGE = "assemble"


def assemble(context: StageContext, config: AssembleConfig) -> StageManifest:
    """Write config, weights in shards, tokenizer, generation config and model card.

    Args:
        context: run directory, progress.
        config: dtype and shard size.

    Raises:
        WeaverError: partition or build-router has not finished, or they do not belong together.
    """
    partition = open_partition(context.folder("partition"))
    router_manifest, router_ref = parent(context.folder("build-router"), "build-router")
    _check_same_partition(router_manifest, partition)
    checkpoint = partition.calibration.checkpoint
    dtype = checkpoint.resolve_dtype(config.dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config={**config.model_dump(mode="json"), "dtype": dtype_name},
        inputs={"partition": partition.ref, "build-router": router_ref},
    )
    limit = parse_size(config.max_shard_size)
    run = StageRun(context, request, partition.calibration.identity, dtype_name)
    if run.status == "skip":
        return run.skipped()
    run.begin()
    routers = context.folder("build-router")
    layouts = [partition.layout(layer) for layer in range(checkpoint.num_layers)]

    def ffn_tensors(layer: int) -> dict[str, Tensor]:
        router = read_router(routers, layer, layouts[layer])
        return converted_tensors(checkpoint.ffn(layer, dtype), layouts[layer], router)

    shapes = [_shape(checkpoint, routers, layer, layout) for layer, layout in enumerate(layouts)]
    parts = converted_parts(checkpoint, shapes, ffn_tensors, dtype)
    with context.progress(STAGE, len(parts)) as advance:
        write_shards(run.folder, parts, limit, advance)
    recipe = _recipe(partition, router_manifest, request)
    account = account_of(checkpoint, shapes)
    _write_companions(run.folder, checkpoint, shapes, dtype_name, recipe)
    write_text(run.folder / "README.md", _card(layouts, account, recipe))
    return run.finish(_summary(account))


def _shape(checkpoint: Checkpoint, routers: Path, layer: int, layout: ExpertLayout) -> LayerShape:
    weights = checkpoint.ffn(layer, checkpoint.dtype)
    return converted_shape(weights, layout, read_router(routers, layer, layout))


def _check_same_partition(router: StageManifest, partition: Partition) -> None:
    if router.request.inputs["partition"].digest != partition.manifest.digest:
        raise WeaverError(
            f"{partition.folder.parent}/router: built for another partition",
            why="partition ran again after build-router",
            fix=f"weaver build-router --run-dir {partition.folder.parent} --force",
        )


def _recipe(partition: Partition, router: StageManifest, request: StageRequest) -> dict[str, Any]:
    calibration = partition.calibration
    model = calibration.identity
    return {
        "model": {
            "path": model.path,
            "revision": model.revision,
            "dtype": calibration.manifest.dtype,
        },
        "seed": partition.manifest.request.seed,
        "calibrate": calibration.config.model_dump(mode="json"),
        "partition": partition.manifest.request.config,
        "router": router.request.config,
        "assemble": request.config,
    }


def _write_companions(
    folder: Path,
    checkpoint: Checkpoint,
    shapes: list[LayerShape],
    dtype: str,
    recipe: dict[str, Any],
) -> None:
    config = converted_config(checkpoint.config, shapes, recipe)
    config.dtype = getattr(torch, dtype)
    config.save_pretrained(folder)
    checkpoint.tokenizer().save_pretrained(folder)
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _card(
    layouts: list[ExpertLayout],
    account: ModelAccount,
    recipe: dict[str, Any],
) -> str:
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
        layers=[_facts(layout) for layout in layouts],
        total_parameters=account.total_parameters,
        active_parameters=account.active_parameters,
        dense_parameters=account.total_dense_parameters,
        recipe=recipe,
        weaver_version=versions().get("weaver-moe", "unknown"),
    )
    return model_card(facts)


def _facts(layout: ExpertLayout) -> LayerFacts:
    return LayerFacts(
        intermediate_size=layout.intermediate_size,
        num_shared_neurons=layout.num_shared_neurons,
        num_routed_experts=layout.num_routed_experts,
        expert_width=layout.expert_width,
        top_k=layout.top_k,
    )


def _summary(account: ModelAccount) -> dict[str, Any]:
    return {
        "dense_parameters": account.total_dense_parameters,
        "total_parameters": account.total_parameters,
        "active_parameters": account.active_parameters,
        "dense_ffn_flops": account.dense_ffn_flops,
        "ffn_flops": account.ffn_flops,
        "ffn_sparsity": round(account.ffn_sparsity, 6),
        "speed_bound": round(account.speed_bound, 6),
    }
