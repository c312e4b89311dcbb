"""Weights divided among two processes; the script below runs in both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from weaver.errors import WeaverError
from weaver.training.sharding import clip_gradients, divided_like, whole
from weaver.training.workers import Workers

SCRIPT = """
import copy
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from weaver.training.phase import plain_tensor
from weaver.training.sharding import clip_gradients, divided_like, read_layers, whole
from weaver.training.workers import Workers

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1,
)
model = LlamaForCausalLM(config).train()
divided = copy.deepcopy(model)
workers = Workers.join(sharded=True)
workers.place(divided)

def held():
    return sum(p.to_local().numel() for p in divided.model.layers.parameters())

total = sum(p.numel() for p in model.model.layers.parameters())
assert held() == total // 2, (held(), total)
ids_BT = torch.arange(24).reshape(2, 12)
mine = ids_BT[workers.rank : workers.rank + 1]
loss = divided(mine, labels=mine).loss
assert held() == total // 2
(loss / 2).backward()
model(ids_BT, labels=ids_BT).loss.backward()
parameters = dict(divided.named_parameters())
assert parameters.keys() == dict(model.named_parameters()).keys()
workers.add_gradients(parameters.values())
for name, parameter in model.named_parameters():
    found = whole(parameters[name].grad)
    torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)

norm = clip_gradients(list(parameters.values()), 0.01)
expected = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))
assert abs(norm - expected) < 1e-4 * expected, (norm, expected)
for name, parameter in model.named_parameters():
    found = whole(parameters[name].grad)
    torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-8, msg=name)

names = list(parameters)
with torch.no_grad():
    read = read_layers(divided, names, lambda name: plain_tensor(divided, name))
    assert set(read) == set(names)
    assert all(read[name].equal(parameter) for name, parameter in model.named_parameters())
    assert held() == total // 2
    target = parameters["model.layers.1.mlp.up_proj.weight"]
    value = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    copied = divided_like(value, target)
    assert isinstance(copied, DTensor) and copied.to_local().shape == (12, 16)
    assert whole(copied).equal(value)
print("done")
"""


def test_two_processes_hold_half_of_every_layer(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout.count("done") == 2, done.stderr


def test_one_process_has_nothing_to_divide() -> None:
    with pytest.raises(WeaverError, match="1 process holds all weights"):
        Workers.join(sharded=True)


def test_an_older_torch_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(WeaverError, match="cannot divide experts") as caught:
        Workers.join(sharded=True)
    assert "constraints.txt" in caught.value.fix


def test_whole_tensors_stay_what_they_are() -> None:
    value = torch.ones(2, 3)
    assert whole(value) is value
    copied = divided_like(value, torch.zeros(2, 3))
    assert copied.equal(value)
    assert copied.data_ptr() != value.data_ptr()


def test_whole_gradients_are_clipped_together() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients([first, second], 1.0) == pytest.approx(5.0)
    assert float(first.grad) == pytest.approx(0.6, rel=1e-5)
    assert clip_gradients([first], 1.0) == pytest.approx(0.6, rel=1e-5)
    assert float(first.grad) == pytest.approx(0.6, rel=1e-5)
