"""Which conversions docs/results.md compares: calibration text, measured text and rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from weaver.config.sections import CalibrateConfig, EvalConfig, PartitionConfig, RouterConfig

RUNS = Path("runs/results")
SPARSITIES = (0.25, 0.5)
PUBLISHED = ("flap", "cmoe", "expertweaver")
TOP_K = {"selection": "top-k"}
STOCK = RouterConfig(constants=False)
REFIT = RouterConfig(refit=True, constants=True)


@dataclass(frozen=True)
class Row:
    """One run: how it differs from the others.

    Args:
        name: part of the label and of the run directory's name.
        partition: how FFNs are split.
        router: router and compensation.
        seed: of calibration and partition.
    """

    name: str
    partition: PartitionConfig
    router: RouterConfig = field(default_factory=RouterConfig)
    seed: int = 0

    @property
    def label(self) -> str:
        """Label of the run in the table's first column: the name, and the seed unless it is 0."""
        return f"{self.name}, seed {self.seed}" if self.seed else self.name

    @property
    def folder(self) -> str:
        """Name of the run directory."""
        parts = [self.name.replace(" ", "-").replace(",", ""), f"{self.partition.sparsity:g}"]
        return "-".join(parts + ([f"seed{self.seed}"] if self.seed else []))


@dataclass(frozen=True)
class Setting:
    """One table.

    Args:
        base: folder of everything that is run on one model.
        name: what ``--settings`` takes.
        group: folder of its runs; tables with the same texts share it, and with it their rows.
        calibration: name of the calibration; groups may share one.
        title: heading of the table.
        calibrate: text that calibrates.
        evaluate: text that is measured.
        rows: the runs.
    """

    base: Path
    name: str
    group: str
    calibration: str
    title: str
    calibrate: CalibrateConfig
    evaluate: EvalConfig
    rows: tuple[Row, ...]

    def run_dir(self, row: Row) -> Path:
        """Run directory of a row."""
        return self.base / self.group / row.folder

    def calibration_dir(self, row: Row) -> Path:
        """Run directory of the calibration that rows of one seed share."""
        return self.base / f"calibrate-{self.calibration}-{row.seed}"


def settings(base: Path) -> list[Setting]:
    """The tables of docs/results.md, with their runs below ``base``."""
    valid, test = (str(base / f"{split}.jsonl") for split in ("valid", "test"))
    tokenised = CalibrateConfig(data=(valid,), tokens=16384, sequence_length=512)
    mixture = CalibrateConfig(data=("multitask_calib/open.jsonl", "domains"), tokens=16384)
    split = EvalConfig(data=(test,), sequence_length=512, windows=12, dtype="float32")
    raw = EvalConfig(data=("wikitext2/wiki.test.rebuilt.raw",), sequence_length=2048, windows=14)
    few = raw.model_copy(update={"windows": 4})
    report = few.model_copy(update={"router": True})
    matched = partial(
        Setting, base=base, group="matched", calibration="matched", calibrate=tokenised
    )
    main = partial(Setting, base=base, calibration="main", calibrate=mixture)
    return [
        matched(
            name="matched",
            title="Calibration on WikiText-2 valid, measured on its test split",
            evaluate=split,
            rows=(
                *_compared(0.25),
                ONE_SLICE_LESS,
                *_compared(0.5),
            ),
        ),
        matched(name="elements", title="Elements of weave", evaluate=split, rows=_elements(0.5)),
        main(
            name="main",
            group="main",
            title="Multi-task and multi-domain calibration, raw WikiText-2 test",
            evaluate=raw,
            rows=(*main_rows(0.25), ONE_SLICE_LESS, *main_rows(0.5)),
        ),
        main(
            name="seeds",
            group="seeds",
            title="Three samples of the same mixture",
            evaluate=few,
            rows=tuple(
                Row(name, _published(name, 0.5).partition, seed=seed)
                for seed in (0, 1, 2)
                for name in ("weave", "flap")
            ),
        ),
        main(
            name="router",
            group="router",
            title="Routers and stability, as weaver eval --router reports them",
            evaluate=report,
            rows=(
                weave("weave", 0.5),
                weave("weave, top-k", 0.5, options=TOP_K),
                _published("cmoe", 0.5),
            ),
        ),
    ]


def main_rows(sparsity: float) -> tuple[Row, ...]:
    """weave in both forms, the published methods, and FLAP with what it can take of weave."""
    return (
        weave("weave", sparsity),
        _stock(sparsity),
        *_static(sparsity),
        *(_published(name, sparsity) for name in PUBLISHED),
    )


def weave(name: str, sparsity: float, router: RouterConfig | None = None, **values: Any) -> Row:
    """weave with some values of its partition changed."""
    partition = PartitionConfig(method="weave", sparsity=sparsity, **values)
    return Row(name, partition, router or RouterConfig())


# Below the FLOPs of every other row at 25%, the threshold's drift and the router included.
ONE_SLICE_LESS = weave("weave, one slice less", 0.3125)


def _published(method: str, sparsity: float) -> Row:
    return Row(method, PartitionConfig(method=method, sparsity=sparsity, sequential=True))


def _stock(sparsity: float) -> Row:
    """The form that a stock architecture holds, as configs/smollm2-weave-stock.yaml has it."""
    return weave("weave, stock, 64 experts", sparsity, STOCK, options=TOP_K, num_experts=64)


def _static(sparsity: float) -> tuple[Row, ...]:
    """FLAP with weave's refit and treatment of first tokens, budgets equal and by predicted KL."""
    static = PartitionConfig(method="flap", sparsity=sparsity, sequential=True)
    return (
        Row("flap, refit", static, REFIT),
        Row("flap, refit, fisher", static.model_copy(update={"allocation": "fisher"}), REFIT),
    )


def _compared(sparsity: float) -> tuple[Row, ...]:
    """weave and its variants beside the published methods and the strongest static baseline."""
    return (
        weave("weave", sparsity),
        weave("weave, 8 experts", sparsity, num_experts=8),
        weave("weave, top-k", sparsity, options=TOP_K),
        weave("weave, stock", sparsity, STOCK, options=TOP_K),
        _stock(sparsity),
        *_static(sparsity),
        *(_published(name, sparsity) for name in ("flap", "cmoe")),
    )


def _elements(sparsity: float) -> tuple[Row, ...]:
    """weave with one element changed at a time."""
    return (
        weave("weave", sparsity),
        weave("weave, fisher", sparsity, allocation="fisher"),
        weave("no refit", sparsity, RouterConfig(refit=False)),
        weave("no constants", sparsity, RouterConfig(constants=False)),
        weave("one-shot", sparsity, sequential=False),
        weave("no alternation", sparsity, options={"alternations": 0}),
        weave("half shared", sparsity, options={"shared_share": 0.5}),
        weave("64 experts", sparsity, num_experts=64),
        weave("weave, top-k", sparsity, options=TOP_K),
        weave("mean-gate router, top-k", sparsity, RouterConfig(kind="mean-gate"), options=TOP_K),
    )
