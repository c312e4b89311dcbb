"""weaver: dense GLU language models into Mixture-of-Experts models, without training.

Use::

    import weaver

    run = weaver.convert("models/smollm2-135m", "runs/x", sparsity=0.25)
    model, tokenizer = weaver.load(run)

``weaver.register()`` makes transformers' ``AutoModelForCausalLM.from_pretrained`` load converted
models by itself. Names are imported when they are first used (PEP 562), so that ``import weaver``
does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weaver.api import Run, convert, load
    from weaver.errors import WeaverError
    from weaver.models.hf import register

__all__ = ["Run", "WeaverError", "convert", "load", "register"]

_MODULES = {
    "Run": "weaver.api",
    "convert": "weaver.api",
    "load": "weaver.api",
    "register": "weaver.models.hf",
    "WeaverError": "weaver.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'weaver' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
