"""``pareto``: the predicted quality and speed of several layouts, none of them written.

Every layout gives each layer the same number of active neurons; its layers are converted one by one
on the dense model's profiles, also where the method itself is sequential.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.conversion.layer_budgets import refuse_experts
from weaver.conversion.partition_settings import resolve_settings
from weaver.conversion.splitter import LayerSplitter
from weaver.conversion.trials import Trial, try_layers
from weaver.errors import WeaverError
from weaver.methods.allocation import active_neurons
from weaver.models.forecast import SPEED_TOKENS, predicted_speedup
from weaver.rundir.converted_model import account_of
from weaver.rundir.inputs import open_calibration
from weaver.rundir.stage_run import StageContext

# Ne that are compared, besides the configured one.
NUM_EXPERTS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Forecast:
    """Predicted KL, FLOPs and speed-ups of one layout.

    Args:
        num_experts: Ne, slices of the FFN, shared ones counted in.
        expert_width: N.
        active_neurons: A of every layer.
        sparsity: 1 - A / F, as near to the configured one as whole slices come.
        predicted_kl: sum of the layers' predicted KL, nats per token.
        flops_ratio: FFN FLOPs over the dense ones, router included.
        speedups: predicted dense seconds over converted ones at each of ``SPEED_TOKENS``.
        optimal: see ``pareto_optimal``.
    """

    num_experts: int
    expert_width: int
    active_neurons: int
    sparsity: float
    predicted_kl: float
    flops_ratio: float
    speedups: tuple[float, ...]
    optimal: bool = False


def forecast_layouts(
    context: StageContext,
    config: PartitionConfig,
    router: RouterConfig,
    calibration_folder: Path | None = None,
) -> list[Forecast]:
    """Try the configured method with several numbers of experts, all layers of equal size.

    Layouts that cannot be made are left out; ``context.say`` gets a line about each. Nothing is
    written.

    Args:
        context: run directory, seed, progress.
        config: method, sparsity, width multiple and options; of the allocation and of sequential
            profiles nothing is predicted.
        router: router and compensation.
        calibration_folder: a calibrate folder of another run; default: this run's own.
    Returns:
        The layouts by ascending Ne.
    Raises:
        WeaverError: the method is static, there is no finished calibration or only one window of
            it, the model has experts already, unknown method or options, or no layout can be made.
    """
    settings = resolve_settings(config, router)
    spec = settings.spec
    if spec.is_static:
        raise WeaverError(
            f"method {spec.name} is static",
            why="pareto compares numbers of experts, and a static method has none",
            fix="--method weave, whose experts are slices",
        )
    if spec.prunes_groups:
        raise WeaverError(
            f"method {spec.name} has experts of one width, whatever their number",
            why="pareto compares slices of the FFN of different widths",
            fix="--method weave, whose experts are slices",
        )
    calibration = open_calibration(
        calibration_folder or context.folder("calibrate"),
        trust_remote_code=context.trust_remote_code,
    )
    refuse_experts(calibration.checkpoint, "pareto", "leave it out")
    configured = settings.config.num_experts
    assert configured is not None
    found: list[Forecast] = []
    refused: dict[int, WeaverError] = {}
    layouts: list[tuple[LayerSplitter, int]] = []
    for count in sorted({*NUM_EXPERTS, configured}):
        layout = settings.config.model_copy(update={"num_experts": count})
        with _skipping_refused(context, count, refused):
            splitter = LayerSplitter(calibration, replace(settings, config=layout), context.seed)
            layouts.append((splitter, _uniform(splitter)))
    if layouts:
        trial = Trial.prepare(context, calibration)
        for splitter, active in layouts:
            with _skipping_refused(context, splitter.num_experts, refused):
                found.append(_forecast(context, splitter, trial, active))
    if not found:
        raise _nothing_fits(refused)
    optimal = pareto_optimal([(row.predicted_kl, row.speedups) for row in found])
    return [replace(row, optimal=mark) for row, mark in zip(found, optimal, strict=True)]


def pareto_optimal(points: Sequence[tuple[float, Sequence[float]]]) -> list[bool]:
    """Which points no other one dominates.

    A point dominates another if its error is not higher and none of its speed-ups is lower, and if
    the two differ.

    Args:
        points: error and speed-ups of each.
    """
    gains = [(-error, *speedups) for error, speedups in points]
    return [
        not any(
            other != own and all(theirs >= ours for theirs, ours in zip(other, own, strict=True))
            for other in gains
        )
        for own in gains
    ]


@contextmanager
def _skipping_refused(
    context: StageContext, count: int, refused: dict[int, WeaverError]
) -> Iterator[None]:
    """A layout that cannot be made is said and kept in ``refused``; the others go on."""
    try:
        yield
    except WeaverError as error:
        refused[count] = error
        context.say(f"{count} experts left out: {error.what}")


def _uniform(splitter: LayerSplitter) -> int:
    size, sparsity = splitter.checkpoint.intermediate_size, splitter.config.sparsity
    return active_neurons(size, splitter.num_experts, splitter.width, sparsity)


def _forecast(
    context: StageContext, splitter: LayerSplitter, trial: Trial, active: int
) -> Forecast:
    checkpoint = splitter.checkpoint
    title = f"pareto: {splitter.num_experts} experts"
    tried = [row[0] for row in try_layers(context, splitter, trial, [active], title)]
    shapes = [layer.shape for layer in tried]
    account = account_of(checkpoint, shapes)
    sizes = (checkpoint.hidden_size, checkpoint.intermediate_size, checkpoint.dtype)
    return Forecast(
        num_experts=splitter.num_experts,
        expert_width=splitter.width,
        active_neurons=active,
        sparsity=1.0 - active / checkpoint.intermediate_size,
        predicted_kl=sum(layer.predicted_kl for layer in tried),
        flops_ratio=account.ffn_flops / account.dense_ffn_flops,
        speedups=tuple(predicted_speedup(shapes, *sizes, tokens) for tokens in SPEED_TOKENS),
    )


def _nothing_fits(refused: dict[int, WeaverError]) -> WeaverError:
    counts = ", ".join(str(count) for count in sorted(refused))
    first = refused[max(refused)]
    return WeaverError(
        f"no layout of {counts} experts can be made",
        why=f"{max(refused)} experts: {first.what}",
        fix=first.fix,
    )
