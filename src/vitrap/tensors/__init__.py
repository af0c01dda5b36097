"""Pure functions of tensors: torch in, torch out, no state, nothing of vitrap's above."""

from vitrap.tensors.morphology import element, erode

__all__ = ["element", "erode"]
