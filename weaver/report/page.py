"""One self-contained HTML page about some runs: works offline, in any light, and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

from weaver.report import pictures as draw
from weaver.report.drawing import Picture
from weaver.report.run_facts import NeuronFacts, RunFacts
from weaver.report.runs_table import NOTE, runs_table
from weaver.report.tables import format_bytes, format_number, format_percent, format_seconds

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        key: anchor.
        title: heading.
        intro: one or two sentences.
        pictures: of it.
        empty: what to do to get pictures, where there are none.
    """

    key: str
    title: str
    intro: str
    pictures: Sequence[Picture]
    empty: str = ""


def report_page(runs: Sequence[RunFacts]) -> str:
    """The page, as HTML.

    Args:
        runs: at least one; the first is what the others are compared with.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    source = files("weaver") / "resources" / TEMPLATE
    headers, rows = runs_table([run.compared for run in runs])
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        runs=runs,
        sentences=[_sentence(run) for run in runs],
        headers=["", *(run.name for run in runs)],
        folders=headers[1:],
        rows=rows,
        note=NOTE,
        sections=sections(runs),
        texts=[(run.name, _texts(run)) for run in runs],
        stages=[(run.name, _stages(run)) for run in runs],
        settings=[(run.name, _settings(run)) for run in runs],
    )


def sections(runs: Sequence[RunFacts]) -> list[Section]:
    """Sections with pictures, in their order."""
    known: dict[str, NeuronFacts] = {run.neurons.digest: run.neurons for run in runs if run.neurons}
    return [
        Section(
            "quality",
            "Quality against cost",
            "A conversion trades quality for speed. Perplexity says how surprised a model is by "
            "text that it has not seen, divided here by the dense model's: 1 is no loss.",
            draw.quality_pictures(runs),
        ),
        Section(
            "layers",
            "Layer by layer",
            "Every layer of the model was split by itself; these are its experts and its router.",
            draw.layer_pictures(runs),
        ),
        Section(
            "balance",
            "Load balance",
            "How evenly the experts are used on the evaluated text.",
            draw.balance_pictures(runs),
            "No run has routed experts.",
        ),
        Section(
            "domains",
            "Experts and domains",
            "Whether experts specialise in kinds of text: the calibration's tokens, routed once "
            "more and counted by the data set that they are from.",
            draw.domain_pictures(runs),
            "No run has routed experts and a calibration of several groups of text that is still "
            "on disk.",
        ),
        Section(
            "neurons",
            "Neurons before the conversion",
            "What the calibration saw of the dense model: the reason why splitting works.",
            draw.neuron_pictures(list(known.values())) if known else [],
            "The calibration is no longer on disk.",
        ),
        Section(
            "stability",
            "Stability of the split",
            "How much the split depends on which text calibrated it.",
            draw.stability_pictures(runs),
            "Not measured: weaver eval --run-dir RUN --router --force measures it.",
        ),
        Section(
            "affinity",
            "Domain affinity",
            "Of the method dive, which makes an expert per cluster of domains.",
            draw.affinity_pictures(runs),
            "No run was made by dive.",
        ),
        Section(
            "training",
            "Fine-tuning",
            "What training after the conversion won back.",
            draw.training_pictures(runs),
            "No run was fine-tuned.",
        ),
        Section(
            "time",
            "Time",
            "What the conversion itself cost.",
            [draw.time_picture(runs)],
        ),
    ]


def _sentence(run: RunFacts) -> str:
    """A run in one sentence."""
    compared = run.compared
    speeds = ", ".join(
        f"{'' if speedup >= 1 else 'only '}{speedup:.2f} times as fast in {phase} tokens"
        for phase, speedup in compared.speedups.items()
    )
    return (
        f"{compared.method} skips {format_percent(compared.ffn_sparsity)} of the FFN neurons per "
        f"token: perplexity {format_number(compared.dense_perplexity)} becomes "
        f"{format_number(compared.perplexity)}, and both models put the same token first at "
        f"{format_percent(compared.top1_agreement)} of the positions"
        + (f"; {speeds}, measured on {compared.device}." if speeds else "; speed was not measured.")
    )


def _texts(run: RunFacts) -> list[tuple[str, str, str]]:
    test = run.assembled.smoke_test
    return [(each.prompt, each.dense, each.converted) for each in getattr(test, "texts", ())]


def _stages(run: RunFacts) -> list[tuple[str, ...]]:
    return [
        (
            stage,
            format_seconds(each.seconds),
            format_bytes(each.peak_memory_bytes),
            each.finished_at,
            each.digest,
        )
        for stage, each in run.manifests.items()
    ]


def _settings(run: RunFacts) -> list[tuple[str, str]]:
    """Every setting, input and version of every stage, as YAML."""
    return [
        (
            stage,
            yaml.safe_dump(
                {
                    **each.request.model_dump(mode="json"),
                    "dtype": each.dtype,
                    "versions": each.versions,
                    "git_commit": each.git_commit,
                },
                sort_keys=False,
                allow_unicode=True,
            ),
        )
        for stage, each in run.manifests.items()
    ]
