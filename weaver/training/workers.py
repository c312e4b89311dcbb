"""The processes that train one model together: the same weights in each, a share of every batch.

``torchrun`` and ``accelerate launch`` start them and say who is who in the environment; without
either there is one. Gradients are added up after every step, so that all of them make the same
update, which is that of one process within rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from weaver.artifacts.dtypes import dtype_name
from weaver.errors import WeaverError
from weaver.training.balance import ExpertLoad
from weaver.training.sharding import can_shard, shard_layers

T = TypeVar("T")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Workers:
    """This process among those that train with it.

    Args:
        state: rank, number of processes and device, as accelerate finds them.
        precision: dtype of matrix products under autocast; float32 means none.
        sharded: the weights of every layer are divided among them.
        alone_on: device of a process that trains alone; None for that of ``state``.
    """

    state: PartialState
    precision: torch.dtype = torch.float32
    sharded: bool = False
    alone_on: torch.device | None = None

    @classmethod
    def join(
        cls,
        precision: torch.dtype = torch.float32,
        *,
        sharded: bool = False,
        device: torch.device | None = None,
    ) -> Workers:
        """Join the others, if this process was started with others.

        Args:
            precision, sharded: see ``Workers``.
            device: of a process that trains alone; of several each has one of its own, GPUs
                unless this is the CPU.

        Raises:
            WeaverError: weights are to be divided among one process, or by a torch too old for it.
        """
        # Without this word accelerate takes processes on a machine without a GPU for strangers.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        on_cpu = several and (not torch.cuda.is_available() or device == torch.device("cpu"))
        workers = cls(PartialState(cpu=on_cpu), precision, sharded, device)
        if sharded and not can_shard():
            raise WeaverError(
                f"--shard: torch {torch.__version__} cannot divide experts",
                why="its FSDP has no zero gradients for what the tokens of a process did not use",
                fix="install the torch of constraints.txt, or leave --shard out",
            )
        if sharded and workers.count == 1:
            raise WeaverError(
                "--shard: 1 process holds all weights",
                why="sharding divides the weights among the processes that train together",
                fix="leave --shard out, or start with torchrun --nproc-per-node N -m weaver",
            )
        return workers

    @property
    def count(self) -> int:
        """How many processes train."""
        return int(self.state.num_processes)

    @property
    def rank(self) -> int:
        """Which of them this one is, from 0."""
        return int(self.state.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        if self.count == 1 and self.alone_on is not None:
            return self.alone_on
        return torch.device(self.state.device)

    @property
    def reads_weights(self) -> bool:
        """Whether this process has to take part when the weights are measured or written."""
        return self.is_main or self.sharded

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The processes among which weights are divided."""
        return init_device_mesh(self.device.type, (self.count,))

    def place(self, model: PreTrainedModel) -> None:
        """Put a model on this process' device, in place: all of it, or its part."""
        if self.sharded:
            shard_layers(model, self.mesh)
        else:
            nn.Module.to(model, self.device)

    @property
    def precision_name(self) -> str:
        """Its key in ``PRECISIONS``."""
        return dtype_name(self.precision)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in ``precision``; weights and their updates stay in float32."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision if enabled else None, enabled)

    def share(self, ids_B: Tensor) -> Tensor:
        """This process' part of a batch; parts differ by one window at most.

        Raises:
            ValueError: there are more processes than windows.
        """
        if len(ids_B) < self.count:
            raise ValueError(f"a batch of {len(ids_B)} windows for {self.count} processes")
        return ids_B.tensor_split(self.count)[self.rank]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by the sum over all processes, in place.

        A parameter that this process' tokens did not use counts as zero. Gradients of divided
        parameters are sums already.
        """
        if self.count == 1:
            return
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.sum(grad)

    def add_loads(self, loads: Mapping[str, ExpertLoad]) -> dict[str, ExpertLoad]:
        """Loads over the tokens of all processes."""
        return {
            name: ExpertLoad(
                self.sum(load.counts_E), int(self.sum(torch.tensor(load.tokens, device="cpu")))
            )
            for name, load in loads.items()
        }

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count == 1:
            return tensor
        total: Tensor = reduce(tensor.to(self.device), "sum")
        return total

    def agree(self, value: T) -> T:
        """The main process' value, everywhere."""
        if self.count == 1:
            return value
        agreed: T = broadcast_object_list([value])[0]
        return agreed

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.state.wait_for_everyone()
