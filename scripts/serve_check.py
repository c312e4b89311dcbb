"""Make docs/serving_checks.md: converted models in real vLLM on a CPU, beside transformers.

Runs in an environment with vLLM (``make serve-check``). Each row of the first table is one run of
vLLM, its log-probabilities and texts compared with the model on weaver's own code, or for the dense
model in transformers. The second table is throughput, dense and converted in turn. The third thing
is a chat completion over HTTP. What was measured below --runs is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conversions import convert, weaver
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from weaver.data.packing import read_windows
from weaver.evaluation.listed import LISTED, ListedTotals
from weaver.export.vllm_runtime import run_in_vllm
from weaver.kernels.machine import cpu_name
from weaver.models.hf import register
from weaver.models.moe import MoEFeedForward
from weaver.report.tables import markdown_table

TEXT = ("builtin:held-out",)
WINDOWS, WINDOW = 2, 512
PROMPTS, PROMPT, NEW = 16, 16, 32
# Candidates further apart than this are not a matter of rounding in float32.
APART = 0.05
STOCK = (8, 16, 64)


def compared(model: Path, native: Path, dtype: str, *, plugin: bool) -> dict[str, Any]:
    """Compare a folder in vLLM with one in transformers, both in a dtype.

    Returns:
        Measures of the row: largest and mean difference, KL, top-1, texts that are the same, and
        those that part where the first two candidates are more than ``APART`` apart.
    """
    tokenizer = AutoTokenizer.from_pretrained(native)
    windows_WT = read_windows(TEXT, tokenizer, sequence_length=WINDOW, limit=WINDOWS, data_dir=None)
    prompts_PT = read_windows(TEXT, tokenizer, sequence_length=PROMPT, limit=PROMPTS, data_dir=None)
    answers = run_in_vllm(
        model,
        windows_WT.tolist(),
        prompts_PT.tolist(),
        new_tokens=NEW,
        top=LISTED,
        plugin=plugin,
        engine={"dtype": dtype, "enforce_eager": True},
    )
    reference: Any = AutoModelForCausalLM.from_pretrained(native, dtype=dtype).eval()
    totals, same, parted = ListedTotals(), 0, 0
    with torch.no_grad():
        for ids_T, listed in zip(windows_WT, answers.logprobs, strict=True):
            totals.add(_log_probabilities(reference, ids_T)[:-1], listed)
        for prompt_T, text in zip(prompts_PT, answers.texts, strict=True):
            gap = _gap(reference, prompt_T, text)
            same += gap is None
            parted += gap is not None and gap > APART
    return {
        "vllm": answers.version,
        "largest": max(totals.differences),
        "mean": totals.mean_difference,
        "kl": totals.mean_kl,
        "top1": totals.top1_agreement,
        "same_texts": same,
        "parted_beyond": parted,
    }


def _log_probabilities(model: Any, ids_T: Tensor) -> Tensor:
    log_p_TV: Tensor = model(ids_T[None]).logits[0].double().log_softmax(-1)
    return log_p_TV


def _gap(model: Any, prompt_T: Tensor, text: Sequence[int]) -> float | None:
    """Distance of the model's first two candidates where its greedy text parts from another."""
    written = model.generate(
        prompt_T[None], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    own = written[0, prompt_T.numel() :].tolist()
    for place, (mine, other) in enumerate(zip(own, text, strict=True)):
        if mine != other:
            ids_T = torch.cat([prompt_T, torch.tensor(own[:place], dtype=torch.int64)])
            first, second = _log_probabilities(model, ids_T)[-1].topk(2).values.tolist()
            return float(first - second)
    return None


def transformers_floor(folder: Path) -> dict[str, Any]:
    """The same measure between bfloat16 and float32 in transformers: what rounding alone does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows_WT = read_windows(TEXT, tokenizer, sequence_length=WINDOW, limit=WINDOWS, data_dir=None)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in ("float32", "bfloat16")
    ]
    totals = ListedTotals()
    with torch.no_grad():
        for ids_T in windows_WT:
            log_p_TV, log_q_TV = (_log_probabilities(model, ids_T)[:-1] for model in models)
            top = log_q_TV.topk(LISTED)
            listed = [
                dict(zip(ids, values, strict=True))
                for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            totals.add(log_p_TV, listed)
    return {
        "largest": max(totals.differences),
        "mean": totals.mean_difference,
        "kl": totals.mean_kl,
        "top1": totals.top1_agreement,
    }


def pacing(folder: Path, dense: Path) -> dict[str, Any]:
    """KL to the dense model, paced and with calibrated thresholds, and experts used per token.

    The second is what a runtime gets that knows positions and not sequences.
    """
    tokenizer = AutoTokenizer.from_pretrained(dense)
    windows_WT = read_windows(TEXT, tokenizer, sequence_length=1024, limit=4, data_dir=None)
    reference: Any = AutoModelForCausalLM.from_pretrained(dense, dtype="float32").eval()
    found: dict[str, Any] = {}
    for name in ("paced", "calibrated thresholds"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        ffns = [each for each in model.modules() if isinstance(each, MoEFeedForward)]
        assert ffns[0].pace is not None
        pacer: Any = ffns[0].pace[0]
        if name != "paced":
            pacer.begin = lambda mask_BT, _=None, pacer=pacer: pacer.free(mask_BT.cumsum(1) - 1)
        counts: list[float] = []
        for ffn in ffns:
            ffn.register_forward_pre_hook(partial(_count, counts))
        kl = 0.0
        with torch.no_grad():
            for ids_T in windows_WT:
                log_p_TV, log_q_TV = (_log_probabilities(m, ids_T) for m in (reference, model))
                kl += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(1).mean())
        found[name] = {"kl": kl / len(windows_WT), "experts": statistics.mean(counts)}
    return found


def _count(counts: list[float], ffn: MoEFeedForward, arguments: tuple[Tensor]) -> None:
    routing = ffn.routing(arguments[0].flatten(0, -2))
    assert routing is not None
    counts.append(routing.num_pairs / routing.num_tokens)


def plan(runs: Path, model: Path, demo: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every measurement by name."""
    own = demo / "model"
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    dense = partial(compared, model, model, plugin=False)
    found["dense, bfloat16"] = partial(dense, dtype="bfloat16")
    for dtype in ("float32", "bfloat16"):
        found[f"weave 25%, {dtype}"] = partial(compared, own, own, dtype, plugin=True)
    for slices in STOCK:
        run = runs / f"stock-{slices}"
        export = run / "export-glm4-moe"
        for dtype in ("float32", "bfloat16"):
            found[f"glm4-moe, {slices} slices, {dtype}"] = partial(
                compared, export, run / "model", dtype, plugin=False
            )
    found["floor: dense"] = partial(transformers_floor, model)
    found["floor: weave 25%"] = partial(transformers_floor, own)
    found["pacing"] = partial(pacing, own, model)
    return found


def convert_all(runs: Path, demo: Path, config: Path) -> None:
    """The conversions and exports that are checked; finished ones are kept."""
    if not (demo / "model" / "manifest.json").exists():
        convert(demo, demo, config)
    for slices in STOCK:
        run = runs / f"stock-{slices}"
        if not (run / "export-glm4-moe" / "manifest.json").exists():
            changes = (f"num_experts={slices}", "options.selection=top-k")
            overrides = [f"partition.{change}" for change in changes]
            convert(run, demo, config, *overrides, "router.constants=false")
            weaver("export", run, "--to", "glm4-moe", "--approximate")


def _row(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{row['largest']:.4f} ({row['mean']:.4f})",
        f"{row['kl']:.2e}",
        f"{row['top1']:.2%}",
        f"{row['same_texts']} of {PROMPTS}" if "same_texts" in row else "-",
        str(row["parted_beyond"]) if "parted_beyond" in row else "-",
    )


def tables(results: dict[str, dict[str, Any]]) -> str:
    """The document's tables."""
    headers = (
        *("model", "top-10 difference, largest (mean)", "KL", "top-1 agreement"),
        *("same texts", f"parted where candidates are > {APART} apart"),
    )
    text = markdown_table(headers, [_row(*item) for item in results.items() if "kl" in item[1]])
    if "pacing" in results:
        found = results["pacing"].items()
        states = [(name, f"{row['kl']:.4f}", f"{row['experts']:.2f}") for name, row in found]
        titles = ("thresholds", "KL to the dense model", "experts per token and layer")
        text += f"\n## Paced, and without state\n\n{markdown_table(titles, states)}"
    return text


INTRODUCTION = """# Serving, checked

Made by `scripts/serve_check.py` (`make serve-check`): vLLM {vllm}, SmolLM2-135M-Instruct,
{cpu}, {threads} threads. Rows without "floor" are vLLM (eager) against transformers in
the same dtype, on {tokens} tokens of held-out text and {prompts} prompts continued by {new}
tokens; converted models on weaver's own code. "Floor" rows are bfloat16 against float32 in
transformers, without vLLM: what rounding does alone. KL in nats per token, a lower bound from the
{listed} likeliest tokens.

"""


def main() -> None:
    """Measure everything and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/serving_checks.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs/serve"))
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--only", nargs="*", help="Names of measurements; the others are left.")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    register()
    convert_all(arguments.runs, arguments.demo, arguments.config)
    file = arguments.runs / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for name, measure in plan(arguments.runs, arguments.model, arguments.demo).items():
        if name in results or (arguments.only and name not in arguments.only):
            continue
        print(name, flush=True)
        results[name] = measure()
        file.write_text(json.dumps(results, indent=1))
    introduction = INTRODUCTION.format(
        vllm=next((row["vllm"] for row in results.values() if "vllm" in row), "?"),
        cpu=cpu_name() or platform.machine(),
        threads=torch.get_num_threads(),
        tokens=WINDOWS * (WINDOW - 1),
        prompts=PROMPTS,
        new=NEW,
        listed=LISTED,
    )
    arguments.out.write_text(introduction + tables(results))


if __name__ == "__main__":
    main()
