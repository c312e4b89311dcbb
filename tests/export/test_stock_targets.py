"""Stock architectures compute what weaver's own type computes: every family, layer and dtype."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import (
    DTYPES,
    EQUAL,
    UNEQUAL,
    add_values,
    assert_same,
    load_stock,
    outputs,
    save_converted,
    source_of,
    write_stock,
)
from tiny_conversions import (
    load_converted,
    random_compensation,
)
from tiny_models import SLIDING_WINDOW, random_ids
from torch import Tensor

from weaver.artifacts.types import Router
from weaver.errors import WeaverError
from weaver.export import glm4_moe, granite_moe_shared
from weaver.export.base import ALWAYS, NEVER
from weaver.export.glm4_moe import router_scale
from weaver.export.registry import check, choose, stock_target
from weaver.models.converted_folder import ConvertedCheckpoint

NO_WINDOW: dict[str, Any] = {"sliding_window": None}
# Variants whose decoders have a stock form, with what has to be changed in the tiny model.
EXACT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": NO_WINDOW,
    "qwen2": {},
    "qwen3": {},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", EXACT)
def test_glm4_moe_holds_any_split_and_intercepts(
    variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = save_converted(
        tmp_path, variant, UNEQUAL, dtype=dtype, intercept=True, changes=EXACT[variant]
    )
    assert glm4_moe.TARGET.obstacles(checkpoint, checkpoint.dtype) == []
    write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint))
    stock = load_stock(tmp_path / "stock", dtype)
    assert type(stock).__name__ == "Glm4MoeForCausalLM"
    assert_same(load_converted(checkpoint.folder), stock, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2"])
def test_granite_holds_equal_layers(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, variant, EQUAL, dtype=dtype, changes=EXACT[variant])
    assert granite_moe_shared.TARGET.obstacles(checkpoint, checkpoint.dtype) == []
    write_stock(tmp_path / "stock", granite_moe_shared.TARGET, source_of(checkpoint))
    stock = load_stock(tmp_path / "stock", dtype)
    assert type(stock).__name__ == "GraniteMoeSharedForCausalLM"
    assert_same(load_converted(checkpoint.folder), stock, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_of_odd_widths_are_filled_up_to_what_grouped_products_take(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = save_converted(tmp_path, "llama", ((13, 5, 7, 2),) * 3, dtype=dtype)
    write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint))
    stock = load_stock(tmp_path / "stock", dtype)
    assert stock.config.moe_intermediate_size == 8
    assert_same(load_converted(checkpoint.folder), stock, dtype)


def test_granite_takes_biases_of_the_whole_attention(tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, "llama", EQUAL, changes={"attention_bias": True})
    found = glm4_moe.TARGET.obstacles(checkpoint, checkpoint.dtype)
    assert [obstacle.what for obstacle in found] == ["a bias of the attention's output projection"]
    assert granite_moe_shared.TARGET.obstacles(checkpoint, checkpoint.dtype) == []
    write_stock(tmp_path / "stock", granite_moe_shared.TARGET, source_of(checkpoint))
    stock = load_stock(tmp_path / "stock", torch.float32)
    assert_same(load_converted(checkpoint.folder), stock, torch.float32)
    assert choose(checkpoint, checkpoint.dtype)[0] == "granite-moe-shared"


def test_all_experts_active_is_the_dense_model(tmp_path: Path) -> None:
    full = ((16, 4, 8, 4), (8, 5, 8, 5), (0, 6, 8, 6))
    checkpoint = save_converted(tmp_path, "llama", full)
    write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint))
    dense = load_stock(tmp_path / "dense", torch.float32)
    assert_same(dense, load_stock(tmp_path / "stock", torch.float32), torch.float32)


def test_forced_experts_are_selected_and_empty_ones_are_not(tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, "llama", UNEQUAL, intercept=True)
    stock = write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint))
    model = load_stock(tmp_path / "stock", torch.float32)
    names = [torch.tensor(layer) for layer in stock.experts]
    found: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(stock.router_module):
            module.register_forward_hook(lambda _m, _a, out: found.append(out[2]))
    outputs(model, random_ids(2, 16))
    for ids_TK, name in zip(found, names, strict=True):
        chosen = name[ids_TK]
        assert bool(((chosen == ALWAYS).sum(1) == (name == ALWAYS).sum()).all())
        assert not bool((chosen == NEVER).any())


def test_rotary_settings_stand_where_other_readers_look_for_them(tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, "llama", EQUAL)
    stock = write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint))
    written = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert written["partial_rotary_factor"] == 1.0
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert written["num_nextn_predict_layers"] == 0
    loaded = load_stock(tmp_path / "stock", torch.float32).config
    assert loaded.rope_parameters == stock.config.rope_parameters


def test_an_untied_head_is_written_for_runtimes_that_look_for_it(tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, "llama", EQUAL)
    assert checkpoint.config.tie_word_embeddings
    write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint))
    model = load_stock(tmp_path / "stock", torch.float32)
    weights = model.state_dict()
    head_VD, embeddings_VD = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    assert not model.config.tie_word_embeddings
    assert torch.equal(head_VD, embeddings_VD)
    assert head_VD.data_ptr() != embeddings_VD.data_ptr()


def test_the_router_scale_is_a_power_of_two_below_the_spread() -> None:
    # Standard deviation sqrt(2) per token.
    logits_TE = torch.tensor([[0.0, 2.0], [5.0, 7.0]])
    assert router_scale(logits_TE) == 2.0**-10
    assert router_scale(logits_TE * 2) == 2.0**-11
    assert router_scale(torch.zeros(3, 2)) == 1.0


def test_a_router_that_no_scale_fits_is_refused(tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, "llama", EQUAL, scale=0.5)
    stock = glm4_moe.TARGET.build(source_of(checkpoint))
    with pytest.raises(ValueError, match="more than a linear map"):
        stock.parts[1].load()


REFUSALS = [
    ("gemma", {}, "the decoder of gemma"),
    ("gemma2", {}, "the decoder of gemma2"),
    ("gemma3_text", {}, "the decoder of gemma3_text"),
    ("olmo2", {}, "the decoder of olmo2"),
    ("phi3", {}, "the decoder of phi3"),
    ("mistral", {}, f"a sliding window of {SLIDING_WINDOW} tokens"),
    ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    ("llama", {"mlp_bias": True}, "biases of the gate or up projection"),
]


@pytest.mark.parametrize(("variant", "changes", "what"), REFUSALS)
@pytest.mark.parametrize("name", ["glm4-moe", "granite-moe-shared", "gguf"])
def test_decoders_without_a_stock_form_are_refused(
    name: str, variant: str, changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    checkpoint = save_converted(tmp_path, variant, EQUAL, changes=changes)
    found = stock_target(name).obstacles(checkpoint, checkpoint.dtype)
    assert what in [obstacle.what for obstacle in found]
    with pytest.raises(WeaverError, match=f"{name} cannot hold"):
        check(name, found, approximate=False)
    assert choose(checkpoint, checkpoint.dtype)[0] == "weaver"


FEATURES = [
    ({"kind": "glu", "scale": 0.0}, "a GLU router"),
    ({"selection": "threshold"}, "selection by threshold"),
    ({"scale": 0.5}, "trained output factors"),
    ({"scale": 0.0}, "balance biases"),
    ({"weighting": "softmax", "routed_scaling": 2.0}, "softmax weights of the chosen experts"),
]


@pytest.mark.parametrize(("options", "what"), FEATURES)
def test_features_without_a_stock_form_are_refused_or_approximated(
    options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    checkpoint = save_converted(tmp_path, "llama", EQUAL, **options)
    found = glm4_moe.TARGET.obstacles(checkpoint, checkpoint.dtype)
    assert any(obstacle.what.startswith(what) for obstacle in found)
    with pytest.raises(WeaverError, match="glm4-moe cannot hold") as caught:
        check("glm4-moe", found, approximate=False)
    assert "--approximate" in caught.value.fix
    assert any(line.startswith(what) for line in check("glm4-moe", found, approximate=True))
    write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint, approximate=True))
    own = load_converted(checkpoint.folder)
    stock = load_stock(tmp_path / "stock", torch.float32)
    ids_WT = random_ids(4, 32)
    log_p, log_q = (outputs(model, ids_WT)[0] for model in (own, stock))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert 1e-6 < kl < 0.5


def test_a_trained_factor_that_is_the_same_for_all_tokens_is_exact(tmp_path: Path) -> None:
    # One expert per layer: its probability is 1, its factor 1 + scale.
    splits = ((40, 1, 8, 1),) * 3
    checkpoint = save_converted(tmp_path, "llama", splits)
    add_values(checkpoint.folder, "router.scale", 0.5)
    checkpoint = ConvertedCheckpoint(checkpoint.folder)
    write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint, approximate=True))
    stock = load_stock(tmp_path / "stock", torch.float32)
    assert_same(load_converted(checkpoint.folder), stock, torch.float32)


def test_near_ties_of_many_experts_are_an_approximation(tmp_path: Path) -> None:
    for experts, expected in ((8, []), (9, ["9 routed experts in a layer"])):
        folder = tmp_path / str(experts)
        checkpoint = save_converted(folder, "llama", ((12, experts, 4, 5),) * 3)
        found = glm4_moe.TARGET.obstacles(checkpoint, checkpoint.dtype)
        assert [obstacle.what for obstacle in found] == expected
    assert "--num-experts 8" in found[0].fix
    # It is written as it is: only what near ties become is another matter.
    write_stock(folder / "stock", glm4_moe.TARGET, source_of(checkpoint, approximate=True))
    stock = load_stock(folder / "stock", torch.float32)
    log_p, log_q = (
        outputs(model, random_ids(4, 32))[0] for model in (load_converted(checkpoint.folder), stock)
    )
    assert (log_p.exp() * (log_p - log_q)).sum(-1).median() < 1e-6


def test_constants_of_experts_are_refused_or_left_out(tmp_path: Path) -> None:
    compensations = [random_compensation(48, 32, 4, seed=i) for i in range(3)]
    checkpoint = save_converted(tmp_path, "llama", EQUAL, compensations=compensations)
    found = glm4_moe.TARGET.obstacles(checkpoint, checkpoint.dtype)
    assert [o.what for o in found] == ["constants that stand in for skipped experts"]
    assert "router.constants=false" in found[0].fix
    with pytest.raises(ValueError, match="has constants"):
        glm4_moe.TARGET.build(source_of(checkpoint)).parts[1].load()
    write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint, approximate=True))
    stock = load_stock(tmp_path / "stock", torch.float32)
    # Exactly the constants are gone: refitted down projections and everything else are there.
    for name in ("mlp.expert_bias", "mlp.output_bias"):
        add_values(checkpoint.folder, name, 0.0)
    assert_same(load_converted(checkpoint.folder), stock, torch.float32)


def test_a_sliding_window_becomes_the_context_on_request(tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, "mistral", EQUAL)
    write_stock(tmp_path / "stock", glm4_moe.TARGET, source_of(checkpoint, approximate=True))
    stock = load_stock(tmp_path / "stock", torch.float32)
    assert stock.config.max_position_embeddings == SLIDING_WINDOW
    ids_WT = random_ids(4, SLIDING_WINDOW)
    log_p, log_q = (
        outputs(model, ids_WT)[0] for model in (load_converted(checkpoint.folder), stock)
    )
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 1e-6


def test_static_models_are_refused(tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, "llama", ((36, 0, 0, 0),) * 3)
    found = glm4_moe.TARGET.obstacles(checkpoint, checkpoint.dtype)
    assert [o.what for o in found] == ["a static model: no layer has routed experts"]
    assert choose(checkpoint, checkpoint.dtype)[0] == "weaver"


def test_granite_refuses_what_only_glm_holds(tmp_path: Path) -> None:
    different = save_converted(tmp_path / "a", "llama", UNEQUAL, intercept=True)
    found = [o.what for o in granite_moe_shared.TARGET.obstacles(different, different.dtype)]
    assert found == ["3 different splits of layers", "router intercepts"]
    normed = save_converted(tmp_path / "b", "qwen3", EQUAL)
    assert [o.what for o in granite_moe_shared.TARGET.obstacles(normed, normed.dtype)] == [
        "norms of queries and keys"
    ]
    half = save_converted(tmp_path / "c", "llama", EQUAL, dtype=torch.float16)
    assert [o.what for o in granite_moe_shared.TARGET.obstacles(half, half.dtype)] == [
        "float16 weights"
    ]


def test_the_best_target_is_chosen_with_the_reason(tmp_path: Path) -> None:
    name, reason = choose(save_converted(tmp_path, "llama", UNEQUAL), torch.float32)
    assert name == "glm4-moe"
    assert "holds the model exactly" in reason
    name, reason = choose(save_converted(tmp_path / "b", "olmo2", EQUAL), torch.float32)
    assert name == "weaver"
    assert "its norms stand behind attention and FFN" in reason


def test_a_distilled_router_selects_mostly_the_same_experts() -> None:
    from weaver.algorithms.glu import GluWeights
    from weaver.export.features import approximated
    from weaver.kernels.reference import ExpertChoice, route
    from weaver.models.accounting import LayerShape
    from weaver.models.converted_folder import ConvertedLayer

    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(4000, 16, generator=generator) + 1.0
    gate_ED, up_ED = (torch.rand(6, 16, generator=generator) for _ in range(2))
    zeros = torch.zeros(6)
    router = Router("glu", gate_ED, zeros, zeros, up_weight_ED=up_ED)
    gate_FD, up_FD, down_FD = (torch.randn(14, 16, generator=generator) for _ in range(3))
    weights = GluWeights(gate_FD=gate_FD, up_FD=up_FD, down_FD=down_FD, activation="silu")
    layer = ConvertedLayer(LayerShape(2, 6, 2, 2, "glu"), weights, router)
    linear = approximated(layer, x_TD[:2000]).router
    assert linear is not None
    assert linear.kind == "linear"
    held_out_TD = x_TD[2000:]
    wanted_TE, found_TE = (
        route(held_out_TD, each, "silu", ExpertChoice(2)).selected_TE() for each in (router, linear)
    )
    # Two of six by chance: a third.
    assert (wanted_TE & found_TE).sum() / wanted_TE.sum() > 0.8


def test_only_powers_of_two_of_experts_are_exact_in_16_bits(tmp_path: Path) -> None:
    three = ((16, 4, 8, 3),) * 3
    checkpoint = save_converted(tmp_path, "llama", three, dtype=torch.bfloat16)
    found = granite_moe_shared.TARGET.obstacles(checkpoint, torch.bfloat16)
    assert [o.what for o in found] == ["down projections times 3 in 16 bits"]
    assert granite_moe_shared.TARGET.obstacles(checkpoint, torch.float32) == []
    source = replace(source_of(checkpoint), dtype=torch.float32)
    write_stock(tmp_path / "stock", granite_moe_shared.TARGET, source)
    own = load_converted(checkpoint.folder).float()
    assert_same(own, load_stock(tmp_path / "stock", torch.float32), torch.float32)
