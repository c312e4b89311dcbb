"""Pictures of a report: which facts of which runs, and how each is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from weaver.report.drawing import (
    Axes,
    Curve,
    HeatScale,
    Picture,
    Point,
    bars,
    curves,
    heat_map,
    points,
)
from weaver.report.run_facts import DomainUsage, NeuronFacts, RunFacts

Runs = Sequence[RunFacts]
LAYER = "layer, from input to output"


def quality_pictures(runs: Runs) -> list[Picture]:
    """Quality against measured speed of each phase, against FLOPs, and by position."""
    pictures = []
    for phase in dict.fromkeys(name for run in runs for name in run.compared.speedups):
        timed = {
            run.name: (speeds[phase], _ratio(run)) if phase in speeds else None
            for run in runs
            for speeds in (run.compared.speedups,)
        }
        title = f"Quality against speed, {phase} tokens"
        pictures.append(
            points(
                title,
                Axes("speed-up over dense, measured (x)", "perplexity over dense's", y_log=True),
                "Right is faster, down is better: the open circle is the dense model, 1 times its "
                "own speed and perplexity, and no run beats those on the line in both.",
                timed,
                best=_frontier(timed, faster=True),
                reference={"dense": (1.0, 1.0)},
            )
        )
    cost: dict[str, Point | None] = {
        run.name: (100 * run.compared.ffn_flops, _ratio(run)) for run in runs
    }
    pictures.append(
        points(
            "Quality against work",
            Axes("FFN FLOPs, measured (% of dense)", "perplexity over dense's", y_log=True),
            "Left is less arithmetic, down is better; unlike times, FLOPs are the same on every "
            "machine.",
            cost,
            best=_frontier(cost, faster=False),
            reference={"dense": (100.0, 1.0)},
        )
    )
    by_position = {
        run.name: Curve([(part.first, max(part.kl, 1e-6)) for part in run.quality.kl_by_position])
        for run in runs
    }
    pictures.append(
        curves(
            "Lost quality by position in the text",
            Axes(
                "first position of a range (tokens)",
                "KL to dense (nats/token)",
                x_log=True,
                y_log=True,
            ),
            "Each mark is the mean loss of the positions that begin there; lower is better.",
            by_position,
            marks=True,
        )
    )
    return pictures


def _ratio(run: RunFacts) -> float:
    return math.exp(run.compared.nll_increase.mean)


def _frontier(places: Mapping[str, Point | None], *, faster: bool) -> list[str]:
    """Names that no other beats in both values; y is better where it is low."""
    sign = -1 if faster else 1
    there = {name: (sign * place[0], place[1]) for name, place in places.items() if place}
    return [
        name
        for name, (x, y) in there.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in there.values())
    ]


def layer_pictures(runs: Runs) -> list[Picture]:
    """Layer by layer: how FFNs were split, and how good their routers are."""
    share, percent = (0.0, None), (0.0, 100.0)
    found = [
        _by_layer(
            "Shared experts",
            Axes(LAYER, "shared neurons (%)", y_range=percent),
            "Neurons that run for every token; where a line is high, the layer leaves little to "
            "choose.",
            runs,
            lambda run: [(row.layer, 100 * row.shared_share) for row in run.split.layers],
        ),
        _by_layer(
            "Active neurons",
            Axes(LAYER, "active neurons (%)", y_range=percent),
            "The budget of each layer, shared and routed together: a flat line gives all layers "
            "the same.",
            runs,
            lambda run: [(row.layer, 100 * (1 - row.sparsity)) for row in run.split.layers],
        ),
        _experts_per_token(runs),
        _by_layer(
            "Agreement of the router with the oracle",
            Axes(LAYER, "agreement (% of chosen)", y_range=percent),
            "The oracle knows the experts' outputs and takes the largest; dotted lines are a "
            "router that guesses.",
            runs,
            lambda run: [(row.layer, 100 * row.oracle_agreement) for row in run.routers.layers],
            lambda run: [(row.layer, 100 * row.chance_agreement) for row in run.routers.layers],
        ),
        _by_layer(
            "Captured contribution",
            Axes(LAYER, "captured (% of oracle's)", y_range=(None, 100.5)),
            "How much of what the best choice of experts would add to the output the router's "
            "choice adds; 100% is as good as knowing.",
            runs,
            lambda run: [
                (row.layer, 100 * row.captured_contribution) for row in run.routers.layers
            ],
        ),
        _by_layer(
            "Error of the FFN's output",
            Axes(LAYER, "relative squared error", y_log=True),
            "Squared error of each layer's output over its squared size, at its last positions; "
            "lower is better.",
            runs,
            lambda run: [(row.layer, row.errors[-1].error) for row in run.routers.layers],
        ),
        _by_layer(
            "Predicted loss",
            Axes(LAYER, "predicted KL (nats/token)", y_range=share),
            "What each layer alone is predicted to cost the whole model, before it was converted.",
            runs,
            lambda run: list(enumerate(run.predicted_kl or ())),
        ),
    ]
    return [picture for picture in found if picture is not None]


def _experts_per_token(runs: Runs) -> Picture | None:
    return _by_layer(
        "Experts that run per token",
        Axes(LAYER, "routed experts per token", y_range=(0.0, None)),
        "Counted on the evaluated text; dotted is what the layer was set to. With a threshold the "
        "two may differ.",
        runs,
        lambda run: [(row.layer, row.experts_per_token) for row in run.quality.expert_usage],
        lambda run: [(row.layer, row.top_k) for row in run.split.layers if row.experts],
    )


def _by_layer(
    title: str,
    axes: Axes,
    reading: str,
    runs: Runs,
    values: Callable[[RunFacts], Sequence[Point]],
    reference: Callable[[RunFacts], Sequence[Point]] | None = None,
) -> Picture | None:
    """A line per run, of the means where a layer has several FFNs; None if no run has a value."""
    series = {run.name: Curve(_means(values(run))) for run in runs}
    if not any(curve.points for curve in series.values()):
        return None
    if reference is not None:
        for run in runs:
            if series[run.name].points:
                name = f"{run.name}, dotted"
                series[name] = Curve(_means(reference(run)), reference=True, like=run.name)
    return curves(title, axes, reading, series)


def _means(points_: Sequence[Point]) -> list[Point]:
    groups: dict[float, list[float]] = {}
    for x, y in points_:
        groups.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(groups.items())]


def balance_pictures(runs: Runs) -> list[Picture]:
    """Load of the experts: its variation by layer, and every expert of every layer."""
    found = _by_layer(
        "Load balance",
        Axes(LAYER, "std / mean of loads", y_range=(0.0, None)),
        "Standard deviation over mean of how often the experts of a layer run on the evaluated "
        "text: 0 means equally often.",
        runs,
        lambda run: [(row.layer, row.coefficient_of_variation) for row in run.quality.expert_usage],
    )
    pictures = [found] if found else []
    for run in runs:
        usage = [row for row in run.quality.expert_usage if row.num_routed_experts > 1]
        if not usage:
            continue
        width = max(row.num_routed_experts for row in usage)
        loads = [
            [
                *(100 * share for share in sorted(row.token_share, reverse=True)),
                *[math.nan] * (width - row.num_routed_experts),
            ]
            for row in usage
        ]
        pictures.append(
            heat_map(
                f"Load of every expert, {run.name}",
                Axes("expert, busiest first", "routed FFN, from input to output"),
                "A row is a layer: an even colour is a balanced layer, a bright left end a few "
                "busy experts; grey cells are experts that the layer does not have.",
                loads,
                HeatScale("tokens that run it (%)", 0.0, max(map(max, _finite(loads)))),
            )
        )
    return pictures


def _finite(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[value for value in row if not math.isnan(value)] for row in rows]


def domain_pictures(runs: Runs) -> list[Picture]:
    """Experts by the domains of the calibration text."""
    found = _by_layer(
        "Specialisation of experts",
        Axes(LAYER, "information (nats)", y_range=(0.0, None)),
        "0 means that all domains use the experts alike; the higher, the more a chosen expert "
        "tells about the domain of the text.",
        runs,
        lambda run: (
            list(
                zip(
                    (row.layer for row in run.split.layers if row.experts),
                    run.domains.information,
                    strict=True,
                )
            )
            if run.domains
            else []
        ),
    )
    pictures = [found] if found else []
    pictures += [_domains(run.name, run.domains) for run in runs if run.domains]
    return pictures


def _domains(name: str, usage: DomainUsage) -> Picture:
    ratios = [
        [
            max(-2.0, min(2.0, math.log2(max(share, 1e-9) / overall))) if overall else math.nan
            for share, overall in zip(row, usage.overall, strict=True)
        ]
        for row in usage.shares
    ]
    return heat_map(
        f"Experts by domain, {name}, layer {usage.layer}",
        Axes("expert", "domain of the calibration text"),
        "A row is a domain: purple experts run up to 4 times as often there as on all text, orange "
        "ones as rarely, white ones as usual, grey ones never; domains differ most in this layer.",
        ratios,
        HeatScale("doublings of the load", -2.0, 2.0, diverging=True),
        y_names=usage.groups,
    )


def neuron_pictures(facts: Sequence[NeuronFacts]) -> list[Picture]:
    """Activation rates and their variation, of every calibration that the runs used."""
    labels = [f"calibration {each.digest[:8]}" for each in facts]
    edges = facts[0].histogram[0]
    middles = [edges[1] / 2, *(math.sqrt(a * b) for a, b in pairwise(edges[1:]))]
    rates = {
        label: Curve(
            [(math.log2(x), 100 * y) for x, y in zip(middles, each.histogram[1], strict=True)]
        )
        for label, each in zip(labels, facts, strict=True)
    }
    pictures = [
        curves(
            "Activation rates of the neurons",
            Axes("log2 of the share of tokens that mark the neuron", "neurons (%)"),
            f"Each token marks its {facts[0].top_k} most active neurons; those on the right are "
            "marked by nearly every token, which is why some are shared and the others routed.",
            rates,
            marks=True,
        ),
        curves(
            "Variation of activation rates",
            Axes(LAYER, "std / mean of rates", y_range=(0.0, None)),
            "Standard deviation over mean of the rates in each layer: the higher, the more a few "
            "neurons do most of the work.",
            {
                label: Curve(list(enumerate(each.rate_variation)))
                for label, each in zip(labels, facts, strict=True)
            },
        ),
    ]
    if facts[0].specialised:
        pictures.append(
            curves(
                "Specialised neurons",
                Axes(LAYER, "specialised neurons (%)", y_range=(0.0, 100.0)),
                "Share of neurons whose gate differs between groups of text by more than "
                f"{facts[0].tau:g} of its mean; ExpertWeaver shares fewer where it is high.",
                {
                    label: Curve([(i, 100 * share) for i, share in enumerate(each.specialised)])
                    for label, each in zip(labels, facts, strict=True)
                },
            )
        )
    return pictures


def stability_pictures(runs: Runs) -> list[Picture]:
    """Two splits from halves of the calibration text, where ``eval --router`` has compared them."""

    def overlap(field: str) -> Callable[[RunFacts], Sequence[Point]]:
        return lambda run: [
            (row.layer, getattr(row, field))
            for row in (run.quality.router.layers if run.quality.router else ())
            if getattr(row, field) is not None
        ]

    found = [
        _by_layer(
            title,
            Axes(LAYER, "overlap (Jaccard index)", y_range=(0.0, 1.0)),
            f"The {what} of two splits, each from half of the calibration text: 1 means that the "
            "same neurons went together.",
            runs,
            overlap(field),
        )
        for title, field, what in (
            ("Stability of the experts", "expert_jaccard", "routed experts"),
            ("Stability of the shared neurons", "shared_jaccard", "shared or kept neurons"),
        )
    ]
    return [picture for picture in found if picture is not None]


def affinity_pictures(runs: Runs) -> list[Picture]:
    """Domain affinity and the tree of its clusters, of methods that prune by groups."""
    from scipy.cluster.hierarchy import leaves_list

    pictures = []
    for run in runs:
        if run.affinity is None:
            continue
        order = [int(i) for i in leaves_list(run.affinity.linkage_M4.numpy())]
        values = run.affinity.normalised_GG
        names = [run.affinity.groups[i] for i in order]
        pictures.append(
            heat_map(
                f"Domain affinity, {run.name}",
                Axes("domain that it was measured on", "domain that pruned the model"),
                "1 is the pruned model with the lowest perplexity on a domain; the tree on the "
                "right joins domains that prune alike, and each cluster became an expert.",
                [[float(values[i, j]) for j in order] for i in order],
                HeatScale(
                    "lowest perplexity over it", float(values.min()), 1.0, cells="{:.2f}".format
                ),
                x_names=names,
                y_names=names,
                tree=run.affinity.linkage_M4.numpy(),
            )
        )
    return pictures


def training_pictures(runs: Runs) -> list[Picture]:
    """Losses of fine-tunings, and the KL on held-out text."""
    tuned = {run.name: run.finetuned for run in runs if run.finetuned}
    if not tuned:
        return []
    losses = {name: Curve(list(enumerate(each.losses, start=1))) for name, each in tuned.items()}
    held_out = {
        name: Curve([(point.step, point.kl) for point in each.evaluations])
        for name, each in tuned.items()
    }
    return [
        curves(
            "Training loss",
            Axes("training step", "loss (nats/token)"),
            "The loss on each step's text; it should fall and not jump.",
            losses,
        ),
        curves(
            "Recovered quality",
            Axes("training step", "held-out KL (nats/token)"),
            "Step 0 is the conversion before training; the weights of the lowest point are kept.",
            held_out,
            marks=True,
        ),
    ]


def time_picture(runs: Runs) -> Picture:
    """Wall-clock seconds of the stages."""
    return bars(
        "Where the time went",
        Axes("seconds, wall clock", "run"),
        "One bar per run, one colour per stage, as the command that finished each took; a "
        "calibration that runs share is counted in each.",
        {run.name: {stage: each.seconds for stage, each in run.manifests.items()} for run in runs},
    )
