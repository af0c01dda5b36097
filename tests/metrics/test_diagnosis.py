"""Where each failure signature begins, by hand, and what no model and no trigger can get past."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrap.metrics.diagnosis import backdoor_faults, diagnose, in_a_line, in_short
from vitrap.metrics.interval import wilson
from vitrap.metrics.values import Centre, Measures, Rate, Stealth


def victim(asr: float = 0.9, base: float = 0.1, cda: float = 0.9, twin: float = 0.9, psnr: float = 30.0) -> Measures:
    def rate(value: float) -> Rate:
        return wilson(round(value * 100_000), 100_000)

    centre = Centre(psnr, psnr)
    stealth = Stealth(centre, centre, centre, centre, None, 100)
    return Measures(rate(cda), rate(asr), rate(0.0), rate(base), rate(twin), stealth)


def changing(mean: float, median: float) -> Measures:
    """A victim whose trigger changes pixels by so much."""
    good = victim()
    return replace(good, stealth=replace(good.stealth, linf=Centre(mean, median)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ()),
        ({"asr": 0.59}, ("the trigger is not embedded (ASR only 49.0 points above the clean twin's)",)),
        ({"asr": 0.61}, ()),
        ({"asr": 0.9, "base": 0.8}, ("the trigger is not embedded (ASR only 10.0 points above the clean twin's)",)),
        ({"cda": 0.875}, ("clean images suffer (CDA 2.5 points under the clean twin's)",)),
        ({"cda": 0.885}, ()),
        ({"psnr": 19.9}, ("the trigger shows (PSNR 19.9 dB)",)),
        ({"psnr": 20.1}, ()),
    ],
)
def test_each_signature_begins_at_its_threshold(change: dict[str, float], said: tuple[str, ...]) -> None:
    assert diagnose(victim(**change), 10) == said


@pytest.mark.parametrize(
    ("measures", "classes", "said"),
    [
        (victim(cda=0.1, twin=0.1), 10, ("the victim is at chance", "the clean twin is at chance")),
        (victim(cda=0.105, twin=0.105), 10, ()),
        (victim(cda=0.105, twin=0.9), 9, ("the victim is at chance",)),
        (victim(twin=0.1), 10, ("the clean twin is at chance",)),
        (replace(victim(), cda=wilson(4, 5)), 2, ("the victim is at chance",)),  # 4 of 5 may be luck
        (replace(victim(cda=0.6, twin=0.61), majority=0.6), 10, ("the victim is at chance",)),
        (replace(victim(), majority=0.89), 10, ()),
        (changing(0.0, 0.0), 10, ("the trigger changes no pixel",)),
        (changing(3.0, 0.0), 10, ("the trigger changes no pixel",)),
        (changing(0.5, 1.0), 10, ()),
        (replace(victim(), asr_clean_images=wilson(1, 900)), 10, ()),
        (replace(victim(), asr_clean_images=wilson(890, 900)), 10, ("the trigger is not embedded",)),
        (replace(victim(), asr=wilson(3, 5), asr_clean_model=wilson(0, 5)), 10, ("the trigger is not embedded",)),
        (replace(victim(), asr=wilson(60, 100), asr_clean_model=wilson(0, 100)), 2, ()),
        (replace(victim(base=0.0), asr=wilson(55, 100)), 2, ("the trigger is not embedded",)),
        (replace(victim(), asr=wilson(0, 0), asr_clean_model=wilson(0, 0)), 10, ("the trigger is not embedded",)),
    ],
)
def test_a_backdoor_beats_chance_the_twin_and_the_missing_trigger(
    measures: Measures, classes: int, said: tuple[str, ...]
) -> None:
    assert in_short(backdoor_faults(measures, classes)) == said


def test_a_trigger_that_is_not_embedded_says_what_it_does_not_beat() -> None:
    (fault,) = backdoor_faults(replace(victim(0.05, 0.04), asr_clean_images=wilson(30, 1000)), 10)
    assert fault == (
        "the trigger is not embedded (ASR only 1.0 points above the clean twin's, only 2.0 points above that without"
        " the trigger, 5.0 % [4.9, 5.1] not surely above chance, 10.0 %)"
    )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 4))
def test_whatever_puts_everything_in_one_class_is_at_chance(labels: list[int], named: int) -> None:
    """Whichever class that is, and however uneven the classes are."""
    right = wilson(labels.count(named), len(labels))
    measures = replace(victim(), cda=right, majority=max(Counter(labels).values()) / len(labels))
    assert "the victim is at chance" in in_short(diagnose(measures, 5))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_whatever_says_the_same_without_the_trigger_has_no_backdoor(hits: tuple[int, int]) -> None:
    asr = wilson(*hits)
    assert "the trigger is not embedded" in in_short(diagnose(replace(victim(), asr=asr, asr_clean_images=asr), 10))


def test_in_a_line_and_in_short() -> None:
    assert in_a_line(()).startswith("the backdoor is in")
    found = diagnose(victim(0.2, 0.1, 0.5, 0.9, 10.0), 10)
    assert in_a_line(found).count("; ") == 2
    assert in_short(found) == ("the trigger is not embedded", "clean images suffer", "the trigger shows")
