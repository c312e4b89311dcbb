from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from tiny_runs import file_size_limit
from tiny_stock import (
    NUM_EXPERTS,
    as_parts,
    stock_config,
    stock_model,
    stock_parts,
    stock_tensors,
)
from torch import Tensor
from transformers import Glm4MoeForCausalLM, PreTrainedTokenizerFast

from weaver.errors import WeaverError
from weaver.export.gguf import QUANTISATIONS, write_gguf
from weaver.export.llamacpp import greedy, tokenise, top_logprobs
from weaver.models.writing import Part

IDS = torch.randint(256, (24,), generator=torch.Generator().manual_seed(1))
LENGTHS = (1, 2, 3, 5, 8, 11, 13, 16, 17, 20, 23, 24)
LINEAR = {
    "rope_type": "linear",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "factor": 4.0,
}
HALF = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def tokenizer_folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "tokenizer"
    tiny_tokenizer.save_pretrained(folder)
    return folder


def write(
    path: Path,
    model: Glm4MoeForCausalLM,
    tokenizer_folder: Path,
    quantisation: str = "f32",
    parts: list[Part] | None = None,
) -> Path:
    write_gguf(
        path,
        model.config,
        stock_parts(model) if parts is None else parts,
        tokenizer_folder,
        quantisation=quantisation,
        name="tiny",
        on_part=lambda _: None,
    )
    return path


def differences(path: Path, model: Glm4MoeForCausalLM) -> Tensor:
    """Largest difference from transformers in the log-probabilities, for each prompt."""
    with torch.no_grad():
        expected_TV = model(IDS[None]).logits[0].log_softmax(-1)
    prompts = [IDS[:length].tolist() for length in LENGTHS]
    found = top_logprobs(path, prompts, model.config.vocab_size)
    values = []
    for length, logprobs in zip(LENGTHS, found, strict=True):
        assert sorted(logprobs) == list(range(model.config.vocab_size))
        assert list(logprobs.values()) == sorted(logprobs.values(), reverse=True)
        found_V = torch.tensor([logprobs[token] for token in range(len(logprobs))])
        values.append((found_V - expected_TV[length - 1]).abs().max())
    return torch.stack(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "use_qk_norm": False},
        {"attention_bias": False, "use_qk_norm": True, "moe_intermediate_size": 24},
        {"n_shared_experts": 0},
        {"rope_parameters": LINEAR},
        {"rope_parameters": HALF, "num_experts_per_tok": 6, "routed_scaling_factor": 6.0},
    ],
    ids=["bias", "qk-norm", "no-shared", "linear-rope", "half-rope"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_llama_cpp_computes_what_transformers_does(
    tmp_path: Path, tokenizer_folder: Path, changes: dict[str, Any]
) -> None:
    model = stock_model(**changes)
    path = write(tmp_path / "tiny.gguf", model, tokenizer_folder)
    assert differences(path, model).max() < 1e-4
    untyped: Any = model
    expected = untyped.generate(IDS[None, :4], max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert greedy(path, IDS[:4].tolist(), 9) == expected[0, 4:].tolist()


# Two to three times what was measured. The median: a near tie in a router may fall the other way,
# and then a prompt is off by as much as an expert contributes.
@pytest.mark.parametrize(("quantisation", "bound"), [("f16", 0.01), ("bf16", 0.08), ("q8_0", 0.45)])
def test_quantised_weights_stay_close(
    tmp_path: Path, tokenizer_folder: Path, quantisation: str, bound: float
) -> None:
    model = stock_model()
    path = write(tmp_path / "tiny.gguf", model, tokenizer_folder, quantisation)
    assert differences(path, model).median() < bound
    assert len(greedy(path, IDS[:4].tolist(), 9)) == 9


def test_the_metadata(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "tiny.gguf", stock_model(), tokenizer_folder, "q8_0")
    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    own = {k.removeprefix("glm4moe."): v for k, v in fields.items() if k.startswith("glm4moe.")}
    epsilon = own.pop("attention.layer_norm_rms_epsilon")
    assert epsilon == pytest.approx(1e-5)
    assert own == {
        "vocab_size": 260,
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_shared_count": 2,
        "expert_feed_forward_length": 32,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 3.0,
        "leading_dense_block_count": 0,
        "nextn_predict_layers": 0,
    }
    general = {k.removeprefix("general."): v for k, v in fields.items() if k.startswith("general.")}
    assert general == {
        "architecture": "glm4moe",
        "type": "model",
        "name": "tiny",
        "file_type": 7,
        "quantization_version": 2,
    }


def test_linear_rope_scaling_is_passed_on(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "tiny.gguf", stock_model(rope_parameters=LINEAR), tokenizer_folder)
    fields = GGUFReader(path).fields
    assert fields["glm4moe.rope.scaling.type"].contents() == "linear"
    assert fields["glm4moe.rope.scaling.factor"].contents() == 4.0


def read_tensors(path: Path) -> dict[str, tuple[GGMLQuantizationType, np.ndarray]]:
    return {
        tensor.name: (tensor.tensor_type, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(path).tensors
    }


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_types_and_values_of_the_tensors(
    tmp_path: Path, tokenizer_folder: Path, quantisation: str
) -> None:
    # Rows of 48 values are no whole blocks of q8_0: those of the down projections stay f16.
    model = stock_model(moe_intermediate_size=48, n_shared_experts=1)
    path = write(tmp_path / "tiny.gguf", model, tokenizer_folder, quantisation)
    written, tensors = read_tensors(path), stock_tensors(model)
    matrix = QUANTISATIONS[quantisation][0]
    narrow = GGMLQuantizationType.F16 if quantisation == "q8_0" else matrix
    float32 = GGMLQuantizationType.F32
    kinds = {
        "token_embd.weight": matrix,
        "output.weight": matrix,
        "output_norm.weight": float32,
        "blk.1.attn_norm.weight": float32,
        "blk.1.post_attention_norm.weight": float32,
        "blk.1.attn_q.weight": matrix,
        "blk.1.attn_q.bias": float32,
        "blk.1.attn_q_norm.weight": float32,
        "blk.1.attn_k.weight": matrix,
        "blk.1.attn_k.bias": float32,
        "blk.1.attn_k_norm.weight": float32,
        "blk.1.attn_v.weight": matrix,
        "blk.1.attn_v.bias": float32,
        "blk.1.attn_output.weight": matrix,
        "blk.1.ffn_gate_inp.weight": float32,
        "blk.1.exp_probs_b.bias": float32,
        "blk.1.ffn_gate_exps.weight": matrix,
        "blk.1.ffn_up_exps.weight": matrix,
        "blk.1.ffn_down_exps.weight": narrow,
        "blk.1.ffn_gate_shexp.weight": matrix,
        "blk.1.ffn_up_shexp.weight": matrix,
        "blk.1.ffn_down_shexp.weight": narrow,
    }
    found = {k: kind for k, (kind, _) in written.items() if not k.startswith(("blk.0", "blk.2"))}
    assert found == kinds
    assert written["blk.1.ffn_down_exps.weight"][1].shape == (NUM_EXPERTS, 64, 48)
    for name, source in (
        ("blk.1.ffn_gate_inp.weight", ROUTER),
        ("blk.1.exp_probs_b.bias", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("blk.2.attn_k.bias", "model.layers.2.self_attn.k_proj.bias"),
    ):
        np.testing.assert_array_equal(written[name][1], tensors[source].numpy())
    expert = written["blk.0.ffn_up_exps.weight"][1][3]
    exact = tensors["model.layers.0.mlp.experts.3.up_proj.weight"].numpy()
    tolerance = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 2.0**-6}[quantisation]
    np.testing.assert_allclose(expert, exact, rtol=0, atol=tolerance * np.abs(exact).max())


def test_one_part_is_in_memory_at_a_time(tmp_path: Path, tokenizer_folder: Path) -> None:
    model, events = stock_model(), list[str]()
    write_gguf(
        tmp_path / "tiny.gguf",
        model.config,
        as_parts(stock_tensors(model), events.append),
        tokenizer_folder,
        quantisation="bf16",
        name="tiny",
        on_part=events.append,
    )
    assert events == [
        *("outer", "3 tensors from token_embd.weight"),
        *("0", "19 tensors from blk.0.attn_norm.weight"),
        *("1", "19 tensors from blk.1.attn_norm.weight"),
        *("2", "19 tensors from blk.2.attn_norm.weight"),
    ]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "out" / "tiny.gguf"
    path.parent.mkdir()
    path.write_text("before")
    with file_size_limit(50_000), pytest.raises(WeaverError, match="cannot be written"):
        write(path, stock_model(), tokenizer_folder)
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.gguf"]
    assert path.read_text() == "before"


def test_f16_refuses_what_it_cannot_hold(tmp_path: Path, tokenizer_folder: Path) -> None:
    model = stock_model()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] = 70000.0
    message = r"layers\.1\.mlp\.experts\.3\.down_proj\.weight has a value of 70000"
    with pytest.raises(WeaverError, match=message) as caught:
        write(tmp_path / "out" / "tiny.gguf", model, tokenizer_folder, "f16")
    assert caught.value.fix == "--quantisation bf16"
    assert not list((tmp_path / "out").iterdir())
    path = write(tmp_path / "tiny.gguf", model, tokenizer_folder, "bf16")
    assert read_tensors(path)["blk.1.ffn_down_exps.weight"][1][3, 5, 7] == 70144.0


@pytest.mark.parametrize(
    ("changes", "quantisation", "message"),
    [
        ({}, "q4_k_m", "unknown quantisation 'q4_k_m'"),
        ({"hidden_act": "gelu"}, "f32", "cannot hold the activation gelu"),
        (
            {"rope_parameters": LINEAR | {"rope_type": "yarn"}},
            "f32",
            "cannot hold rope scaling of type yarn",
        ),
        (
            {
                "rope_parameters": LINEAR
                | {
                    "rope_type": "llama3",
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "f32",
            "cannot hold rope scaling of type llama3",
        ),
        ({"n_routed_experts": 513}, "f32", "cannot hold 513 routed experts of which 3"),
        ({"num_experts_per_tok": 0}, "f32", "8 routed experts of which 0 are selected"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    tmp_path: Path,
    tokenizer_folder: Path,
    changes: dict[str, Any],
    quantisation: str,
    message: str,
) -> None:
    with pytest.raises(WeaverError, match=message):
        write_gguf(
            tmp_path / "tiny.gguf",
            stock_config(**changes),
            [],
            tokenizer_folder,
            quantisation=quantisation,
            name="tiny",
            on_part=lambda _: None,
        )


def test_parts_that_are_not_this_model(tmp_path: Path, tokenizer_folder: Path) -> None:
    model, path = stock_model(), tmp_path / "tiny.gguf"
    tensors = stock_tensors(model)
    missing = as_parts({k: v for k, v in tensors.items() if k != ROUTER})
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_gate_inp\.weight needs"):
        write(path, model, tokenizer_folder, parts=missing)
    more = as_parts(tensors | {"model.layers.3.mlp.gate.weight": torch.zeros(8, 64)})
    with pytest.raises(ValueError, match=r"not of this glm4_moe model: model\.layers\.3"):
        write(path, model, tokenizer_folder, parts=more)
    scattered = [part for name, value in tensors.items() for part in as_parts({name: value})]
    with pytest.raises(ValueError, match=r"ffn_gate_exps\.weight needs .* in one part"):
        write(path, model, tokenizer_folder, parts=scattered)
    turned = as_parts(tensors | {ROUTER: tensors[ROUTER].T})
    with pytest.raises(ValueError, match=r"gate\.weight has shape \(64, 8\)"):
        write(path, model, tokenizer_folder, parts=turned)


def test_llama_cpp_is_asked_only_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and nothing else")
    for ask in (
        lambda: top_logprobs(path, [[1]], 1),
        lambda: greedy(path, [1], 1),
        lambda: tokenise(path, ["a"]),
    ):
        with pytest.raises(WeaverError, match=r"broken\.gguf: llama\.cpp cannot load it"):
            ask()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(WeaverError, match=r"broken\.gguf needs the package xllamacpp") as caught:
        greedy(path, [1], 1)
    assert caught.value.fix == "pip install 'weaver-moe[gguf]'"


def test_tokens_that_the_model_does_not_have(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "tiny.gguf", stock_model(), tokenizer_folder)
    with pytest.raises(WeaverError, match="cannot run 2 tokens") as caught:
        top_logprobs(path, [[1], [1, 260]], 1)
    assert "invalid tokens" in caught.value.why
