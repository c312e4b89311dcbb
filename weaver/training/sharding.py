"""Weights divided among processes: FSDP2 around every decoder layer.

What lies outside of the layers (embeddings, last norm, head) stays whole in every process, since
the loss reads the head in chunks, out of reach of FSDP's hooks. Its gradients are added up as those
of unsharded weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from weaver.training.adapters import ATTENTION


def shard_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divide the weights of every decoder layer among the processes, in place.

    A layer's weights are whole while it computes, in the forward and in the backward pass, where
    its activations are computed again instead of being kept: the casts of its experts are as large
    as the layer. Gradients are sums over the processes. Parameters are new objects afterwards,
    under the names of before.

    Args:
        model: on the CPU; all but the layers is moved to the mesh's device.
        mesh: the processes, in one dimension.

    Source: ZeRO stage 3, arXiv:1910.02054; torch.distributed.fsdp.fully_shard.
    """
    for layer in decoder_layers(model).values():
        sharded = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        # A factor of its own would need an operation that gloo does not have.
        sharded.set_force_sum_reduction_for_comms(True)
        # The tokens of one process may leave an expert's parameters alone that others use.
        sharded.set_reduce_scatter_unused_params(True)
    nn.Module.to(model, torch.device(mesh.device_type))
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def can_shard() -> bool:
    """Whether this version of torch has all that ``shard_layers`` uses."""
    return hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a model by name: the modules that hold an attention."""
    return {name: each for name, each in model.named_modules() if hasattr(each, ATTENTION)}


def read_layers(
    model: nn.Module, names: Sequence[str], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Apply ``read`` to each name while its layer is unsharded, and copy the results to the CPU.

    Every process has to call it.

    Args:
        model: with divided layers.
        names: of parameters or buffers, as if there were no adapters.
        read: gives a tensor that may share memory with the weights.
    """
    found: dict[str, Tensor] = {}
    for prefix, layer in decoder_layers(model).items():
        assert isinstance(layer, FSDPModule)
        layer.unshard()
        inside = [name for name in names if name.startswith(f"{prefix}.")]
        found |= {name: read(name).to("cpu", copy=True) for name in inside}
        layer.reshard()
    outside = [name for name in names if name not in found]
    return found | {name: read(name).to("cpu", copy=True) for name in outside}


def clip_gradients(parameters: Collection[nn.Parameter], limit: float) -> float:
    """Scale gradients so that their common norm is at most ``limit``.

    Every process has to call it where parameters are divided.

    Returns:
        The norm before, over all parameters.
    """
    grads = [each.grad for each in parameters if each.grad is not None]
    divided = [grad for grad in grads if isinstance(grad, DTensor)]
    if not divided:
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    # torch takes the norm of divided tensors, and of whole ones, but not of a mixture.
    plain = [grad for grad in grads if not isinstance(grad, DTensor)]
    norms = [whole(nn.utils.get_total_norm(each)) for each in (divided, plain) if each]
    norm = float(torch.stack(norms).norm())
    if norm > limit:
        for grad in grads:
            grad.mul_(limit / norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its division; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(value: Tensor, target: Tensor) -> Tensor:
    """A copy of a whole tensor on the device of another one, divided as that is."""
    local = value.to(target.device, copy=True)
    if not isinstance(target, DTensor):
        return local
    # Every process has the whole tensor: none has to send it.
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
