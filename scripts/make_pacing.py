"""Make docs/pacing.md: KL by position and measured FLOPs on four kinds of text.

weave and FLAP with the same refit, on the same calibration, at 25% and 50%. Each row is a run
directory below --runs with its measurements beside it, so that an interrupted script goes on where
it stopped. ``--model`` takes any local checkpoint. Run it through ``make pacing``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conversions import weaver
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from weaver.artifacts.manifest import MANIFEST
from weaver.cli.session import quiet_libraries
from weaver.data.packing import windows
from weaver.data.sources import read_documents
from weaver.evaluation.perplexity import compare
from weaver.evaluation.positions import kl_by_position
from weaver.evaluation.usage import count_usage
from weaver.models.accounting import ModelAccount
from weaver.models.moe import MoEFeedForward
from weaver.report.tables import markdown_table
from weaver.rundir.converted_model import ConvertedModel, open_converted
from weaver.rundir.stage_run import StageContext

TEXTS = {
    "WikiText-2": "wikitext2/wiki.test.rebuilt.raw",
    "built-in, held out": "builtin:held-out",
    "code": "domains/code_python.jsonl",
    "instructions": "multitask_calib/open.jsonl",
}
SPARSITIES = (0.25, 0.5)
# Long windows for the mean and the FLOPs, many short ones for the first positions.
LONG, SHORT, SHORT_WINDOWS = 512, 17, 48
DECODED_TOKENS = 96


@dataclass(frozen=True)
class Method:
    """A row: its name and the words that partition and build-router get."""

    name: str
    partition: tuple[str, ...] = ()
    router: tuple[str, ...] = ()


METHODS = (
    Method("weave"),
    Method(
        "flap, refit",
        (
            *("--method", "flap", "--sequential"),
            *("--set", "router.refit=true", "--set", "router.constants=true"),
        ),
        ("--refit", "--constants"),
    ),
)


def folder(base: Path, method: Method, sparsity: float) -> Path:
    """Run directory of a row."""
    return base / f"{method.name.replace(', ', '-')}-{sparsity}"


def convert(base: Path, method: Method, sparsity: float, arguments: argparse.Namespace) -> None:
    """A conversion on the shared calibration; finished stages are skipped."""
    calibration = base / "calibration"
    data = [word for text in arguments.data for word in ("--data", text)]
    weaver(
        *("calibrate", arguments.model, "--run-dir", calibration, "--dtype", arguments.dtype),
        *("--tokens", str(arguments.tokens), *data),
    )
    run_dir = folder(base, method, sparsity)
    weaver(
        *("partition", "--run-dir", run_dir, "--calibration", calibration / "calibrate"),
        *("--sparsity", str(sparsity), *method.partition),
    )
    weaver("build-router", "--run-dir", run_dir, *method.router)
    dtype = f"assemble.dtype={arguments.dtype}"
    weaver("assemble", "--run-dir", run_dir, "--no-smoke-test", "--set", dtype)


def measure(run_dir: Path, data_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """KL by position, FLOPs of prefill and decoding, and whether both select the same."""
    path = run_dir / "pacing.json"
    converted = open_converted(StageContext(run_dir))
    account = converted.account()
    results: dict[str, Any] = {"asked": account.ffn_flops / account.dense_ffn_flops, "texts": {}}
    if path.exists():
        results = json.loads(path.read_text())
    missing = [name for name in TEXTS if name not in results["texts"]]
    if not missing:
        return results
    dense, moe = converted.load_dense(arguments.dtype), converted.load(arguments.dtype)
    for name in missing:
        results["texts"][name] = _measure_text(
            converted, account, dense, moe, TEXTS[name], data_dir, arguments.windows
        )
        print(" ", run_dir.name, name, results["texts"][name], flush=True)
        path.write_text(json.dumps(results, indent=1))
    return results


def _measure_text(
    converted: ConvertedModel,
    account: ModelAccount,
    dense: PreTrainedModel,
    moe: PreTrainedModel,
    location: str,
    data_dir: Path,
    count: int,
) -> dict[str, Any]:
    documents = read_documents(location, data_dir)[:400]
    tokenizer = converted.dense.tokenizer()

    def text_windows(length: int, limit: int) -> Tensor:
        """Windows spread over the text."""
        every = windows(documents, tokenizer, sequence_length=length, limit=None)
        return every[:: max(1, len(every) // limit)][:limit]

    long_WT, short_WT = text_windows(LONG, count), text_windows(SHORT, SHORT_WINDOWS)
    with count_usage(moe) as usage:
        whole = compare(dense, moe, long_WT)
    begun = compare(dense, moe, short_WT)
    parts = [*kl_by_position(begun.kl_WT), *kl_by_position(whole.kl_WT)[3:]]
    decoded = _decoded(moe, long_WT[0, :DECODED_TOKENS])
    return {
        "kl": whole.kl,
        "positions": [part.kl for part in parts],
        "flops": _flops(account, {use.layer: use.experts_per_token for use in usage.summary()}),
        **_compare_decoding(account, decoded),
    }


def _flops(account: ModelAccount, experts: dict[int, float]) -> float:
    return account.measured_ffn_flops(experts) / account.dense_ffn_flops


def _decoded(moe: PreTrainedModel, ids_T: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Experts of every layer for every token, bool, (T, E): at once, and token by token."""
    ffns = [each for each in moe.modules() if isinstance(each, MoEFeedForward) and each.router]
    found: list[list[list[Tensor]]] = []
    for calls in ([ids_T[None]], list(ids_T.split(1))):
        chosen: list[list[Tensor]] = [[] for _ in ffns]
        handles = []
        for row, ffn in zip(chosen, ffns, strict=True):

            def note(module: Any, inputs: tuple[Tensor], row: list[Tensor] = row) -> None:
                row.append(module.routing(inputs[0].flatten(0, 1)).selected_TE())

            handles.append(ffn.register_forward_pre_hook(note))
        cache: Any = DynamicCache(config=moe.config)
        with torch.no_grad():
            for ids in calls:
                moe(input_ids=ids.view(1, -1), past_key_values=cache, use_cache=True)
        for handle in handles:
            handle.remove()
        found.append(chosen)
    return [(torch.cat(a), torch.cat(b)) for a, b in zip(*found, strict=True)]


def _compare_decoding(
    account: ModelAccount, decoded: list[tuple[Tensor, Tensor]]
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


def describe(results: dict[tuple[str, float], dict[str, Any]]) -> str:
    """The tables."""
    parts = []
    rows: list[tuple[str, ...]]
    for sparsity in SPARSITIES:
        rows = []
        for name in TEXTS:
            for method in METHODS:
                found = results.get((method.name, sparsity))
                if found is None or name not in found["texts"]:
                    continue
                text = found["texts"][name]
                values = (text["kl"], *text["positions"], text["flops"])
                rows.append((name, method.name, *(f"{value:.3f}" for value in values)))
        headers: tuple[str, ...] = ("text", "method", "KL", "1", "2", "3-16", "17-128", "129 on")
        headers += ("FFN FLOPs",)
        parts += [f"## KL by position at {sparsity:.0%}", "", markdown_table(headers, rows), ""]
    rows = []
    for (method_name, sparsity), found in results.items():
        for name in found["texts"] if method_name == "weave" else ():
            text = found["texts"][name]
            rows.append(
                (
                    f"{sparsity:.0%}",
                    name,
                    f"{found['asked']:.3f}",
                    f"{text['flops']:.3f}",
                    f"{text['flops'] - found['asked']:+.3f}",
                    f"{text['prefill_flops']:.4f}",
                    f"{text['decode_flops']:.4f}",
                    f"{text['same']:.3%}",
                )
            )
    headers = (
        *("FFN sparsity", "text", "FLOPs asked for", "measured", "difference"),
        *("of one text at once", "token by token", "same choice of an expert"),
    )
    return "\n".join([*parts, "## FLOPs of weave", "", markdown_table(headers, rows), ""])


def main() -> None:
    """Convert, measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="models/smollm2-135m", help="Any local checkpoint.")
    parser.add_argument("--data", nargs="+", default=["builtin:calibration"])
    parser.add_argument("--tokens", type=int, default=16384, help="Of the calibration.")
    parser.add_argument("--windows", type=int, default=8, help="Of 512 tokens, per text.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--finished", action="store_true", help="Rows that are converted only.")
    parser.add_argument("--runs", type=Path, default=Path("runs/pacing"))
    parser.add_argument("--out", type=Path, default=Path("docs/pacing.md"))
    arguments = parser.parse_args()
    quiet_libraries()
    base = arguments.runs / Path(arguments.model).name
    results = {}
    for method in METHODS:
        for sparsity in SPARSITIES:
            run_dir = folder(base, method, sparsity)
            if not arguments.finished:
                convert(base, method, sparsity, arguments)
            elif not (run_dir / "model" / MANIFEST).exists():
                continue
            results[method.name, sparsity] = measure(run_dir, arguments.data_dir, arguments)
    header = HEADER.format(
        model=Path(arguments.model).name,
        tokens=arguments.tokens,
        data=", ".join(arguments.data),
        dtype=arguments.dtype,
        windows=arguments.windows,
        short=SHORT_WINDOWS,
        decoded=DECODED_TOKENS,
    )
    arguments.out.write_text(header + describe(results))


HEADER = """# First tokens and exact budgets

Made by `scripts/make_pacing.py` (`make pacing DATA_DIR=...`) on {model}, converted in {dtype}.
Calibration: {tokens} tokens of {data} in windows of 512, the same for both methods;
"flap, refit" is FLAP with weave's re-solved down projection and its treatment of first tokens.

A threshold that selects K experts on calibration text selects more or fewer on other text, and a
converted model is weakest at the first tokens of a text, of which calibration has few and to which
everything attends. What weaver does about both (`weaver/models/pacing.py`):

- **A sequence keeps an account.** Each layer sees what the layers before it have spent on the
  sequence's earlier tokens beyond what they were set to. It expects 0.8 of their drift of itself,
  pays back its part of what they overspent, and aims at fewer or more experts accordingly, between
  0.77 and 1.5 times what it was set to. Positions 3 to 16 are given what they
  used on calibration text, which is more than the others. Easy and hard tokens, and layers among
  each other, keep their differences. A layer waits for no other one, so that a prompt at once and
  token by token select the same experts.
- **The first two tokens run all experts**, which counts in K over a calibration window.
- **Fits know where a token stands.** The first 16 tokens of a window count twice; where the
  layer normalises its FFN's output (Gemma 2 and 3, OLMo 2), errors count relative to that output.

Columns "1" to "129 on" are the KL at these positions, nats per token: up to the 16th from {short}
windows of 17 tokens, behind it from {windows} of 512, as are the KL and the FFN FLOPs (measured,
over the dense FFN's, router and first tokens included). The last three columns of the last table
are of one text of {decoded} tokens, of which the first 16 take a sixth and use more experts than
the others, as they do on calibration text.

"""

if __name__ == "__main__":
    main()
