"""Combines several loss terms into one gradient: by fixed weights, learned weights, or projection (PCGrad)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.contracts import Objective
from vitrap.tensors.projection import project_conflicts


class Combination:
    """Turns the loss terms of an objective into gradients; each training has one.

    "fixed": the terms are added with the objective's weights w.
    "learned": a weighted term becomes `exp(-s) w L + s`, s learned along with the model from 0 (Kendall, Gal, Cipolla:
    "Multi-Task Learning Using Uncertainty", CVPR 2018, https://arxiv.org/abs/1705.07115). For L > 0 this has its
    minimum 1 + ln(w L) at s = ln(w L): no weight falls below 0, and none grows beyond 1 / L. How far s comes is up to
    the recipe: it learns at the model's own rate, a few units over some thousand steps at 1e-3.
    "projected": of each weighted term's gradient, the part that conflicts with another term's is removed (PCGrad);
    the order of the others is drawn.

    Attributes:
        weights: the trained weights of the model.
        scales: the parameters s, for the optimiser.
    """

    def __init__(self, objective: Objective, weights: Sequence[nn.Parameter], order: torch.Generator) -> None:
        self.weights = [w for w in weights if w.requires_grad]
        self._objective, self._order = objective, order
        device = self.weights[0].device if self.weights else None
        learns = objective.combine == "learned"
        self._scale = {k: nn.Parameter(torch.zeros((), device=device)) for k in objective.weights if learns}

    @property
    def scales(self) -> list[nn.Parameter]:
        """The parameters s, which are learned along with the model; none unless weights are learned."""
        return list(self._scale.values())

    def learned(self) -> dict[str, float]:
        """The present factor `exp(-s)` of each term, for the curves."""
        return {f"weight of {name}": scale.detach().neg().exp().item() for name, scale in self._scale.items()}

    def backward(self, terms: Mapping[str, Float[Tensor, ""]]) -> None:
        """Write the gradient of all terms together into each parameter's `grad`."""
        parts = [self._part(name, term) for name, term in terms.items()]
        if self._objective.combine == "projected" and len(parts) > 1:
            self._project(parts)
        else:
            (parts[0] if len(parts) == 1 else torch.stack(parts).sum()).backward()

    def _part(self, name: str, term: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """A term with its fixed and its learned weight."""
        weights = self._objective.weights
        weighted = weights[name] * term if name in weights else term
        scale = self._scale.get(name)
        return weighted if scale is None else (-scale).exp() * weighted + scale

    def _project(self, parts: Sequence[Float[Tensor, ""]]) -> None:
        """Write the sum of the projected gradients into each weight's `grad`."""
        weights = self.weights
        # One row for each term: its gradient by all weights, flattened.
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(p, weights, retain_graph=True, materialize_grads=True)])
            for p in parts
        ]
        # In which order each row meets the others, drawn again in every step.
        order = torch.stack([torch.randperm(len(parts), generator=self._order) for _ in parts])
        flat = project_conflicts(torch.stack(rows), order)
        for weight, gradient in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
            weight.grad = gradient.view_as(weight)
