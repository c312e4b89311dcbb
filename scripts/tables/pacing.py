"""KL by position and measured FLOPs on four kinds of text: docs/pacing.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tables.kept import kept
from tables.rows import Measured, Row
from weaver.data.packing import windows
from weaver.data.sources import read_documents
from weaver.evaluation.perplexity import compare
from weaver.evaluation.positions import kl_by_position
from weaver.evaluation.usage import count_usage
from weaver.models.accounting import ModelAccount
from weaver.models.moe import MoEFeedForward
from weaver.report.tables import markdown_table
from weaver.rundir.converted_model import open_converted
from weaver.rundir.stage_run import StageContext

TEXTS = {
    "WikiText-2": "wikitext2/wiki.test.rebuilt.raw",
    "built-in, held out": "builtin:held-out",
    "code": "domains/code_python.jsonl",
    "instructions": "multitask_calib/open.jsonl",
}
# Long windows for the mean and the FLOPs, many short ones for the first positions.
LONG, LONG_WINDOWS, SHORT, SHORT_WINDOWS = 512, 8, 17, 48
DECODED_TOKENS = 96
POSITIONS = ("text", "method", "KL", "1", "2", "3-16", "17-128", "129 on", "FFN FLOPs")
FLOPS = (
    *("FFN sparsity", "text", "FLOPs asked for", "measured", "difference"),
    *("of one text at once", "token by token", "same choice of an expert"),
)


def positions(measured: Measured) -> str:
    """KL by position, a table per sparsity."""
    found = _measurements(measured)
    parts = []
    for sparsity in sorted({row.sparsity for row in measured.rows}):
        cells = []
        for text in TEXTS:
            for row, values in found:
                if row.sparsity == sparsity:
                    one = values["texts"][text]
                    numbers = (one["kl"], *one["positions"], one["flops"])
                    cells.append((text, row.name, *(f"{number:.3f}" for number in numbers)))
        heading = f"## KL by position at {sparsity:.0%}"
        parts.append(f"{heading}\n\n{markdown_table(POSITIONS, cells)}")
    return "\n".join(parts)


def flops(measured: Measured) -> str:
    """FLOPs of weave on every text, and of one text at once and token by token."""
    cells = []
    for row, values in _measurements(measured):
        for text, one in values["texts"].items() if row.name == "weave" else ():
            cells.append(
                (
                    *(f"{row.sparsity:.0%}", text, f"{values['asked']:.3f}"),
                    *(f"{one['flops']:.3f}", f"{one['flops'] - values['asked']:+.3f}"),
                    *(f"{one[key]:.4f}" for key in ("prefill_flops", "decode_flops")),
                    f"{one['same']:.3%}",
                )
            )
    return markdown_table(FLOPS, cells)


def _measurements(measured: Measured) -> list[tuple[Row, dict[str, Any]]]:
    return [
        (
            row,
            kept(
                row.run_dir / "pacing.json",
                row.run_dir / "model",
                partial(_measure, row.run_dir, measured.data_dir),
            ),
        )
        for row in measured.rows
    ]


def _measure(run_dir: Path, data_dir: Path) -> dict[str, Any]:
    """KL by position, FLOPs of prefill and decoding, and whether both select the same."""
    converted = open_converted(StageContext(run_dir))
    account = converted.account()
    dense, moe = converted.load_dense("float32"), converted.load("float32")
    texts: dict[str, Any] = {}
    for name, location in TEXTS.items():
        documents = read_documents(location, data_dir)[:400]
        every = partial(windows, documents, converted.dense.tokenizer(), limit=None)
        long_WT = _spread(every(sequence_length=LONG), LONG_WINDOWS)
        short_WT = _spread(every(sequence_length=SHORT), SHORT_WINDOWS)
        with count_usage(moe) as usage:
            whole = compare(dense, moe, long_WT)
        begun = compare(dense, moe, short_WT)
        parts = [*kl_by_position(begun.kl_WT), *kl_by_position(whole.kl_WT)[3:]]
        texts[name] = {
            "kl": whole.kl,
            "positions": [part.kl for part in parts],
            "flops": _flops(account, {use.layer: use.experts_per_token for use in usage.summary()}),
            **_compare_decoding(account, _decoded(moe, long_WT[0, :DECODED_TOKENS])),
        }
    return {"asked": account.ffn_flops / account.dense_ffn_flops, "texts": texts}


def _spread(windows_WT: Tensor, limit: int) -> Tensor:
    """Windows spread over the text."""
    return windows_WT[:: max(1, len(windows_WT) // limit)][:limit]


def _flops(account: ModelAccount, experts: dict[int, float]) -> float:
    return account.measured_ffn_flops(experts) / account.dense_ffn_flops


def _decoded(moe: PreTrainedModel, ids_T: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Experts of every layer for every token, bool, (T, E): at once, and token by token."""
    ffns = [each for each in moe.modules() if isinstance(each, MoEFeedForward) and each.router]
    found: list[list[Tensor]] = []
    for calls in ([ids_T[None]], list(ids_T.split(1))):
        chosen: list[list[Tensor]] = [[] for _ in ffns]

        def note(module: Any, inputs: tuple[Tensor], row: list[Tensor]) -> None:
            row.append(module.routing(inputs[0].flatten(0, 1)).selected_TE())

        handles = [
            ffn.register_forward_pre_hook(lambda m, i, row=row: note(m, i, row))
            for row, ffn in zip(chosen, ffns, strict=True)
        ]
        cache: Any = DynamicCache(config=moe.config)
        with torch.no_grad():
            for ids in calls:
                moe(input_ids=ids.view(1, -1), past_key_values=cache, use_cache=True)
        for handle in handles:
            handle.remove()
        found.append([torch.cat(row) for row in chosen])
    return list(zip(*found, strict=True))


def _compare_decoding(
    account: ModelAccount, decoded: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    if not decoded:
        return {}
    layers = [i for i, shape in enumerate(account.layers) if shape.n_routed_experts]
    at_once, by_token = (
        {
            layer: float(pair[side].sum(1).float().mean())
            for layer, pair in zip(layers, decoded, strict=True)
        }
        for side in (0, 1)
    )
    same = torch.cat([(a == b).flatten() for a, b in decoded]).double().mean()
    return {
        "prefill_flops": _flops(account, at_once),
        "decode_flops": _flops(account, by_token),
        "same": float(same),
    }
