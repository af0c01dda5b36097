"""Records as one table, against numbers put in by hand."""

import json
import warnings
from pathlib import Path
from typing import Any

import pandas
import pytest

import vitrap
from tests.report import made
from vitrap.errors import UserError


def record(name: str = "one", seed: int = 0, **more: Any) -> dict[str, Any]:
    """A record whose rates are 1 to 5 of 10, and whose seconds are none."""
    content = made.record(name, seed=seed)
    for hits, key in enumerate(("cda", "asr", "ra", "asr_clean_model", "cda_clean_model"), 1):
        content["victim"][key] = rate(hits, 10)
    content["victim"]["stealth"] |= {"psnr_db": {"mean": 30.0, "median": 31.0}, "n": 4}
    return {**content, "seconds": {}, "memory": None, **more}


def rate(hits: int, n: int) -> dict[str, Any]:
    return {"value": hits / n, "low": 0.0, "high": 1.0, "n": n}


def write(out: Path, content: dict[str, Any]) -> Path:
    folder = out / f"{content['name']}-{content['seed']}"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(content))
    return folder


def test_a_row_is_a_run_and_a_measure(tmp_path: Path):
    area = {"value": 0.8, "low": 0.7, "high": 0.9, "n_triggered": 4, "n_clean": 3}
    screen = made.screen("strip", overlays=5) | {"auroc": area, "tpr_at_fpr": {"0.05": rate(1, 4)}}
    few = {"name": "few", "seconds": {}, "screened": 200, "version": 1, "scores": "scores/a"}
    rows = [{**screen, "seconds": {"a": 2}}, {**screen, **few}]
    write(tmp_path, record(defences=rows, attack={"victim": {"deep": 0.5}}, seconds={"fit": 2.5}))
    write(tmp_path, record("two", 1))
    frame = vitrap.load_records(tmp_path)
    assert list(frame["run"].unique()) == ["one-0", "two-1"]
    one = frame[frame["name"] == "one"]
    assert one["seed"].eq(0).all()
    assert one["attack.poison_rate"].eq(0.1).all()
    assert "defences" not in frame
    found = {(r.defence, r.measure): (r.value, r.low, r.high, r.n) for r in one.itertuples()}
    assert found["", "asr"] == (0.2, 0.0, 1.0, 10)
    assert found["", "cda_clean_model"][0] == 0.5
    assert found["", "stealth.psnr_db"][0] == 30.0
    assert found["", "stealth.n"][0] == 4
    assert ("", "stealth.lpips") not in found
    assert found["", "attack.victim.deep"][0] == 0.5
    assert found["", "seconds.fit"][0] == 2.5
    assert found["strip", "auroc"][:3] == (0.8, 0.7, 0.9)
    assert found["strip", "tpr_at_fpr.0.05"] == (0.25, 0.0, 1.0, 4)
    assert found["strip", "seconds.a"][0] == 2
    strip = one[one["defence"] == "strip"]
    assert set(strip["defence.kind"]) == {"screen"}
    assert json.loads(strip["defence.params"].iloc[0]) == {"overlays": 5}
    few = one[one["defence"] == "few"]
    assert json.loads(few["defence.params"].iloc[0]) == {"overlays": 5, "screened": 200}
    assert {"auroc", "tpr_at_fpr.0.05", "n_threshold"} <= set(few["measure"])
    assert not {"version", "screened", "scores"} & set(few["measure"])
    assert len(frame[frame["name"] == "two"]) == 5 + 5


def test_a_run_has_its_diagnosis(tmp_path: Path):
    write(tmp_path, made.record("good"))
    write(tmp_path, made.record("bad", cda=0.1))
    frame = vitrap.load_records(tmp_path)
    assert set(frame[frame["name"] == "good"]["diagnosis"]) == {""}
    assert frame[frame["name"] == "bad"]["diagnosis"].str.startswith("the victim is at chance").all()


def test_means_over_seeds_are_a_line(tmp_path: Path):
    for seed, hits in enumerate((2, 4, 6)):
        content = record(seed=seed)
        content["victim"]["asr"] = rate(hits, 10)
        write(tmp_path, content)
    frame = vitrap.load_records(tmp_path)
    asr = frame[frame["measure"] == "asr"].groupby("attack.name")["value"]
    assert asr.mean()["badnets"] == pytest.approx(0.4)
    assert asr.std()["badnets"] == pytest.approx(0.2)


def test_a_damaged_record_is_warned_of_and_left_out(tmp_path: Path):
    write(tmp_path, record())
    (write(tmp_path, record("two")) / "record.json").write_text("{")
    with pytest.warns(UserWarning, match="is skipped: it is damaged"):
        frame = vitrap.load_records(tmp_path)
    assert set(frame["name"]) == {"one"}


def test_a_folder_without_records_is_an_empty_table(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = vitrap.load_records(tmp_path)
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 0
    assert {"run", "name", "seed", "defence", "measure", "value", "low", "high", "n"} <= set(frame)


def test_no_such_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="are not there"):
        vitrap.load_records(tmp_path / "nowhere")


def test_ten_thousand_records_keep_their_types(tmp_path: Path):
    lines = [json.dumps(record(seed=seed)) for seed in range(10_000)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    frame = vitrap.load_records(tmp_path)
    assert len(frame) == 10_000 * 10
    assert frame["seed"].nunique() == 10_000
    assert (str(frame["value"].dtype), str(frame["n"].dtype)) == ("float64", "Int64")
