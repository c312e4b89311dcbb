"""The Python interface: a conversion in one call, its stages, and loading the converted model.

Every call takes the lock of its run directory, skips what is finished, and goes on with what was
interrupted, like the commands of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from weaver.artifacts.bench_results import BenchResult
from weaver.artifacts.dtypes import DTYPES
from weaver.artifacts.manifest import StageManifest
from weaver.artifacts.results import EvalResult, Record
from weaver.artifacts.summaries import (
    AssembleSummary,
    CalibrateSummary,
    EvalSummary,
    ExportSummary,
    FinetuneSummary,
    PartitionSummary,
    RouterSummary,
    read_summary,
)
from weaver.config.finetuning import FinetuneConfig
from weaver.config.loading import RunConfig, merge_sections, parse_config
from weaver.config.sections import (
    AssembleConfig,
    BenchConfig,
    CalibrateConfig,
    DtypeName,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    PartitionConfig,
    RouterConfig,
    Section,
)
from weaver.models.device import resolve_device
from weaver.models.intake import load_tokenizer
from weaver.models.loading import load_model
from weaver.report.comparison import HEADERS, comparison_rows
from weaver.report.progress import stage_progress
from weaver.report.tables import markdown_table
from weaver.rundir.measurements import read_bench, read_eval
from weaver.rundir.stage_run import StageContext, no_progress
from weaver.stages.assemble import assemble
from weaver.stages.bench import bench
from weaver.stages.build_router import build_routers
from weaver.stages.calibrate import calibrate
from weaver.stages.evaluate import evaluate
from weaver.stages.export import export, plan_export
from weaver.stages.finetune import finetune
from weaver.stages.generate import model_folder
from weaver.stages.partition import partition
from weaver.stages.pipeline import conversion_calls, run_pipeline

if TYPE_CHECKING:
    from weaver.models.loading import CausalLM

RunDir = str | PathLike[str]
S = TypeVar("S", bound=Section)
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Run:
    """A run directory: what its stages need besides their options.

    Args:
        path: the directory, with one folder per stage.
        seed: root of all randomness.
        data_dir: where data files are looked for after the current folder.
        progress: show the progress of stages on standard error.
        force: make a stage again; its new result takes the place of what its folder holds.
        trust_remote_code: let the dense model's own code run.
        device: where stages compute: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """

    path: Path
    seed: int = 0
    data_dir: Path | None = None
    progress: bool = True
    force: bool = False
    trust_remote_code: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        # Frozen, and yet a text is as good as a path.
        object.__setattr__(self, "path", Path(self.path))
        if self.data_dir is not None:
            object.__setattr__(self, "data_dir", Path(self.data_dir))

    def calibrate(
        self, model: str | PathLike[str] | ModelConfig, **options: Any
    ) -> CalibrateSummary:
        """Stream text through a dense model and keep statistics of every FFN.

        Args:
            model: a folder, a ``.gguf`` file, a hub name, or one of them with its revision and
                dtype.
            options: fields of ``CalibrateConfig``.
        """
        dense = model
        if not isinstance(dense, ModelConfig):
            dense = ModelConfig(path=str(model), trust_remote_code=self.trust_remote_code)
        config = _section(CalibrateConfig, options)
        return self._stage(CalibrateSummary, "calibrate", lambda c: calibrate(c, dense, config))

    def partition(self, *, calibration: Path | None = None, **options: Any) -> PartitionSummary:
        """Divide the neurons of every FFN between a shared expert and routed ones.

        Args:
            calibration: a calibrate folder of another run, instead of this one's.
            options: fields of ``PartitionConfig``; ``router``, fields of ``RouterConfig``, which a
                sequential partition propagates.
        """
        router = _section(RouterConfig, options.pop("router", {}))
        config = _section(PartitionConfig, options)
        call = lambda c: partition(c, config, router, calibration)  # noqa: E731
        return self._stage(PartitionSummary, "partition", call)

    def build_router(self, **options: Any) -> RouterSummary:
        """Build a router per layer and solve for refit and constants.

        Args:
            options: fields of ``RouterConfig``.
        """
        config = _section(RouterConfig, options)
        return self._stage(RouterSummary, "build-router", lambda c: build_routers(c, config))

    def assemble(self, **options: Any) -> AssembleSummary:
        """Write the converted model and try it on a few hundred tokens.

        Args:
            options: fields of ``AssembleConfig``.
        """
        config = _section(AssembleConfig, options)
        return self._stage(AssembleSummary, "assemble", lambda c: assemble(c, config))

    def finetune(self, **options: Any) -> FinetuneSummary:
        """Train the converted model for some steps; the summary has losses and evaluations.

        Args:
            options: fields of ``FinetuneConfig``.
        """
        config = _section(FinetuneConfig, options)
        return self._stage(FinetuneSummary, "finetune", lambda c: finetune(c, config))

    def evaluate(self, *, finetuned: bool = True, **options: Any) -> EvalResult:
        """Measure perplexity, KL, agreement and usage against the dense model.

        Args:
            finetuned: measure the fine-tuned model if the run has one.
            options: fields of ``EvalConfig``.
        """
        config = _section(EvalConfig, options)
        self._stage(EvalSummary, "eval", lambda c: evaluate(c, config, finetuned=finetuned))
        return read_eval(self.path)

    def bench(self, *, finetuned: bool = True, **options: Any) -> BenchResult:
        """Time prefill and decoding, dense and converted in turn.

        Args:
            finetuned: time the fine-tuned model if the run has one.
            options: fields of ``BenchConfig``.
        """
        config = _section(BenchConfig, options)
        self._stage(BenchResult, "bench", lambda c: bench(c, config, finetuned=finetuned))
        return read_bench(self.path)

    def export(self, target: str | None = None, out: Path | None = None, **options: Any) -> Path:
        """Write the model for other runtimes.

        Args:
            target: see ``weaver export``; the first that holds the model exactly if left out.
            out: folder to make; ``export-TARGET`` in the run directory if left out.
            options: other fields of ``ExportConfig``.

        Returns:
            The folder.
        """
        config = _section(ExportConfig, {"target": target, **options})
        plan = plan_export(self._context(), config, out)
        self._stage(ExportSummary, "export", lambda c: export(c, plan))
        return plan.folder

    def report(self) -> str:
        """Return dense against converted as a Markdown table, from what eval and bench wrote.

        Raises:
            WeaverError: one of them has not finished.
        """
        return markdown_table(HEADERS, comparison_rows(read_eval(self.path), read_bench(self.path)))

    def _context(self) -> StageContext:
        return StageContext(
            run_dir=self.path,
            seed=self.seed,
            force=self.force,
            data_dir=self.data_dir,
            trust_remote_code=self.trust_remote_code,
            device=resolve_device(self.device),
            progress=stage_progress() if self.progress else no_progress,
        )

    def _stage(self, kind: type[R], name: str, call: Callable[[StageContext], StageManifest]) -> R:
        """Run a stage; its summary."""
        manifests: dict[str, StageManifest] = {}
        run_pipeline(self._context(), {name: call}, manifests.__setitem__)
        return read_summary(kind, manifests[name].summary)


def convert(
    model: str | PathLike[str],
    run_dir: RunDir,
    *,
    sparsity: float | None = None,
    method: str | None = None,
    dtype: DtypeName | None = None,
    calibration: Path | None = None,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> Run:
    """Convert a dense model: the stages from ``calibrate`` to ``assemble`` that are missing.

    Args:
        model: a folder, a ``.gguf`` file or a hub name.
        run_dir: directory of the run; the converted model is its folder ``model``.
        sparsity: share of FFN neurons that a token leaves out on average; 0.25 if left out.
        method: a name of ``weaver partition --method``; ``weave`` if left out.
        dtype: of the computation, by default the checkpoint's. ``float32`` is faster on CPUs
            without 16-bit products.
        calibration: a calibrate folder of another run, which replaces this run's own.
        sections: other values by section, as in a run file:
            ``{"calibrate": {"tokens": 16384}, "partition": {"num_experts": 8}}``.
        settings: seed, data_dir, progress, force, trust_remote_code, device: see ``Run``. What is
            forced is this call alone.

    Returns:
        The run, whose methods measure, train and export the model.

    Raises:
        WeaverError: a value is not allowed, the model or the text cannot be read, or the directory
            holds another conversion.
    """
    run = Run(Path(run_dir), **settings)
    named: dict[str, dict[str, Any]] = {
        "model": {
            "path": str(model),
            "dtype": dtype,
            "trust_remote_code": run.trust_remote_code or None,
        },
        "partition": {"method": method, "sparsity": sparsity},
    }
    values = merge_sections(sections or {}, named)
    config = parse_config(RunConfig, {**values, "seed": run.seed}, source="convert")
    run = replace(run, trust_remote_code=config.model.trust_remote_code)
    run_pipeline(run._context(), conversion_calls(config, calibration), lambda *_: None)
    return replace(run, force=False)


def load(
    source: Run | RunDir, dtype: DtypeName = "auto"
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Load a converted model and its tokenizer for inference.

    Args:
        source: a run, whose fine-tuned model goes before the assembled one; or any model folder.
        dtype: of the weights; ``auto`` as they are stored.

    Raises:
        WeaverError: there is no such model, or it cannot be loaded.
    """
    folder = model_folder(str(source.path if isinstance(source, Run) else Path(source)))
    return load_model(folder, "auto" if dtype == "auto" else DTYPES[dtype]), load_tokenizer(folder)


def _section(section: type[S], values: Mapping[str, Any]) -> S:
    return parse_config(section, dict(values), source=section.__name__)
