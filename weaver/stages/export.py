"""``export``: write the converted model for runtimes that know nothing of weaver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weaver.artifacts.dtypes import DTYPES, dtype_name
from weaver.artifacts.manifest import StageManifest, StageRequest
from weaver.artifacts.store import write_json
from weaver.artifacts.summaries import ExportSummary
from weaver.config.sections import ExportConfig, VerifyConfig
from weaver.errors import WeaverError, require_extra
from weaver.export.attention import save_config as save_stock_config
from weaver.export.base import Source, StockModel
from weaver.export.features import approximated
from weaver.export.registry import GGUF, NAMES, OWN, check, choose, obstacles, stock_target
from weaver.export.remote_code import add_remote_code
from weaver.models.converted_folder import ConvertedCheckpoint, ConvertedLayer
from weaver.models.tensors import stored_dtype
from weaver.models.writing import (
    Part,
    copy_companions,
    parse_size,
    plan_shards,
    save_config,
    weights_bytes,
    write_shards,
)
from weaver.report.loading import gguf_loading, remote_code_loading, stock_loading
from weaver.rundir.converted_model import ConvertedModel, open_converted
from weaver.rundir.inputs import open_partition
from weaver.rundir.stage_run import StageContext, StageRun, settle
from weaver.stages.evaluate import measured_quality
from weaver.stages.model_card import write_card
from weaver.stages.verify import RECORD, verify

STAGE = "export"
# On what the cost of approximations is measured.
COST = VerifyConfig(tokens=1024)


@dataclass(frozen=True)
class ExportPlan:
    """Plan of an export: source model, target, approximations, folder and dtype.

    Args:
        converted: the run's model.
        checkpoint: the same, to be read layer by layer.
        target: name of the target.
        reason: why this one.
        approximations: what stands for what the target cannot hold.
        folder: the folder to make.
        config: the options.
        dtype: of the exported weights.
    """

    converted: ConvertedModel
    checkpoint: ConvertedCheckpoint
    target: str
    reason: str
    approximations: list[str]
    folder: Path
    config: ExportConfig
    dtype: torch.dtype

    @property
    def file(self) -> str:
        """Name of the file of a GGUF export."""
        return f"model-{self.quantisation}.gguf"

    @property
    def quantisation(self) -> str:
        """Of a GGUF export. llama.cpp rounds inputs as well for bf16, so f16 is the closer one."""
        return self.config.quantisation or "f16"


def plan_export(context: StageContext, config: ExportConfig, out: Path | None = None) -> ExportPlan:
    """Choose the target and see whether it holds the run's model, fine-tuned if it was.

    Args:
        context: the run directory.
        config: target, dtype, what may be approximated.
        out: the folder to make; ``export-TARGET`` in the run directory when left out.

    Raises:
        WeaverError: no finished conversion; no such target; the target cannot hold the model; or an
            option does nothing for the target.
    """
    converted = open_converted(context)
    checkpoint = ConvertedCheckpoint(converted.folder)
    dtype = checkpoint.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    target, reason = (config.target, "as asked") if config.target else choose(checkpoint, dtype)
    _check_options(target, config)
    if target == GGUF:
        require_extra("gguf", "gguf", "a GGUF export")
        # Its tensors are quantised from float32, whatever the model is stored in.
        dtype = torch.float32
    found = [] if target == OWN else obstacles(target, checkpoint, dtype)
    approximations = check(target, found, approximate=config.approximate)
    if target == GGUF and approximations:
        require_extra("xllamacpp", "gguf", "measuring what the approximations of a GGUF file cost")
    folder = out or context.run_dir / f"{STAGE}-{target}"
    return ExportPlan(converted, checkpoint, target, reason, approximations, folder, config, dtype)


def export(context: StageContext, plan: ExportPlan) -> StageManifest:
    """Write the model in the form of the target; measure what approximations cost.

    Args:
        context: run directory, progress.
        plan: what ``plan_export`` made for it.

    Raises:
        WeaverError: the folder holds something else; or the model does not fit the file format.
    """
    dtype = dtype_name(plan.dtype)
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config={**plan.config.model_dump(mode="json"), "target": plan.target, "dtype": dtype},
        inputs={plan.converted.stage: plan.converted.ref},
    )
    model = plan.converted.manifest.model
    if not context.dry_run:
        settle(plan.folder)
    run = StageRun(context, request, model, dtype, folder=plan.folder)
    if run.status == "skip":
        return run.skipped()
    # Whatever refuses the model does so before an earlier export is thrown away.
    stock = None if plan.target == OWN else _stock_model(context, plan)
    run.begin(disk=_least_disk(plan))
    if stock is None:
        loading, facts = _write_own(context, plan, run.folder)
    else:
        loading, facts = _write_stock(context, plan, run.folder, stock)
    summary = ExportSummary(
        target=plan.target, reason=plan.reason, approximations=tuple(plan.approximations)
    )
    record = summary.model_dump(mode="json", exclude={"cost"})
    write_json(run.folder / RECORD, record | facts)
    notes = [f"This export approximates {line}." for line in plan.approximations]
    write_card(
        run.folder,
        plan.converted.account(),
        plan.converted.recipe(),
        plan.converted.dense.folder,
        # An approximation is another model than the one that was measured.
        results=None if plan.approximations else measured_quality(context, plan.converted),
        loading=loading,
        notes=notes,
    )
    if plan.approximations:
        cost = verify(context, run.folder, COST, finished=False)
        summary = summary.model_copy(update={"cost": cost})
    return run.finish(summary)


def _least_disk(plan: ExportPlan) -> int:
    """Bytes that are written in any case: of a GGUF file 4 bits of every weight."""
    values = weights_bytes(plan.converted.folder) // plan.checkpoint.dtype.itemsize
    return values // 2 if plan.target == GGUF else values * plan.dtype.itemsize * 4 // 5


def _check_options(target: str, config: ExportConfig) -> None:
    """The target exists, and no option would do nothing."""
    if target not in NAMES:
        raise WeaverError(
            f"no target is called {target!r}",
            why=f"known are {', '.join(NAMES)}",
            fix="leave --to out: the best target that fits is then chosen",
        )
    if config.remote_code and target != OWN:
        raise WeaverError(
            f"--remote-code does nothing for {target}",
            why="a stock architecture needs no code beside it",
            fix=f"leave it out, or --to {OWN}",
        )
    if config.quantisation is not None and target != GGUF:
        raise WeaverError(
            f"--quantisation {config.quantisation} does nothing for {target}",
            why="it says how the tensors of a GGUF file are stored",
            fix=f"--to {GGUF}, or --dtype",
        )
    if target == GGUF and config.dtype != "auto":
        raise WeaverError(
            f"--dtype {config.dtype} does nothing for {GGUF}",
            why="the tensors of a GGUF file are stored as --quantisation says",
            fix="--quantisation f16",
        )


def _write_own(
    context: StageContext, plan: ExportPlan, folder: Path
) -> tuple[str | None, dict[str, Any]]:
    """weaver's own type: the same tensors, ready for the hub. How to load it, and no facts."""
    checkpoint = plan.checkpoint
    groups = [checkpoint.outer_names()]
    prefixes = [f"{checkpoint.family.layers}.{i}." for i in range(checkpoint.num_layers)]
    groups += [[n for n in checkpoint.names() if n.startswith(prefix)] for prefix in prefixes]
    parts = [_copied(checkpoint, names, plan.dtype) for names in groups]
    _write_weights(context, plan, folder, parts)
    checkpoint.config.dtype = plan.dtype
    _write_companions(plan, folder, partial(save_config, checkpoint.config))
    if not plan.config.remote_code:
        return None, {}
    add_remote_code(folder)
    return remote_code_loading(), {}


def _copied(checkpoint: ConvertedCheckpoint, names: list[str], dtype: torch.dtype) -> Part:
    dtypes = {name: stored_dtype(name, dtype) for name in names}
    sizes = {name: checkpoint.elements(name) * each.itemsize for name, each in dtypes.items()}
    return Part(sizes, lambda: {n: checkpoint.tensor(n).to(each) for n, each in dtypes.items()})


def _stock_model(context: StageContext, plan: ExportPlan) -> StockModel:
    partition = open_partition(
        context.folder("partition"), trust_remote_code=context.trust_remote_code
    )
    source = _source(plan, lambda layer: partition.profile(layer).ffn_inputs_ND)
    stock = stock_target(plan.target).build(source)
    if plan.target == GGUF:
        from weaver.export.gguf import check_gguf

        check_gguf(stock.config, plan.converted.folder)
    return stock


def _write_stock(
    context: StageContext, plan: ExportPlan, folder: Path, stock: StockModel
) -> tuple[str, dict[str, Any]]:
    """A stock architecture as safetensors or as GGUF. How to load it, and what was chosen."""
    facts = {
        "model_type": stock.config.model_type,
        "router_module": stock.router_module,
        "experts": [list(layer) for layer in stock.experts],
        **stock.facts,
    }
    if plan.target != GGUF:
        _write_weights(context, plan, folder, stock.parts)
        _write_companions(plan, folder, partial(save_stock_config, stock.config))
        return stock_loading(stock.config.model_type), facts
    from weaver.export.gguf import write_gguf

    with context.progress(STAGE, len(stock.parts)) as advance:
        write_gguf(
            folder / plan.file,
            stock.config,
            stock.parts,
            plan.converted.folder,
            quantisation=plan.quantisation,
            name=Path(plan.converted.manifest.model.path).name,
            on_part=advance,
        )
    return gguf_loading(plan.file), facts


def _source(plan: ExportPlan, inputs: Callable[[int], Tensor]) -> Source:
    # A target asks for a layer several times; one at a time is in memory.
    @lru_cache(maxsize=1)
    def layer(index: int) -> ConvertedLayer:
        converted = plan.checkpoint.layer(index)
        if not plan.approximations:
            return converted
        softmax = stock_target(plan.target).softmax
        return approximated(converted, inputs(index), softmax=softmax)

    return Source(plan.checkpoint, inputs, layer, plan.dtype)


def _write_weights(
    context: StageContext, plan: ExportPlan, folder: Path, parts: Sequence[Part]
) -> None:
    limit = parse_size(plan.config.max_shard_size)
    with context.progress(STAGE, len(plan_shards(parts, limit))) as advance:
        write_shards(folder, parts, limit, advance)


def _write_companions(plan: ExportPlan, folder: Path, write_config: Callable[[Path], None]) -> None:
    copy_companions(plan.converted.folder, folder)
    write_config(folder)
