"""Domain affinity: the model pruned by each group, measured on the text of all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weaver.algorithms.affinity import column_normalised, correlation_clusters, row_correlation
from weaver.artifacts.affinity import Affinity, AffinityRow
from weaver.artifacts.store import read_record, write_record, write_text
from weaver.artifacts.summaries import AffinitySummary
from weaver.artifacts.types import LayerProfile
from weaver.conversion.splitter import LayerSplitter
from weaver.errors import WeaverError, shell
from weaver.evaluation.perplexity import perplexity
from weaver.methods.base import LayerProblem
from weaver.methods.registry import get_method, resolve_options
from weaver.models.loading import load_model
from weaver.models.moe import MoEFeedForward
from weaver.report.affinity_plot import affinity_plot
from weaver.rundir.inputs import (
    AFFINITY_FOLDER,
    Calibration,
    affinity_path,
    read_held_out,
    read_packed_tokens,
)
from weaver.rundir.stage_run import StageContext, StageRun

PLOT_FILE = "affinity.svg"


def require_groups(calibration: Calibration, method: str, num_experts: int) -> None:
    """Check that a calibration keeps enough groups apart.

    Raises:
        WeaverError: it does not, or there are fewer groups than experts.
    """
    groups = calibration.summary.groups
    if not calibration.config.groups:
        run_dir = calibration.folder.parent
        again = shell("weaver", "calibrate", calibration.identity.path, "--run-dir", run_dir)
        raise WeaverError(
            f"{calibration.folder}: the calibration mixes its {len(groups)} groups",
            why=f"{method} prunes the model for each group of the text",
            fix=f"{again} --groups --force, with text of several groups",
        )
    if num_experts > len(groups):
        raise WeaverError(
            f"{num_experts} experts for {len(groups)} groups: {', '.join(groups)}",
            why="an expert is the model pruned for one group or more",
            fix=f"--num-experts {len(groups)}, or calibrate with text of more groups",
        )


def mine_affinity(
    context: StageContext, run: StageRun, splitter: LayerSplitter, windows: int
) -> Affinity:
    """Perplexity of every pruned model on every group's text, and the groups' experts.

    Row i: all FFNs pruned by FLAP's score with the statistics of group i alone, its bias kept, the
    same sparsity in every layer (DIVE, arXiv:2506.09351, section 3.1). The text is what calibration
    held out of each group; if a group has none, the calibration windows of all groups. A row that
    was measured is read from its file.

    Args:
        context: progress.
        run: the partition stage, whose folder keeps the rows.
        splitter: model, calibration, sparsity and number of experts.
        windows: of each group at most.
    """
    path = affinity_path(run.folder)
    if run.has_file(path):
        return read_record(path, Affinity)
    names = read_packed_tokens(splitter.calibration.folder).groups
    text, windows_GWT = _text(splitter.calibration, windows)
    pruner = _Pruner(splitter)
    with context.progress("partition: affinity", len(names) ** 2) as advance:
        for group, name in enumerate(names):
            row_path = _row_path(run.folder, group)
            if run.has_file(row_path):
                for other in names:
                    advance(f"{name} on {other}")
                continue
            model = pruner.prune(group)
            nll = []
            for other, windows_WT in zip(names, windows_GWT, strict=True):
                losses = perplexity(model, windows_WT)
                nll.append(sum(losses.nll) / len(losses.nll))
                advance(f"{name} on {other}")
            write_record(
                row_path, AffinityRow(torch.tensor(nll, dtype=torch.float64, device="cpu"))
            )
    nll_GG = torch.stack(
        [read_record(_row_path(run.folder, g), AffinityRow).nll_G for g in range(len(names))]
    )
    normalised_GG = column_normalised(nll_GG.exp())
    correlation_GG = row_correlation(normalised_GG)
    linkage_M4, experts_G = correlation_clusters(correlation_GG, splitter.num_experts)
    found = Affinity(
        perplexity_GG=nll_GG.exp(),
        normalised_GG=normalised_GG,
        correlation_GG=correlation_GG,
        linkage_M4=linkage_M4,
        experts_G=experts_G,
        groups_json=json.dumps(list(names), ensure_ascii=False),
        text=text,
        tokens=windows_GWT[0].shape[0] * (windows_GWT[0].shape[1] - 1),
    )
    write_text(path.parent / PLOT_FILE, affinity_plot(found))
    write_record(path, found)
    return found


def affinity_summary(affinity: Affinity) -> AffinitySummary:
    """Return the domain affinity for the summary in the partition's manifest."""
    return AffinitySummary(
        groups=affinity.groups,
        experts=tuple(affinity.experts_G.tolist()),
        perplexity=tuple(
            tuple(round(v, 4) for v in row) for row in affinity.perplexity_GG.tolist()
        ),
        text=affinity.text,
        tokens=affinity.tokens,
    )


def _row_path(folder: Path, group: int) -> Path:
    return folder / AFFINITY_FOLDER / f"row_{group:03d}.safetensors"


def _text(calibration: Calibration, windows: int) -> tuple[str, list[Tensor]]:
    """Choose windows of every group: held-out text, or calibration text if a group has none.

    Args:
        calibration: keeps both.
        windows: of each group at most.

    Returns:
        "held-out" or "calibration", and the windows of each group, int64, (W, T); W is the same for
        all groups with held-out text.
    """
    packed, held_out = read_packed_tokens(calibration.folder), read_held_out(calibration.folder)
    groups = range(len(packed.groups))
    counts = [held_out.of(group).shape[0] for group in groups]
    if min(counts) > 0:
        count = min(windows, *counts)
        return "held-out", [held_out.of(group)[:count] for group in groups]
    group_W = packed.sample_groups_M[packed.sample_ids_WT[:, 0]]
    found = [packed.input_ids_WT[group_W == group] for group in groups]
    return "calibration", [windows_WT[:windows] for windows_WT in found]


class _Pruner:
    """The dense model, whose FFNs are replaced by pruned ones again and again."""

    def __init__(self, splitter: LayerSplitter) -> None:
        self._splitter = splitter
        self._spec = get_method("flap")
        self._options = resolve_options(self._spec, {})
        self._model: PreTrainedModel | None = None
        self._profiles: list[LayerProfile] = []

    def prune(self, group: int) -> PreTrainedModel:
        """The model with every FFN pruned by the statistics of one group."""
        splitter, checkpoint = self._splitter, self._splitter.checkpoint
        model = self._loaded()
        for layer, profile in enumerate(self._profiles):
            assert profile.group_hidden_mean_GF is not None
            assert profile.group_hidden_variance_GF is not None
            own = replace(
                profile,
                hidden_mean_F=profile.group_hidden_mean_GF[group],
                hidden_variance_F=profile.group_hidden_variance_GF[group],
            )
            weights = checkpoint.ffn(layer, torch.float32)
            problem = LayerProblem(layer, weights, own, splitter.uniform_neurons, 0, 0)
            layout = self._spec.partition(problem, self._options, splitter.generator(layer))
            dtype = splitter.calibration.dtype
            ffn = MoEFeedForward.convert(weights.to(dtype), layout, None).to(weights.device)
            decoder_layer = model.get_submodule(f"{checkpoint.family.layers}.{layer}")
            setattr(decoder_layer, checkpoint.family.ffn, ffn)
        return model

    def _loaded(self) -> PreTrainedModel:
        """The model, and the profiles without what pruning does not need."""
        calibration, checkpoint = self._splitter.calibration, self._splitter.checkpoint
        if self._model is None:
            self._model = load_model(
                checkpoint.folder,
                calibration.dtype,
                device=checkpoint.device,
                trust_remote_code=checkpoint.model.trust_remote_code,
            )
            for layer in range(checkpoint.num_layers):
                whole = calibration.profile(layer)
                nothing_n = torch.empty(0, dtype=torch.int64, device="cpu")
                self._profiles.append(whole.keeping(nothing_n))
        return self._model
