"""``eval``: what the conversion costs in quality, measured next to the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from weaver.artifacts.dtypes import dtype_name
from weaver.artifacts.manifest import (
    MANIFEST,
    InputRef,
    StageManifest,
    StageRequest,
    read_manifest,
    versions,
)
from weaver.artifacts.results import (
    EvalResult,
    LayerUsage,
    ModelQuality,
    RouterReport,
    TaskResult,
    WindowValues,
)
from weaver.artifacts.store import values_digest, write_json
from weaver.artifacts.summaries import AssembleSummary, EvalSummary, read_summary
from weaver.config.sections import EvalConfig
from weaver.conversion.layer_budgets import refuse_experts
from weaver.data.packing import read_windows
from weaver.evaluation.fidelity import KeptInputs, keep_inputs
from weaver.evaluation.perplexity import Comparison, compare
from weaver.evaluation.positions import kl_by_position
from weaver.evaluation.usage import count_usage
from weaver.models.accounting import ModelAccount
from weaver.models.ffns import site_prefix
from weaver.models.intake import check_windows
from weaver.report.comparison import task_scores
from weaver.rundir.converted_model import ConvertedModel, open_converted
from weaver.rundir.measurements import RESULTS, read_eval
from weaver.rundir.stage_folders import stage_command
from weaver.rundir.stage_run import StageContext, StageRun
from weaver.stages.eval_tasks import EvalTasks, open_tasks, run_tasks
from weaver.stages.model_card import write_card
from weaver.stages.router_report import held_out_positions, open_report, router_report

STAGE = "eval"


@dataclass(frozen=True)
class _Inputs:
    """Inputs of an evaluation: windows of text, tasks, and their digests."""

    windows_WT: Tensor
    tasks: EvalTasks
    refs: dict[str, InputRef]


def evaluate(context: StageContext, config: EvalConfig, *, finetuned: bool = True) -> StageManifest:
    """Measure perplexity, KL, top-1 agreement, expert usage and tasks; write ``results.json``.

    With ``config.router`` also router fidelity and partition stability, see ``router_report``.

    Args:
        context: run directory, progress, data folder.
        config: text, read_windows, tasks, router report.
        finetuned: measure the fine-tuned model if the run has one.

    Raises:
        WeaverError: no finished conversion, no such data, too little text for one window, or too
            few calibration samples for the router report, or one of a model with two levels.
    """
    converted = open_converted(context, finetuned=finetuned)
    if config.router:
        refuse_experts(converted.dense, "eval --router", "eval with --no-router")
    tokenizer = converted.dense.tokenizer()
    inputs = _read_inputs(context, config, tokenizer)
    check_windows(converted.dense.config, inputs.windows_WT, what=converted.dense.model.path)
    report_inputs = open_report(context) if config.router else None
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config=_recorded(config),
        inputs={
            converted.stage: converted.ref,
            **(report_inputs.refs() if report_inputs else {}),
            **inputs.refs,
        },
    )
    found = len(inputs.windows_WT)
    if config.windows is not None and found < config.windows:
        context.say(f"the text holds {found} windows of the {config.windows} that were asked for")
    dtype = dtype_name(converted.dtype(config.dtype))
    run = StageRun(context, request, converted.manifest.model, dtype)
    if run.status == "skip":
        manifest = run.skipped()
        _complete_card(converted, context)
        return manifest
    run.begin()
    dense = converted.load_dense(config.dtype)
    moe = converted.load(config.dtype)
    count, length = inputs.windows_WT.shape
    positions_N = held_out_positions(count, length, context.seed)
    keeping: AbstractContextManager[list[KeptInputs]] = (
        keep_inputs(moe, positions_N) if report_inputs else nullcontext([])
    )
    with context.progress(STAGE, count) as advance, count_usage(moe) as usage, keeping as kept:
        comparison = compare(
            dense, moe, inputs.windows_WT, on_window=lambda n: advance(f"window {n}")
        )
    report = router_report(context, report_inputs, kept) if report_inputs else None
    tasks = {
        name: run_tasks(
            context, config, model, tokenizer, inputs.tasks, folder=run.folder, label=name
        )
        for name, model in (("dense", dense), ("moe", moe))
    }
    account, used = converted.account(), usage.summary()
    measured = _measured_flops(converted, account, used, inputs.windows_WT.numel())
    result = _result(
        request, converted, account, measured, comparison, usage=used, router=report, tasks=tasks
    )
    write_json(run.folder / RESULTS, result.model_dump(mode="json"))
    manifest = run.finish(_summary(result))
    _complete_card(converted, context)
    return manifest


def _recorded(config: EvalConfig) -> dict[str, Any]:
    """The configuration; settings of the harness only where they are given."""
    values = config.model_dump(mode="json")
    unset = [name for name in ("include_path", "shots") if values[name] is None]
    return {name: value for name, value in values.items() if name not in unset}


def measured_quality(context: StageContext, converted: ConvertedModel) -> EvalResult | None:
    """Return what a finished ``eval`` of this very model measured; None if there is none."""
    folder = context.folder(STAGE)
    if not (folder / MANIFEST).exists():
        return None
    command = stage_command(STAGE, context.run_dir)
    measured = read_manifest(folder, rebuild=command).request.inputs.get(converted.stage)
    if measured is None or measured.digest != converted.ref.digest:
        return None
    return read_eval(context.run_dir)


def _complete_card(converted: ConvertedModel, context: StageContext) -> None:
    write_card(
        converted.folder,
        converted.account(),
        converted.recipe(),
        converted.dense.folder,
        results=measured_quality(context, converted),
    )


def _read_inputs(
    context: StageContext, config: EvalConfig, tokenizer: PreTrainedTokenizerBase
) -> _Inputs:
    windows_WT = read_windows(
        config.data,
        tokenizer,
        sequence_length=config.sequence_length,
        limit=config.windows,
        data_dir=context.data_dir,
    )
    tasks = open_tasks(context, config)
    ids = values_digest({"windows_WT": windows_WT})
    data = InputRef(path=", ".join(config.data), digest=ids)
    return _Inputs(windows_WT, tasks, {"data": data, **tasks.refs})


def _measured_flops(
    converted: ConvertedModel, account: ModelAccount, usage: Sequence[LayerUsage], tokens: int
) -> int:
    """FFN FLOPs per token at what was counted on the text.

    Of a MoE model's experts also how many tokens reached them; those that are not routed inside are
    not counted and stand with the share that is intended.
    """
    dense = converted.dense
    number = {site_prefix(dense.family, site)[:-1]: site.number for site in dense.sites}
    experts = {number[each.module]: each.experts_per_token for each in usage}
    shares = {
        site.number: 0.0
        for site, shape in zip(dense.sites, account.layers, strict=True)
        if site.is_inner and shape.n_routed_experts
    }
    shares |= {number[each.module]: each.tokens / tokens for each in usage}
    return account.measured_ffn_flops(experts, shares)


def _result(
    request: StageRequest,
    converted: ConvertedModel,
    account: ModelAccount,
    measured: int,
    comparison: Comparison,
    *,
    usage: tuple[LayerUsage, ...],
    router: RouterReport | None,
    tasks: dict[str, dict[str, TaskResult]],
) -> EvalResult:
    return EvalResult(
        dense=ModelQuality(
            perplexity=comparison.dense.perplexity,
            ffn_flops_per_token=account.dense_ffn_flops,
            tasks=tasks["dense"],
        ),
        moe=ModelQuality(
            perplexity=comparison.moe.perplexity,
            ffn_flops_per_token=account.ffn_flops,
            tasks=tasks["moe"],
        ),
        measured_ffn_flops_per_token=measured,
        kl=comparison.kl,
        kl_by_position=kl_by_position(comparison.kl_WT),
        predicted_kl=_predicted_kl(converted),
        top1_agreement=comparison.top1_agreement,
        tokens=comparison.tokens,
        sequence_length=request.config["sequence_length"],
        ffn_sparsity=account.ffn_sparsity,
        dense_parameters=account.total_dense_parameters,
        dense_active_parameters=account.dense_active_parameters,
        total_parameters=account.total_parameters,
        active_parameters=account.active_parameters,
        windows=WindowValues(
            dense_nll=comparison.dense.nll,
            moe_nll=comparison.moe.nll,
            kl=comparison.kl_per_window,
            top1_agreement=comparison.top1_per_window,
        ),
        expert_usage=usage,
        router=router,
        config=request.config,
        versions=versions(),
        digests={name: ref.digest for name, ref in request.inputs.items()}
        | {"dense": converted.manifest.model.digest},
    )


def _predicted_kl(converted: ConvertedModel) -> float | None:
    """As the partition predicted it; None after a fine-tuning."""
    if converted.stage != "assemble":
        return None
    return read_summary(AssembleSummary, converted.manifest.summary).predicted_kl


def _summary(result: EvalResult) -> EvalSummary:
    return EvalSummary(
        dense_perplexity=result.dense.perplexity,
        moe_perplexity=result.moe.perplexity,
        kl=result.kl,
        kl_by_position=result.kl_by_position,
        predicted_kl=result.predicted_kl,
        top1_agreement=result.top1_agreement,
        ffn_sparsity=result.ffn_sparsity,
        dense_ffn_flops=result.dense.ffn_flops_per_token,
        ffn_flops=result.moe.ffn_flops_per_token,
        measured_ffn_flops=result.measured_ffn_flops_per_token,
        active_parameters=result.active_parameters,
        total_parameters=result.total_parameters,
        tasks=task_scores(result.dense.tasks, result.moe.tasks),
        router=result.router,
    )
