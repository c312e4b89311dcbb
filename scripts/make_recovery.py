"""Make docs/recovery.md: conversions of half the FFN, before and after a short fine-tuning.

Every row is a run directory below --runs; finished stages are skipped, so that an interrupted
script goes on where it stopped. Calibration reads the mixture of docs/results.md, training the
validation split of WikiText-2 and instructions of several tasks. The guard chooses the best weights
on other text; quality is measured on the raw WikiText-2 test split.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversions import convert, read_json, set_words, weaver

from weaver.report.tables import markdown_table

CALIBRATE = (
    *("calibrate.data=[multitask_calib/open.jsonl, domains]", "calibrate.tokens=16384"),
    "calibrate.input_sample_mb=256",  # as weave wants it: all methods share one calibration
)
EVAL = (
    *("eval.data=[wikitext2/wiki.test.rebuilt.raw]", "eval.windows=8"),
    "eval.sequence_length=1024",
)
TRAINING = {
    "data": "[wikitext2/tok.valid.txt, multitask_calib/open.jsonl]",
    "eval_data": "[builtin:held-out]",
    "batch_size": "4",
    "sequence_length": "256",
    "evaluate_every": "50",
    "checkpoint_every": "50",
}
LONGER = {
    **{"steps": "300", "batch_size": "1", "sequence_length": "1024"},
    **{"learning_rate": "1e-3", "eval_windows": "8"},
}


@dataclass(frozen=True)
class Row:
    """One fine-tuning.

    Args:
        method: what the conversion is; its config is ``configs/smollm2-METHOD.yaml``.
        name: of the fine-tuning, for the table and the folder.
        settings: section ``finetune``, as far as it is not the config's.
    """

    method: str
    name: str
    settings: Mapping[str, str]

    @property
    def folder(self) -> str:
        """Name of the run directory."""
        return f"{self.method}-{self.name}".replace(" ", "-")


METHODS = ("weave", "cmoe", "expertweaver")


def split_text(data_dir: Path, folder: Path) -> dict[str, str]:
    """The validation split of WikiText-2, of which the last twentieth is for the guard.

    Returns:
        Settings that name both parts.
    """
    lines = (data_dir / "wikitext2/tok.valid.txt").read_text().splitlines(keepends=True)
    kept = len(lines) - len(lines) // 20
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"data": ("train", lines[:kept]), "eval_data": ("held_out", lines[kept:])}
    for name, text in parts.values():
        (folder / f"{name}.txt").write_text("".join(text))
    return {key: f"[{folder.resolve()}/{name}.txt]" for key, (name, _) in parts.items()}


def rows(steps: int, wikitext: dict[str, str]) -> list[Row]:
    """The table's rows: every method's start, one of them longer, one with other objectives."""
    distill, next_token = {"preset": "distill-2k"}, {"objective": "next-token"}
    table: list[tuple[str, str, dict[str, str]]]
    table = [(method, "distill-2k", distill) for method in METHODS]
    table += [("weave", "distill-2k longer", distill | LONGER | wikitext)]
    table += [("cmoe", "distill-2k on next tokens", distill | next_token)]
    table += [("cmoe", "cmoe-2k", {"preset": "cmoe-2k"})]
    common = TRAINING | {"steps": str(steps)}
    return [Row(method, name, common | settings) for method, name, settings in table]


def run_row(row: Row, runs: Path, data_dir: Path, sparsity: float) -> None:
    """Convert, evaluate, fine-tune, evaluate again; what is finished is skipped."""
    config = Path(f"configs/smollm2-{row.method}.yaml")
    run_dir, start = runs / row.folder, runs / f"{row.method}-{sparsity:g}"
    common: list[str | Path] = ["--config", config, "--data-dir", data_dir]
    calibration = runs / "calibration"
    convert(
        *(start, calibration, config, f"partition.sparsity={sparsity}"),
        calibrate=["--data-dir", data_dir, *set_words(CALIBRATE)],
    )
    weaver("eval", *common, "--run-dir", start, *set_words(EVAL))
    if not run_dir.exists():
        shutil.copytree(start, run_dir.with_suffix(".part"), dirs_exist_ok=True)
        run_dir.with_suffix(".part").rename(run_dir)
    settings = [f"finetune.{key}={value}" for key, value in row.settings.items()]
    weaver("finetune", *common, "--run-dir", run_dir, *set_words(settings))
    weaver("eval", *common, "--run-dir", run_dir, *set_words(EVAL), "--force")


def table(finished: Sequence[Row], runs: Path, sparsity: float) -> str:
    """Quality before and after, side by side."""
    cells = []
    for row in finished:
        before = read_json(runs / f"{row.method}-{sparsity:g}/eval/results.json")
        after = read_json(runs / row.folder / "eval/results.json")
        summary = read_json(runs / row.folder / "finetune/manifest.json")["summary"]
        dense = after["dense"]["perplexity"]
        gap = (after["moe"]["perplexity"] - dense) / (before["moe"]["perplexity"] - dense)
        guarded = {each["step"]: each["kl"] for each in summary["evaluations"]}
        cells.append(
            (
                row.method,
                row.name,
                f"{summary['tokens']:,}",
                f"{summary['seconds'] / 60:.1f}",
                f"{before['kl']:.3f} -> {after['kl']:.3f}",
                f"{1 - after['kl'] / before['kl']:.0%}",
                f"{before['moe']['perplexity']:.1f} -> {after['moe']['perplexity']:.1f}",
                f"{1 - gap:.0%}",
                f"{guarded[0]:.3f} -> {guarded[summary['best_step']]:.3f}",
                f"{_flops(before):.3f} -> {_flops(after):.3f}",
            )
        )
    headers = (
        *("start", "fine-tuning", "tokens", "minutes", "KL", "KL closed"),
        *("perplexity", "gap to dense closed", "KL, guard's text", "FFN FLOPs, measured"),
    )
    return markdown_table(headers, cells)


def _flops(results: dict[str, Any]) -> float:
    measured = results["measured_ffn_flops_per_token"]
    return float(measured / results["dense"]["ffn_flops_per_token"])


def main() -> None:
    """Run the rows and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--out", type=Path, default=Path("docs/recovery.md"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", nargs="+", help="Only these folders.")
    parser.add_argument("--finished", action="store_true", help="Run nothing; finished rows only.")
    arguments = parser.parse_args()
    wikitext = split_text(arguments.data_dir, arguments.runs / "texts")
    table_rows = rows(arguments.steps, wikitext)
    chosen = [row for row in table_rows if not arguments.rows or row.folder in arguments.rows]
    if not arguments.finished:
        for row in chosen:
            run_row(row, arguments.runs, arguments.data_dir, arguments.sparsity)
    finished = [row for row in chosen if (arguments.runs / row.folder / "eval").exists()]
    found = table(finished, arguments.runs, arguments.sparsity)
    if arguments.rows:
        print(found)
    else:
        arguments.out.write_text(
            f"{HEADER.format(steps=arguments.steps, longer=LONGER['steps'])}\n{found}\n"
        )


HEADER = """# Recovery by a short fine-tuning

Made by `scripts/make_recovery.py` (`make recovery DATA_DIR=...`) on SmolLM2-135M with half of the
FFN's neurons active. Every conversion starts from the same calibration (16,384 tokens of
instructions and of ten domains) and is trained on the same windows in the same order, {steps} steps
of 4 of 256 tokens, drawn from the validation split of WikiText-2 and from the instructions, about
as much of each. The row "longer" is {longer} steps of one window of 1,024 tokens, at half the rate,
on the validation split alone. The published amount is 4.2 million tokens. Quality is measured on 8
windows of 1,024 tokens of the raw WikiText-2 test split, which neither calibration nor training nor
the choice of the best weights has seen. "Closed": by how much KL, and the difference of the
perplexity from the dense one, sank. "KL, guard's text": on the windows on which the best weights
are chosen, of the bundled held-out text; in the row "longer", of the end of the validation split,
which is not trained on. "FFN FLOPs": what the measured tokens cost, over the dense FFN's.
Minutes are those of the training's steps on two cores.
"""

if __name__ == "__main__":
    main()
