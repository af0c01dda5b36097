"""Pure functions of tensors: torch in, torch out, without state; they know nothing else of vitrap."""

from vitrap.tensors.morphology import element, erode

__all__ = ["element", "erode"]
