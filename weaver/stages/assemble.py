"""``assemble``: write the converted model as a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from weaver.artifacts.dtypes import DTYPES, dtype_name
from weaver.artifacts.manifest import StageManifest, StageRequest
from weaver.artifacts.results import SmokeResult
from weaver.artifacts.summaries import AssembleSummary, SkippedTest
from weaver.artifacts.types import ExpertLayout
from weaver.config.sections import AssembleConfig
from weaver.errors import WeaverError
from weaver.models.accounting import LayerShape, ModelAccount
from weaver.models.checkpoint import Checkpoint
from weaver.models.hf import converted_config
from weaver.models.moe import converted_tensors
from weaver.models.writing import (
    converted_parts,
    copy_companions,
    parse_size,
    plan_shards,
    save_config,
    write_shards,
)
from weaver.rundir.converted_model import account_of
from weaver.rundir.inputs import Partition, open_partition, read_compensation, read_router
from weaver.rundir.stage_folders import finished_stage, stage_command
from weaver.rundir.stage_run import StageContext, StageRun
from weaver.stages.model_card import write_card
from weaver.stages.smoke import smoke_test

STAGE = "assemble"


def assemble(context: StageContext, config: AssembleConfig) -> StageManifest:
    """Write config, weights in shards, tokenizer, generation config and model card; then try it.

    Args:
        context: run directory, progress.
        config: dtype, shard size, smoke test.

    Raises:
        WeaverError: partition or build-router has not finished, or they do not belong together.
    """
    partition = open_partition(
        context.folder("partition"), trust_remote_code=context.trust_remote_code
    )
    router_manifest, router_ref = finished_stage(context.folder("build-router"), "build-router")
    _check_same_partition(router_manifest, partition)
    checkpoint = partition.calibration.checkpoint
    dtype = checkpoint.resolve_dtype(config.dtype)
    dtype_text = dtype_name(dtype)
    # The smoke test leaves what is written alone: it is no part of the fingerprint, and whether a
    # finished run has one does not matter when its configuration is compared.
    written = config.model_dump(mode="json", exclude={"smoke_test"})
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config={**written, "dtype": dtype_text},
        inputs={"partition": partition.ref, "build-router": router_ref},
    )
    limit = parse_size(config.max_shard_size)
    run = StageRun(context, request, partition.calibration.identity, dtype_text)
    if run.status == "skip":
        return run.skipped()
    routers = context.folder("build-router")
    layouts = [partition.layout(site) for site in range(checkpoint.num_sites)]

    def ffn_tensors(site: int) -> dict[str, Tensor]:
        return converted_tensors(
            checkpoint.ffn(site, dtype),
            layouts[site],
            read_router(routers, site, layouts[site]),
            read_compensation(routers, site),
        )

    shapes = [_shape(checkpoint, routers, site, layout) for site, layout in enumerate(layouts)]
    parts = converted_parts(checkpoint, shapes, ffn_tensors, dtype)
    run.begin(disk=sum(part.size for part in parts))
    with context.progress(STAGE, len(plan_shards(parts, limit))) as advance:
        write_shards(run.folder, parts, limit, advance)
    recipe = _recipe(partition, router_manifest, request)
    account = account_of(checkpoint, shapes)
    _write_companions(run.folder, checkpoint, shapes, dtype_text, recipe)
    write_card(run.folder, account, recipe, checkpoint.folder)
    tested = (
        smoke_test(context, run.folder, checkpoint, dtype, account) if config.smoke_test else None
    )
    return run.finish(_summary(account, partition, tested))


def _shape(checkpoint: Checkpoint, routers: Path, site: int, layout: ExpertLayout) -> LayerShape:
    dense = checkpoint.dense_shape(site)
    return LayerShape.of(
        layout,
        read_router(routers, site, layout),
        read_compensation(routers, site),
        gate_bias=dense.gate_bias,
        up_bias=dense.up_bias,
        output_bias=dense.output_bias,
    )


def _check_same_partition(router: StageManifest, partition: Partition) -> None:
    if router.request.inputs["partition"].digest != partition.manifest.digest:
        raise WeaverError(
            f"{partition.folder.parent}/router: built for another partition",
            why="partition ran again after build-router",
            fix=f"{stage_command('build-router', partition.folder.parent)} --force",
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
    config = converted_config(checkpoint.config, checkpoint.layer_shapes(shapes), recipe)
    config.dtype = DTYPES[dtype]
    save_config(config, folder)
    copy_companions(checkpoint.folder, folder)


def _summary(
    account: ModelAccount, partition: Partition, tested: SmokeResult | SkippedTest | None
) -> AssembleSummary:
    return AssembleSummary(
        predicted_kl=partition.summary.predicted_kl,
        dense_parameters=account.total_dense_parameters,
        dense_active_parameters=account.dense_active_parameters,
        total_parameters=account.total_parameters,
        active_parameters=account.active_parameters,
        dense_ffn_flops=account.dense_ffn_flops,
        ffn_flops=account.ffn_flops,
        ffn_sparsity=round(account.ffn_sparsity, 6),
        speed_bound=round(account.speed_bound, 6),
        smoke_test=tested,
    )
