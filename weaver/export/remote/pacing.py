"""Stands for ``weaver/models/pacing.py``, whose text an export carries under this name."""

from weaver.models.pacing import PacedLayer, Pacer, pace

__all__ = ["PacedLayer", "Pacer", "pace"]
