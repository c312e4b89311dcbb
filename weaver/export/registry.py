"""The table of stock targets, best first, and the choice among them."""

from __future__ import annotations

import torch

from weaver.errors import WeaverError
from weaver.export import glm4_moe, granite_moe_shared
from weaver.export.base import Obstacle, Target
from weaver.models.converted_folder import ConvertedCheckpoint

# Granite's sum is exact bit for bit, but it holds less and fewer runtimes have it.
TARGETS: dict[str, Target] = {
    target.name: target for target in (glm4_moe.TARGET, granite_moe_shared.TARGET)
}
OWN = "weaver"
GGUF = "gguf"
# What ``--to`` takes. GGUF is glm4_moe in another container.
NAMES = (*TARGETS, GGUF, OWN)


def stock_target(name: str) -> Target:
    """The architecture of a target: that of GGUF is ``glm4_moe``."""
    return TARGETS["glm4-moe" if name == GGUF else name]


def obstacles(name: str, checkpoint: ConvertedCheckpoint, dtype: torch.dtype) -> list[Obstacle]:
    """List the model's features that a stock target cannot hold, with weights of ``dtype``."""
    if checkpoint.two_level:
        return [_TWO_LEVELS]
    return stock_target(name).obstacles(checkpoint, dtype)


_TWO_LEVELS = Obstacle(
    "experts inside experts",
    "a layer of a stock architecture has one router",
    f"--to {OWN}",
)


def choose(checkpoint: ConvertedCheckpoint, dtype: torch.dtype) -> tuple[str, str]:
    """The best target that holds a model exactly, with weights of a dtype, and why.

    Returns:
        Name of the target and the reason, one sentence.
    """
    reasons: list[str] = []
    for name in TARGETS:
        found = obstacles(name, checkpoint, dtype)
        if not found:
            before = f"; {'; '.join(reasons)}" if reasons else ""
            return name, f"{name} holds the model exactly and runs without weaver{before}"
        reasons.append(f"{name} cannot hold {found[0].what} ({found[0].why})")
    return OWN, f"{'; '.join(reasons)}: weaver's own type holds everything"


def check(name: str, found: list[Obstacle], *, approximate: bool) -> list[str]:
    """Return the approximations of an export, one line per obstacle, or refuse the export.

    Args:
        name: of the target, for messages.
        found: its obstacles.
        approximate: whether approximations are allowed.

    Raises:
        WeaverError: something cannot be held, and is not approximated or nothing comes close.
    """
    hard = [obstacle for obstacle in found if obstacle.approximation is None]
    if hard or (found and not approximate):
        first = (hard or found)[0]
        more = "" if len(found) == 1 else f" (and {len(found) - 1} more)"
        soft = "" if hard else "; or --approximate, which measures what it costs"
        raise WeaverError(
            f"{name} cannot hold {first.what}{more}", why=first.why, fix=f"{first.fix}{soft}"
        )
    return [f"{obstacle.what}: {obstacle.approximation}" for obstacle in found]
