"""Where each failure signature begins, by hand."""

import pytest

from vitrap.metrics.diagnosis import diagnose, in_a_line, in_short
from vitrap.metrics.values import Centre, Measures, Rate, Stealth


def victim(asr: float = 0.9, base: float = 0.1, cda: float = 0.9, twin: float = 0.9, psnr: float = 30.0) -> Measures:
    def rate(value: float) -> Rate:
        return Rate(value, 0.0, 1.0, 100)

    centre = Centre(psnr, psnr)
    stealth = Stealth(centre, centre, centre, centre, None, 100)
    return Measures(rate(cda), rate(asr), rate(0.0), rate(base), rate(twin), stealth)


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
    assert diagnose(victim(**change)) == said


def test_in_a_line_and_in_short() -> None:
    assert in_a_line(()).startswith("the backdoor is in")
    found = diagnose(victim(0.1, 0.1, 0.5, 0.9, 10.0))
    assert in_a_line(found).count("; ") == 2
    assert in_short(found) == ("the trigger is not embedded", "clean images suffer", "the trigger shows")
