"""Claims and the runs beside them."""

from typing import Any

import pytest

from tests.report.made import found, record, to_record
from vitrap import registry
from vitrap.report.page.claims import Claim, comparable_runs, model_of, read_papers, unlike
from vitrap.report.page.summary import to_runs

CLAIM = Claim("asr", 99.85, "%", "CIFAR-10", "ViT-b", "all of it", "paper", "table 1", "")


def test_every_attack_has_its_paper() -> None:
    papers = {paper.attack: paper for paper in read_papers()}
    assert sorted(papers) == registry.names("attacks")
    assert [(c.measure, c.value) for c in papers["ageb"].claims] == [("asr", 99.85), ("cda", 98.63)]
    assert papers["badnets"].claims == ()


@pytest.mark.parametrize(
    ("attack", "data", "stands"),
    [("ageb", "cifar10", 1), ("ageb", "cifar100", 0), ("badnets", "cifar10", 0), ("ageb", "npy:CIFAR-10", 0)],
)
def test_beside_a_claim_stands_the_same_attack_on_the_same_data(attack: str, data: str, stands: int) -> None:
    assert len(comparable_runs(CLAIM, "ageb", to_runs([found(record(attack=attack, data=data))]))) == stands


def test_a_claim_for_one_of_several_data_sets_says_so() -> None:
    claim = Claim(
        "asr", 100, "%", "CIFAR-10, GTSRB: which of them, not known here", "not known here", "x", "paper", "", ""
    )
    (ours,) = comparable_runs(claim, "ageb", to_runs([found(record(attack="ageb", data="gtsrb"))]))
    assert "which data the claim is for is not known" in ours.unlike
    assert "the claim's model is not known" in ours.unlike


def changed(**parts: Any) -> dict[str, Any]:
    content = record(attack="ageb", **parts)
    content["models"]["victim"] |= {"name": "vit_base_patch16_224", "overrides": {}}
    return content


def test_the_model_of_a_claim_is_known_by_its_size() -> None:
    assert "model differs" in unlike(CLAIM, to_record(record(attack="ageb")))
    assert unlike(CLAIM, to_record(changed())) == ["settings not compared further"]


def test_a_changed_model_is_another() -> None:
    content = changed()
    content["models"]["victim"]["overrides"] = {"depth": 2}
    assert "model differs" in unlike(CLAIM, to_record(content))


def test_setting_and_limit_that_differ_are_named() -> None:
    content = changed(setting="clean-label")
    content["spec"]["data"]["limit"] = 500
    assert unlike(CLAIM, to_record(content)) == ["setting differs: clean-label", "trained on 500 images"]


def test_a_model_in_a_line() -> None:
    assert model_of(to_record(record())) == "vit_tiny_patch16_224, depth 4, from scratch"


def test_a_model_given_from_outside_is_named_by_its_class() -> None:
    assert model_of(to_record(record() | {"models": {"victim": {"module": "Mine"}}})) == "Mine"


def test_a_model_that_is_not_recorded_is_the_specs() -> None:
    content = record()
    del content["models"]
    assert model_of(to_record(content)) == "vit_tiny_patch16_224, depth 4, from scratch"
    del content["spec"]["model"]
    assert model_of(to_record(content)) == "network not recorded, from scratch"
