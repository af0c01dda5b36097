"""Draws `pictures.png` of a run: test images clean, triggered, their difference, and the trigger's own views."""

import io

import matplotlib
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitrap.contracts import ImageSet, Shown
from vitrap.experiment.measure import Backdoor
from vitrap.experiment.predict import spread
from vitrap.printable import drawable, plain_text
from vitrap.tensors.pixels import round8
from vitrap.train.arithmetic import Arithmetic

EXAMPLES = 8
GAIN = 10
"""The difference is multiplied by this, and shown around mid-grey."""
CELL, GAP, HEAD, LETTER = 1.5, 0.05, 0.3, 0.075
"""Sizes in inches: a picture with the gap beside it, that gap, the titles, a letter of the notes on the left."""


@torch.no_grad()
def draw_examples(test: ImageSet, backdoor: Backdoor, victim: nn.Module, arithmetic: Arithmetic) -> bytes:
    """A PNG with a row for each example: clean, triggered, difference, and the trigger's own views.

    The examples are test images that count for the goal, spread evenly over the set, whatever the victim makes of them.
    """
    rows = spread(backdoor.goal.counts(test.labels).nonzero()[:, 0], EXAMPLES)
    clean = round8(test.images(rows))
    triggered = round8(backdoor.trigger(clean))
    views = dict(backdoor.trigger.views(clean)) if isinstance(backdoor.trigger, Shown) else {}
    columns = {
        "clean": _shown(clean),
        "triggered": _shown(triggered),
        f"difference × {GAIN}": _shown(0.5 + GAIN * (triggered - clean)),
        **{name: view.float().cpu() for name, view in views.items()},
    }
    with arithmetic(victim, test.device):
        before = victim(clean).argmax(1).tolist()
        after = victim(triggered).argmax(1).tolist()
    notes = [
        f"true {_name(test, t)}\nclean → {_name(test, b)}\ntriggered → {_name(test, a)}"
        for t, b, a in zip(test.labels[rows].tolist(), before, after, strict=True)
    ]
    return _grid(columns, notes)


def _shown(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w c"]:
    return images.clamp(0, 1).permute(0, 2, 3, 1).cpu()


def _name(data: ImageSet, label: int) -> str:
    """A class by its name and, where none is known, or it is empty, by its number."""
    named = data.classes[label].strip() if label < len(data.classes) else ""
    return drawable(named) or str(label)


def _grid(columns: dict[str, Tensor], notes: list[str]) -> bytes:
    longest = max(len(line) for note in notes for line in note.splitlines())
    beside = LETTER * (2 + longest)
    width = beside + CELL * len(columns)
    height = HEAD + CELL * len(notes)
    within = {"left": beside / width, "right": 1 - GAP / width, "bottom": GAP / height, "top": 1 - HEAD / height}
    apart = {"wspace": GAP / (CELL - GAP), "hspace": GAP / (CELL - GAP)}
    with plain_text(), matplotlib.rc_context({"font.size": 9, "image.interpolation": "nearest"}):
        figure = Figure(figsize=(width, height), dpi=100)
        axes = figure.subplots(len(notes), len(columns), squeeze=False, gridspec_kw={**within, **apart})
        for column, (name, pictures) in enumerate(columns.items()):
            axes[0][column].set_title(drawable(name))
            for row, picture in enumerate(pictures):
                axis = axes[row][column]
                axis.imshow(picture.numpy(), cmap="magma" if picture.ndim == 2 else None, vmin=0, vmax=1)
                axis.set_xticks([])
                axis.set_yticks([])
        for row, note in enumerate(notes):
            axes[row][0].set_ylabel(note, rotation=0, ha="right", va="center", fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": "vitrap"})
    return out.getvalue()
