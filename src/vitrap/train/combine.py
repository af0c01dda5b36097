"""Making one step of several loss terms: by fixed weights, by learned ones, or by projecting conflicting gradients."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrap.contracts import Objective
from vitrap.tensors.projection import project_conflicts


class Combination:
    """How the terms of an objective become gradients; one for each training.

    "fixed": the terms are added with the objective's weights w.
    "learned": a weighted term becomes `exp(-s) w L + s`, s learned along with the model from 0 (Kendall, Gal, Cipolla:
    "Multi-Task Learning Using Uncertainty", CVPR 2018, https://arxiv.org/abs/1705.07115). For L > 0 this has its
    minimum 1 + ln(w L) at s = ln(w L): no weight falls below 0, and none grows beyond 1 / L. How far s comes is up to
    the recipe: it learns at the model's own rate, a few units over some thousand steps at 1e-3.
    "projected": weighted terms' gradients lose what conflicts with another's (PCGrad); the order is drawn.

    Attributes:
        weights: what is trained of the model.
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
        """What is learned beside the model."""
        return list(self._scale.values())

    def learned(self) -> dict[str, float]:
        """The factor `exp(-s)` that each term has by now."""
        return {f"weight of {name}": scale.detach().neg().exp().item() for name, scale in self._scale.items()}

    def backward(self, terms: Mapping[str, Float[Tensor, ""]]) -> None:
        """Leave in each parameter's `grad` what the terms together ask of it."""
        parts = [self._part(name, term) for name, term in terms.items()]
        if self._objective.combine == "projected" and len(parts) > 1:
            self._project(parts)
        else:
            (parts[0] if len(parts) == 1 else torch.stack(parts).sum()).backward()

    def _part(self, name: str, term: Float[Tensor, ""]) -> Float[Tensor, ""]:
        weights = self._objective.weights
        weighted = weights[name] * term if name in weights else term
        scale = self._scale.get(name)
        return weighted if scale is None else (-scale).exp() * weighted + scale

    def _project(self, parts: Sequence[Float[Tensor, ""]]) -> None:
        weights = self.weights
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(p, weights, retain_graph=True, materialize_grads=True)])
            for p in parts
        ]
        order = torch.stack([torch.randperm(len(parts), generator=self._order) for _ in parts])
        flat = project_conflicts(torch.stack(rows), order)
        for weight, gradient in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
            weight.grad = gradient.view_as(weight)
