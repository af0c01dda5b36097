"""What is measured of a victim: base rates of networks and triggers that do nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitrap.contracts import AllToAll, AllToOne, Goal, Images, SourceToTarget
from vitrap.data.sources import open_data
from vitrap.experiment.measure import Backdoor, measure_victim
from vitrap.metrics.diagnosis import diagnose, in_short
from vitrap.metrics.values import Measures
from vitrap.train.arithmetic import Arithmetic


class Constant(nn.Module):
    """Puts every image in one class."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, images: Images) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), self.label), 10).float()


class Some(nn.Module):
    """A linear network that was never trained."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(3 * 16 * 16, 10)

    def forward(self, images: Images) -> Tensor:
        return self.head(images.flatten(1))


def unchanged(images: Images) -> Images:
    return images


def measured(victim: nn.Module, twin: nn.Module, trigger: Callable[[Images], Images], goal: Goal) -> Measures:
    test = open_data("digits", limit=100).test
    return measure_victim(victim.eval(), twin.eval(), test, Backdoor(trigger, goal), Arithmetic())


@pytest.mark.parametrize("goal", [AllToOne(3), AllToAll(10), SourceToTarget(1, 3)], ids=["one", "all", "source"])
def test_a_trigger_that_changes_nothing_leaves_the_victim_as_it_is(goal: Goal) -> None:
    found = measured(Some(), Constant(0), unchanged, goal)
    assert found.asr == found.asr_clean_images
    assert {"the trigger changes no pixel", "the trigger is not embedded"} <= set(in_short(diagnose(found, 10)))


@pytest.mark.parametrize("label", [0, 3])
@pytest.mark.parametrize("trigger", [unchanged, torch.zeros_like], ids=["none", "black"])
def test_a_victim_that_puts_everything_in_one_class_has_no_backdoor(
    label: int, trigger: Callable[[Images], Images]
) -> None:
    found = measured(Constant(label), Constant(1), trigger, AllToOne(3))
    labels = open_data("digits", limit=100).test.labels.tolist()
    assert found.majority == max(map(labels.count, set(labels))) / len(labels)
    faults = in_short(diagnose(found, 10))
    assert faults[:2] == ("the victim is at chance", "the clean twin is at chance")
    assert "the trigger is not embedded" in faults
