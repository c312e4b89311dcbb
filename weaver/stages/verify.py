"""``verify``: does an export compute what the model it was made from computes?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weaver.artifacts.dtypes import DTYPES, dtype_name
from weaver.artifacts.manifest import MANIFEST, read_manifest
from weaver.artifacts.store import read_json
from weaver.artifacts.verification import Verification
from weaver.config.sections import Runtime, VerifyConfig
from weaver.data.packing import read_windows
from weaver.errors import WeaverError, require_extra
from weaver.evaluation.logits import chunked_logits
from weaver.evaluation.perplexity import chunk_losses
from weaver.export.fresh import FreshModel, fresh_model
from weaver.export.registry import GGUF
from weaver.export.vllm_runtime import require_vllm
from weaver.models.intake import check_windows
from weaver.models.moe import MoEFeedForward
from weaver.rundir.converted_model import ConvertedModel, open_converted
from weaver.rundir.stage_folders import check_contents, stage_command
from weaver.rundir.stage_run import StageContext
from weaver.stages.verify_listed import prompts_of, same_text, verify_gguf, verify_in_vllm

RECORD = "weaver_export.json"


def verify(
    context: StageContext, export: Path, config: VerifyConfig, *, finished: bool = True
) -> Verification:
    """Compare an export with the run's converted model, in the runtime that it is for.

    Args:
        context: the run directory that the export was made from.
        export: an exported folder.
        config: text, number of tokens, dtype, runtime.
        finished: require the export's manifest; ``export`` itself measures before it writes one.

    Raises:
        WeaverError: the folder is no export of this run's model, or does not run in the
            runtime; or the runtime is not installed.
    """
    converted = open_converted(context)
    if finished:
        _check_same_source(export, converted)
    command = stage_command("export", context.run_dir)
    record = read_json(export / RECORD, rebuild=f"{command} --force")
    runtime = _check_runtime(record["target"], config)
    windows_WT = _windows(context, config, converted)
    check_windows(converted.dense.config, windows_WT, what=converted.dense.model.path)
    native = converted.load(config.dtype)
    if runtime == "llama.cpp":
        return verify_gguf(context, export, native, windows_WT, config)
    if runtime == "vllm":
        return verify_in_vllm(export, record["target"], native, windows_WT, config)
    remote_code = record["target"] == "weaver"
    if remote_code and not (export / "modeling_weaver.py").exists():
        raise WeaverError(
            f"{export}: weaver's own type, without its code",
            why="in a process without weaver nothing could load it",
            fix=f"{command} --to weaver --remote-code --force",
        )
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else native.dtype
    prompts_PT = prompts_of(windows_WT)
    router = str(record.get("router_module", ""))
    with fresh_model(
        export, windows_WT, prompts_PT, dtype=dtype, router=router, remote_code=remote_code
    ) as fresh:
        totals = _Totals()
        with context.progress("verify", windows_WT.shape[0]) as advance:
            for index, ids_T in enumerate(windows_WT):
                _compare(native, fresh, index, ids_T, record.get("experts", []), totals)
                advance(f"window {index + 1}")
        same = same_text(native, prompts_PT, fresh.generate(config.new_tokens), config.new_tokens)
        result = totals.result(record["target"], fresh.name, dtype_name(dtype), same)
    stored = read_json(export / "config.json", rebuild="weaver export RUN --force")["dtype"]
    if stored == result.dtype:
        return result
    # Kernels may refuse shapes in one dtype and take them in another: it has to run in its own.
    with fresh_model(
        export,
        windows_WT[:1],
        prompts_PT,
        dtype=DTYPES[stored],
        router="",
        remote_code=remote_code,
    ) as fresh:
        totals = _Totals()
        _compare(native, fresh, 0, windows_WT[0], [], totals)
    kl = float(totals.sums[2] / totals.tokens)
    return result.model_copy(update={"stored_dtype": stored, "stored_kl": kl})


@dataclass
class _Totals:
    """Sums over windows: native NLL, the export's NLL, KL, top-1 hits; pairs of experts."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    tokens: int = 0
    pairs: int = 0
    agreeing: int = 0

    def result(self, target: str, name: str, dtype: str, same_text: float) -> Verification:
        native, exported, kl, top1 = (self.sums / self.tokens).tolist()
        return Verification(
            target=target,
            loaded_as=name,
            dtype=dtype,
            tokens=self.tokens,
            kl=kl,
            native_perplexity=math.exp(native),
            export_perplexity=math.exp(exported),
            top1_agreement=top1,
            topk_agreement=self.agreeing / self.pairs if self.pairs else None,
            same_text=same_text,
        )


def _compare(
    native: PreTrainedModel,
    fresh: FreshModel,
    index: int,
    ids_T: Tensor,
    experts: Sequence[Sequence[int]],
    totals: _Totals,
) -> None:
    """Add one window to the totals."""
    logits_TV, selected = fresh.window(index)
    start = 0
    with _native_selection(native) as expected:
        for logits_NV in chunked_logits(native, ids_T):
            targets_N = ids_T[start + 1 : start + 1 + logits_NV.shape[0]]
            pair = (logits_NV[: targets_N.numel()], logits_TV[start : start + targets_N.numel()])
            start += logits_NV.shape[0]
            # In float64: the distance of exact exports is below float32's rounding.
            log_p_NV, log_q_NV = (x_NV.double().log_softmax(-1) for x_NV in pair)
            dense, converted, top1, kl_N = chunk_losses(log_p_NV, log_q_NV, targets_N)
            sums = (dense, converted, float(kl_N.double().sum()), top1)
            totals.sums += torch.tensor(sums, dtype=torch.float64)
    totals.tokens += ids_T.numel() - 1
    if not experts:
        return
    for ids_TK, names, expected_TE in zip(selected, experts, expected, strict=True):
        chosen_TE = _chosen(ids_TK, torch.tensor(names), expected_TE.shape[1])
        totals.pairs += int(expected_TE.sum())
        totals.agreeing += int((expected_TE & chosen_TE).sum())


def _chosen(ids_TK: Tensor, experts_S: Tensor, num_experts: int) -> Tensor:
    """Which of the converted model's experts the stock model selected, bool, (T, E)."""
    native_TK = experts_S[ids_TK]
    # Experts that stand for none of the model's are noted in a column of their own.
    columns_TK = torch.where(native_TK >= 0, native_TK, num_experts)
    chosen_TE = torch.zeros(ids_TK.shape[0], num_experts + 1, dtype=torch.bool)
    return chosen_TE.scatter_(1, columns_TK, True)[:, :num_experts]


@contextmanager
def _native_selection(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects which experts every routed layer selects, bool, (T, E)."""
    found: list[Tensor] = []

    def note(module: MoEFeedForward, arguments: tuple[Tensor]) -> None:
        routing = module.routing(arguments[0].reshape(-1, arguments[0].shape[-1]))
        if routing is None:
            found.append(torch.zeros(arguments[0].shape[-2], 0, dtype=torch.bool))
        else:
            found.append(routing.selected_TE())

    layers = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    hooks: list[Any] = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _check_runtime(target: str, config: VerifyConfig) -> Runtime:
    """The runtime that is asked for, or the target's own; it is installed and runs the target.

    Raises:
        WeaverError: it is not, or does not.
    """
    runtime: Runtime = config.runtime or ("llama.cpp" if target == GGUF else "transformers")
    if (runtime == "llama.cpp") != (target == GGUF):
        raise WeaverError(
            f"{runtime} does not run a {target} export",
            why=f"llama.cpp reads {GGUF} files, and nothing else here does",
            fix="leave --runtime out, or export --to another target",
        )
    if runtime == "llama.cpp":
        require_extra("xllamacpp", "gguf", "a check of a GGUF file")
    if runtime == "vllm":
        require_vllm("a check in vLLM")
    return runtime


def _windows(context: StageContext, config: VerifyConfig, converted: ConvertedModel) -> Tensor:
    count = -(-config.tokens // config.sequence_length)
    return read_windows(
        config.data,
        converted.dense.tokenizer(),
        sequence_length=config.sequence_length,
        limit=count,
        data_dir=context.data_dir,
    )


def _check_same_source(export: Path, converted: ConvertedModel) -> None:
    """The export was made from the model that the run holds now."""
    if not (export / MANIFEST).exists():
        raise WeaverError(
            f"{export}: no finished export",
            why=f"it holds no {MANIFEST}",
            fix="weaver export RUN --to TARGET --out DIR",
        )
    manifest = read_manifest(export, rebuild="weaver export RUN --force")
    # Its code will run, so that it has to be what weaver wrote.
    check_contents(export, manifest)
    made_from = manifest.request.inputs
    if made_from.get(converted.stage) is None or (
        made_from[converted.stage].digest != converted.ref.digest
    ):
        raise WeaverError(
            f"{export}: made from another model than {converted.folder} holds now",
            why="an export is compared with the model it was made from",
            fix="name the run it was made from, or export again with --force",
        )
