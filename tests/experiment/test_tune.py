"""`vitrap tune`: what is chosen from times, where it is written, and that nothing else changes."""

import math
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiment.conftest import tiny
from vitrap.errors import UserError
from vitrap.experiment import tune as tuning
from vitrap.experiment.defend import defend
from vitrap.experiment.plan import make_plan
from vitrap.experiment.run import run
from vitrap.experiment.spec import load_defence, load_spec, parse_spec
from vitrap.experiment.tune import COMPILED, PLAIN, fastest, name_of, time_ways, tune, with_recipe
from vitrap.models.classifier import Classifier
from vitrap.train import arithmetic
from vitrap.train.arithmetic import Arithmetic

CPU = torch.device("cpu")
EVEN = {name_of(way): 1.0 for way in PLAIN}
SPEC = {
    "name": "tiny",
    "data": {"name": "digits"},
    "model": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "attack": {"name": "badnets"},
}
TOML = """# why this is so
name = "tiny"    # a name
[recipe]
epochs = 1
precision = "fp32"  # pinned
[attack]
name = "badnets"
"""


def test_the_fastest_is_taken_and_of_near_ties_the_plainest() -> None:
    assert fastest(EVEN, 1) == Arithmetic("fp32", "fused")
    assert fastest({**EVEN, "bf16 eager": 0.95}, 1) == Arithmetic("fp32", "fused")
    assert fastest({**EVEN, "bf16 eager": 0.5}, 1) == Arithmetic("bf16", "eager")
    assert fastest({**EVEN, "bf16 eager": 0.5, "fp32 eager": 0.54}, 1) == Arithmetic("fp32", "eager")
    assert fastest({"bf16 fused": 3.0}, 1) == Arithmetic("bf16", "fused")


def test_a_compilation_must_pay_for_itself() -> None:
    seconds = {**EVEN, "bf16 fused": 0.01, name_of(COMPILED[0]): 0.005, f"{name_of(COMPILED[0])} first": 40.0}
    assert fastest(seconds, 1000) == Arithmetic("bf16", "fused")
    assert fastest(seconds, 12_000) == Arithmetic("bf16", "fused")  # 80 s of compiling, 60 s saved
    assert fastest(seconds, 100_000) == Arithmetic("bf16", "fused", compiled=True)


def test_every_way_is_timed_and_the_model_stays_as_it_was(tiny_vit: Any) -> None:
    model: Classifier = tiny_vit(proj_drop_rate=0.2).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    seconds = time_ways(model, (3, 16, 10), 8, CPU)
    assert seconds.keys() == EVEN.keys()
    assert all(0 < took < math.inf for took in seconds.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not any(w.requires_grad for w in model.parameters())


def test_a_way_that_fails_is_no_way(tiny_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(step: Any, way: Arithmetic, *rest: Any) -> Any:
        if way.precision == "bf16":
            raise torch.OutOfMemoryError
        return lambda: None

    monkeypatch.setattr(tuning, "_step", none)
    assert time_ways(tiny_vit(), (3, 16, 10), 8, CPU).keys() == {"fp32 fused", "fp32 eager"}


def test_where_nothing_fits_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match=r"lower recipe\.batch_size"):
        fastest({}, 10)


def test_grey_images_are_timed_as_such() -> None:
    grey = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1 * 8 * 8, 4))
    assert time_ways(grey, (1, 8, 4), 8, CPU).keys() == EVEN.keys()


def test_the_choice_is_written_into_the_recipe_and_all_else_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "time_ways", lambda *_: {**EVEN, "bf16 eager": 0.5})
    file = tmp_path / "spec.toml"
    file.write_text(TOML, "utf-8")
    assert tune(file, device="cpu", write=False).arithmetic == Arithmetic("bf16", "eager")
    assert file.read_text("utf-8") == TOML
    assert tune(file, device="cpu").arithmetic == Arithmetic("bf16", "eager")
    assert file.read_text("utf-8") == TOML.replace(
        'precision = "fp32"  # pinned\n', 'precision = "bf16"  # pinned\nattention = "eager"\ncompiled = false\n'
    )
    assert make_plan(load_spec(file), "cpu").arithmetic == Arithmetic("bf16", "eager")


def test_a_spec_without_a_recipe_gets_one() -> None:
    text = with_recipe('name = "a"\n', {"precision": "bf16"})
    assert tomllib.loads(text) == {"name": "a", "recipe": {"precision": "bf16"}}


def plan(**recipe: Any) -> Any:
    return make_plan(parse_spec({**SPEC, "recipe": {"epochs": 1, **recipe}}), "cpu")


def test_a_plan_goes_by_the_rule_and_its_keys_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "WIDE", 16)
    monkeypatch.setattr(arithmetic, "has_bf16", lambda device: True)
    chosen = plan()
    assert chosen.arithmetic == Arithmetic("bf16", "eager")
    depends = chosen.twin_stage().depends
    assert depends["arithmetic"] == {"precision": "bf16", "attention": "eager", "compiled": False}
    assert not {"precision", "attention", "compiled"} & depends["recipe"].keys()
    # What it comes to decides, not how it was said.
    assert chosen.keys() == plan(precision="bf16").keys() == plan(precision="bf16", attention="eager").keys()
    assert chosen.keys() != plan(precision="bf16", attention="fused").keys()


def test_a_defence_takes_the_arithmetic_of_its_run(tmp_path: Path) -> None:
    """Even where this machine would choose otherwise by now: a twin that was deleted comes back under its key."""
    spec = tiny("attack.name=badnets", "recipe.precision=fp32", "recipe.attention=eager")
    made = run(spec, tmp_path / "runs", device="cpu")
    assert (made.precision, made.attention, made.compiled) == ("fp32", "eager", False)
    shutil.rmtree(tmp_path / "runs" / "stages")
    folder = tmp_path / "runs" / f"{made.name}-{made.hash}"
    (row,) = defend(folder, [load_defence("max_softmax", [])], device="cpu").defences
    assert row.name == "max_softmax"
    assert (tmp_path / "runs" / "stages" / f"clean-{made.stages['twin']}").is_dir()
