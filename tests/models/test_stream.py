"""Layer by layer is the whole model: the same hidden states, whatever lies in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_conversions import OpenTiny, random_layout
from tiny_models import NUM_LAYERS, SLIDING_WINDOW, TINY, random_ids, tiny_model
from torch import Tensor

from weaver.models import stream as stream_module
from weaver.models.checkpoint import Checkpoint
from weaver.models.moe import MoEFeedForward
from weaver.models.stream import DecoderStream, DenseFfn, InputTap

LENGTH = 3 * SLIDING_WINDOW


def streamed(checkpoint: Checkpoint, ids_WT: Tensor, folder: Path) -> list[Tensor]:
    """Hidden states in front of every layer, and behind the last one."""
    stream = DecoderStream(checkpoint, torch.float32, ids_WT)
    hidden_WTD = stream.embed(folder)
    states = [hidden_WTD.clone()]
    for layer in range(checkpoint.num_layers):
        ffn = DenseFfn(checkpoint.ffn(layer, torch.float32))
        stream.run(layer, ffn, hidden_WTD, write=True)
        states.append(hidden_WTD.clone())
    return states


def whole(variant: str, ids_WT: Tensor) -> list[Tensor]:
    """The same of the model of transformers, before its last norm."""
    model = tiny_model(variant)
    states: list[Tensor] = []

    def keep(_module: object, inputs: tuple[Tensor], output: Tensor | tuple[Tensor]) -> None:
        states.append(inputs[0])
        states.append(output[0] if isinstance(output, tuple) else output)

    for layer in range(NUM_LAYERS):
        model.get_submodule(f"model.layers.{layer}").register_forward_hook(keep)
    with torch.no_grad():
        model(ids_WT, use_cache=False)
    return [*states[::2], states[-1]]


@pytest.mark.parametrize("variant", TINY)
def test_hidden_states_of_the_whole_model(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    ids_WT = random_ids(3, LENGTH)
    found, expected = streamed(open_tiny(variant), ids_WT, tmp_path), whole(variant, ids_WT)
    assert len(found) == len(expected) == NUM_LAYERS + 1
    for layer, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=f"layer {layer}")


@pytest.mark.parametrize("variant", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_the_window_matters_at_this_length(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    """Guards the test above: without the sliding window it would compare something else."""
    ids_WT = random_ids(1, LENGTH)
    narrow = streamed(open_tiny(variant), ids_WT, tmp_path)[-1]
    wide = streamed(open_tiny(variant, sliding_window=LENGTH), ids_WT, tmp_path)[-1]
    torch.testing.assert_close(narrow[:, :SLIDING_WINDOW], wide[:, :SLIDING_WINDOW])
    assert (narrow[:, -1] - wide[:, -1]).abs().max() > 1e-2


def test_the_order_of_batches_does_not_matter(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids_WT, checkpoint = random_ids(5, LENGTH), open_tiny("gemma3_text")
    together = streamed(checkpoint, ids_WT, tmp_path)
    monkeypatch.setattr(stream_module, "BATCH_TOKENS", 2 * LENGTH + 1)
    for ours, theirs in zip(streamed(checkpoint, ids_WT, tmp_path), together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_hidden_states_on_disk_are_the_same(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids_WT, checkpoint = random_ids(4, LENGTH), open_tiny("llama")
    in_memory = streamed(checkpoint, ids_WT, tmp_path / "spill")
    assert not (tmp_path / "spill").exists()
    size = 4 * LENGTH * 32 * 4
    monkeypatch.setattr(stream_module, "SPILL_BYTES", size - 1)
    on_disk = streamed(checkpoint, ids_WT, tmp_path / "spill")
    assert all(torch.equal(a, b) for a, b in zip(on_disk, in_memory, strict=True))
    assert (tmp_path / "spill" / "hidden_states.bin").stat().st_size == size


@pytest.mark.parametrize("variant", ["gemma2", "qwen3"])
def test_going_on_in_another_process(open_tiny: OpenTiny, tmp_path: Path, variant: str) -> None:
    ids_WT, checkpoint = random_ids(3, LENGTH), open_tiny(variant)
    states = streamed(checkpoint, ids_WT, tmp_path)
    resumed = DecoderStream(checkpoint, torch.float32, ids_WT)
    resumed.prepare()
    hidden_WTD = states[1].clone()
    for layer in (1, 2):
        ffn = DenseFfn(checkpoint.ffn(layer, torch.float32))
        resumed.run(layer, ffn, hidden_WTD, write=True)
        assert torch.equal(hidden_WTD, states[layer + 1])


def test_looking_without_writing(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint, ids_WT = open_tiny("olmo2"), random_ids(2, LENGTH)
    stream = DecoderStream(checkpoint, torch.float32, ids_WT)
    hidden_WTD = stream.embed(tmp_path)
    before, seen = hidden_WTD.clone(), []
    stream.run(0, InputTap(lambda x_TD: seen.append(x_TD.clone())), hidden_WTD, write=False)
    assert torch.equal(hidden_WTD, before)
    assert torch.cat(seen).shape == (2 * LENGTH, 32)
    model, inputs = tiny_model("olmo2"), []
    model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(
        lambda _module, args: inputs.append(args[0])
    )
    with torch.no_grad():
        model(ids_WT, use_cache=False)
    torch.testing.assert_close(torch.cat(seen), inputs[0].flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_tap_sees_what_the_ffn_sees(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint, ids_WT = open_tiny("gemma2"), random_ids(2, LENGTH)
    stream = DecoderStream(checkpoint, torch.float32, ids_WT)
    hidden_WTD = stream.embed(tmp_path)
    tapped: list[Tensor] = []
    observed: list[Tensor] = []
    stream.run(0, InputTap(lambda x_TD: tapped.append(x_TD.clone())), hidden_WTD, write=False)
    ffn = DenseFfn(checkpoint.ffn(0, torch.float32), lambda x_TD: observed.append(x_TD.clone()))
    stream.run(0, ffn, hidden_WTD, write=True)
    assert torch.equal(torch.cat(tapped), torch.cat(observed))


def test_an_observer_does_not_change_a_bit(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint, ids_WT = open_tiny("gemma"), random_ids(2, LENGTH)
    outputs = []
    for observer in (None, lambda _x_TD: None):
        stream = DecoderStream(checkpoint, torch.float32, ids_WT)
        hidden_WTD = stream.embed(tmp_path)
        ffn = DenseFfn(checkpoint.ffn(0, torch.float32), observer)
        stream.run(0, ffn, hidden_WTD, write=True)
        outputs.append(hidden_WTD)
    assert torch.equal(*outputs)


def test_a_converted_ffn_in_a_layer(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint, ids_WT = open_tiny("llama"), random_ids(2, LENGTH)
    weights = checkpoint.ffn(0, torch.float32)
    everything = random_layout(48, shared=48, experts=0, top_k=0)
    half = random_layout(48, shared=24, experts=0, top_k=0)
    outputs = []
    for ffn in (
        DenseFfn(weights),
        MoEFeedForward.convert(weights, everything, None),
        MoEFeedForward.convert(weights, half, None),
    ):
        stream = DecoderStream(checkpoint, torch.float32, ids_WT)
        hidden_WTD = stream.embed(tmp_path)
        stream.run(0, ffn, hidden_WTD, write=True)
        outputs.append(hidden_WTD)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(open_tiny: OpenTiny, tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint, ids_WT = open_tiny("gemma2", dtype=dtype), random_ids(2, LENGTH)
    stream = DecoderStream(checkpoint, dtype, ids_WT)
    hidden_WTD = stream.embed(tmp_path)
    assert hidden_WTD.dtype == dtype
    stream.run(0, DenseFfn(checkpoint.ffn(0, dtype)), hidden_WTD, write=True)
    expected = whole("gemma2", ids_WT)[1]
    error = (hidden_WTD.float() - expected).norm() / expected.norm()
    assert error < 0.03


def test_two_layers_are_never_in_memory(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint = open_tiny("llama")
    stream = DecoderStream(checkpoint, torch.float32, random_ids(1, LENGTH))
    hidden_WTD = stream.embed(tmp_path)
    stream.run(0, DenseFfn(checkpoint.ffn(0, torch.float32)), hidden_WTD, write=True)
    kept = [p for module in (stream._skeleton, *stream._layers) for p in module.parameters()]
    assert {parameter.device.type for parameter in kept} == {"meta"}
