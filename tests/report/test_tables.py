"""The lines of a row of defences, as the command line and the report show them."""

from typing import Any

import pytest

from tests.report.made import judgement, rate, repair, screen, sift, to_row
from vitrap.report.tables import defence_measures


@pytest.mark.parametrize("content", [screen(), sift(), repair(), judgement()], ids=lambda row: row["kind"])
def test_auroc_and_der_are_marked_where_there_is_no_backdoor(content: dict[str, Any]) -> None:
    sound = [name for name, *_ in defence_measures(to_row(content))]
    marked = [name for name, *_ in defence_measures(to_row(content), backdoor=False)]
    assert not any("no backdoor" in name for name in sound)
    assert marked == [f"{name}, no backdoor" if name.startswith(("AUROC", "DER")) else name for name in sound]


def test_a_rate_that_nothing_resolves_is_none_and_says_what_it_needs() -> None:
    tables = dict.fromkeys(("tpr_at_fpr", "fpr_on_test", "tpr_at_fpr_on_hits", "fpr_on_clean_model"))
    rates = {table: {"0.01": rate(0.7), "0.05": rate(0.8)} for table in tables}
    lines = defence_measures(to_row({**screen(), **rates, "n_threshold": 20}))
    assert ("held-out images, for thresholds", "", "", "20") in lines
    assert ("TPR at 1 % FPR", "needs 100 held-out images, has 20", "", "") in lines
    assert [name for name, *_ in lines].count("  FPR then on clean test images") == 1
    assert ("TPR at 5 % FPR", "80.00 % [78.00, 82.00]", "", "1000") in lines
