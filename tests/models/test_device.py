"""Names of devices, with GPUs that are made up."""

from __future__ import annotations

import pytest
import torch

from weaver.errors import WeaverError
from weaver.models.device import has_room, resolve_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "device"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_names_with_gpus(name: str, device: str) -> None:
    assert resolve_device(name) == torch.device(device)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(name: str) -> None:
    with pytest.raises(WeaverError, match="torch finds no GPU") as refused:
        resolve_device(name)
    assert "--device cpu" in refused.value.fix


@pytest.mark.usefixtures("two_gpus")
def test_a_number_beyond_the_gpus() -> None:
    with pytest.raises(WeaverError, match="device 'cuda:2' of 2 GPUs"):
        resolve_device("cuda:2")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "mps"])
def test_other_names(name: str) -> None:
    with pytest.raises(WeaverError, match="a device is auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_hidden_states_take_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 200))
    gpu = torch.device("cuda", 0)
    assert has_room(gpu, 50)
    assert not has_room(gpu, 51)
    assert not has_room(torch.device("cpu"), 1)
