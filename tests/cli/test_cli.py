"""The command from a shell: what it prints where, its exit codes, and that it loads no more than it needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from io import StringIO
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.cli.conftest import TINY, Said, command, vitrap
from tests.waiting import wait_until
from vitrap import __version__, registry
from vitrap.attacks.ageb import Ageb
from vitrap.cli import console
from vitrap.cli.main import ELSEWHERE
from vitrap.data.cache import DATASETS
from vitrap.experiment.record import Record
from vitrap.models.families import listed

Call = Callable[..., Said]


def test_the_version() -> None:
    done = vitrap("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vitrap {__version__}\n", "")


def test_python_m_is_the_command_and_h_is_help() -> None:
    done = subprocess.run([sys.executable, "-m", "vitrap", "run", "-h"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Implant a backdoor as a spec says" in done.stdout


def test_off_a_terminal_a_step_is_told_in_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    told = StringIO()
    monkeypatch.setattr(console, "err", Console(file=told, force_terminal=False))
    monkeypatch.setattr(console, "EVERY", 0.01)
    with console.ProgressBars() as bars, bars.step("train the victim", 4) as tick, bars.step("fit", None):
        tick()
        wait_until(lambda: "train the victim: 1 of 4, 0 s so far\nfit: 0 s so far\n" in told.getvalue())
    before = told.getvalue().count("so far")
    sleep(0.1)
    assert told.getvalue().count("so far") == before, "it goes on when all is done"


def test_on_a_terminal_there_are_bars_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = StringIO()
    monkeypatch.setattr(console, "err", Console(file=told, force_terminal=True))
    monkeypatch.setattr(console, "EVERY", 0.01)
    with console.ProgressBars() as bars, bars.step("train the victim", 4):
        sleep(0.1)
    assert "so far" not in told.getvalue()


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("attacks", registry.names("attacks")),
        ("defences", registry.names("defences")),
        ("models", listed()),
        ("data", DATASETS | ELSEWHERE),
    ],
)
def test_lists_name_everything(call: Call, what: str, names: list[str]) -> None:
    said = call("list", what)
    assert (said.code, said.err) == (0, "")
    assert set(names) <= {line.split()[0] for line in said.out.splitlines() if line[:1].strip()}


@pytest.fixture(scope="module")
def explained() -> str:
    done = vitrap("explain", "ageb")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_explain_names_the_paper_and_the_threat(explained: str) -> None:
    assert explained.startswith(f"ageb: {Ageb.card.title}\n")
    assert "GLOBECOM, 2024, https://arxiv.org/abs/2410.22678" in explained
    assert "threat: the attacker controls the data; labels: dirty; surrogate: needed" in explained
    assert "assumed = stated nowhere, our choice" in explained


@pytest.mark.parametrize("field", [f.name for f in fields(Ageb)])
def test_explain_has_a_row_for_every_parameter(explained: str, field: str) -> None:
    (f,) = (f for f in fields(Ageb) if f.name == field)
    about = f.metadata["param"]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in explained.splitlines()]
    assert ["symbol", "parameter", "default", "source", "meaning [unit; range]"] in rows
    (row,) = (row for row in rows if len(row) == 5 and row[1] == field)
    assert [row[0], row[2], row[3]] == [about.symbol, str(f.default), about.source]
    assert row[4].startswith(about.doc)
    assert about.unit in row[4].removeprefix(about.doc)
    assert about.range() in row[4].removeprefix(about.doc)


def test_tune_writes_what_is_fastest_into_the_spec(call: Call, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text("# mine\n[model]\nname = 'vit_tiny_patch16_224'\npatch_size = 8\nembed_dim = 16\nnum_heads = 2\n")
    said = call("tune", spec, "data.limit=100", "--device", "cpu", "--dry-run")
    assert said.code == 0, said.err
    assert "would be written" in said.out
    assert "recipe" not in spec.read_text()
    said = call("tune", spec, "data.limit=100", "--device", "cpu")
    assert said.code == 0, said.err
    assert spec.read_text().startswith("# mine\n[model]")
    assert tomllib.loads(spec.read_text())["recipe"]["precision"] in ("fp32", "bf16")
    assert "limit" not in spec.read_text()


def test_explain_says_what_a_defence_gives_and_needs(call: Call) -> None:
    said = call("explain", "psbd")
    assert said.code == 0
    assert said.out.startswith("psbd: PSBD: Prediction Shift Uncertainty Unlocks Backdoor Detection\n")
    needs = "screen: a score for each input at test time; needs a few clean images, a model with plain token attention"
    assert needs in " ".join(said.out.split())
    said = call("explain", "spectral")
    needs = "filter: a score for each training image; needs a few clean images, the training set"
    assert needs in " ".join(said.out.split())
    assert "optimizer" in call("explain", "fine_tune").out


# ---- run


def test_json_is_the_record_alone(tiny_run) -> None:
    done, out = tiny_run
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert list(record) == [f.name for f in fields(Record) if f.name not in ("contents", "last")]
    (file,) = out.glob("*/record.json")
    assert record == json.loads(file.read_text())
    assert "Warning" not in done.stderr


def at_once(seconds: float, show: Callable[[], None]) -> SimpleNamespace:
    """In place of a timer: the bars are there from the start."""
    return SimpleNamespace(start=show, cancel=lambda: None, is_alive=lambda: False)


def test_progress_goes_to_stderr_where_it_takes_long(call: Call, monkeypatch, tmp_path: Path) -> None:
    steps = ("read the data", "train the surrogate", "fit ageb", "train the victim", "train the twin", "measure")
    quick = call("run", *TINY, "--json", "--device", "cpu", "--out", tmp_path)
    assert (quick.code, quick.err) == (0, "")
    monkeypatch.setattr(console, "Timer", at_once)
    slow = call("run", *TINY, "--json", "--device", "cpu", "--out", tmp_path, "--force-all")
    assert slow.code == 0
    assert all(step in slow.err for step in steps)


@pytest.mark.parametrize("words", [["data.name=nope"], ["attack.target=99"]])
def test_a_refusal_is_the_only_line_though_bars_have_been_shown(call: Call, words: list[str], monkeypatch) -> None:
    monkeypatch.setattr(console, "Timer", at_once)
    said = call("run", *words)
    assert said.err.startswith("vitrap: ")
    assert said.err.count("\n") == 1


def test_a_second_call_prints_the_measures_at_once(call: Call, tiny_run) -> None:
    said = call("run", *TINY, "--device", "cpu", "--out", tiny_run[1])
    assert said.code == 0
    assert said.err == ""
    record = json.loads(tiny_run[0].stdout)
    for text in ("ageb-digits seed 0: 10 of 100 training images poisoned, 450 test images",
                 "attack success (ASR)",
                 "clean twin", "PSNR, dB", f"{100 * record['victim']['cda']['value']:.2f} %"):  # fmt: skip
        assert text in said.out
    assert f"ageb-digits-{record['hash']}" in said.out


def test_names_with_brackets_are_printed_as_they_are(call: Call, tiny_run) -> None:
    said = call("run", *TINY, "name=[a[", "--device", "cpu", "--out", tiny_run[1])
    assert said.code == 0
    assert said.out.startswith("[a[ seed 0: ")
    said = call("run", *TINY, "name=x[bold]y[-red]", "--device", "cpu", "--out", tiny_run[1])
    assert said.out.startswith("x[bold]y[-red] seed 0: ")


def test_a_spec_and_overrides(call: Call, tiny_run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\n[data]\nlimit = 50')
    said = call("run", tmp_path / "mine.toml", *TINY, "--json", "--device", "cpu", "--out", tiny_run[1])
    assert json.loads(said.out)["spec"]["data"]["limit"] == 100
    assert json.loads(said.out)["name"] == "mine"


# ---- defend and poison


def test_defend_prints_a_row_and_the_same_again(call: Call, tiny_run, tmp_path: Path) -> None:
    out = shutil.copytree(tiny_run[1], tmp_path / "runs")
    folder = out / f"ageb-digits-{json.loads(tiny_run[0].stdout)['hash']}"
    words = ["defend", folder, "--defence", "strip", "overlays=2", "--device", "cpu"]
    said = call(*words)
    assert said.code == 0, said.err
    assert said.out.startswith("strip (overlays = 2")
    for text in ("AUROC, no backdoor", "no backdoor (", "needs 100 held-out", "clean twin", "405 / 450"):
        assert text in said.out
    row = call(*words, "--json")
    assert row.err == ""
    assert json.loads((folder / "record.json").read_text())["defences"] == [json.loads(row.out)]
    shown = call("run", *TINY, "--device", "cpu", "--out", out)
    assert "strip (overlays = 2" in shown.out


def test_poison_writes_a_data_set(call: Call, tiny_run, tmp_path: Path) -> None:
    said = call("poison", *TINY, "-o", tmp_path / "set", "--out", tiny_run[1], "--device", "cpu")
    assert said.code == 0, said.err
    assert said.out == f"poisoned data set: {tmp_path / 'set'}\n"
    assert (tmp_path / "set" / "train_poisoned.npy").exists()


# ---- usage


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--ouut", "x"],
        ["run", "--out"],
        ["walk"],
        ["list"],
        ["explain"],
        ["data", "prepare"],
        ["defend"],
        ["defend", "x"],
        ["poison"],
    ],  # fmt: skip
)
def test_a_wrong_use_is_exit_code_2(call: Call, words: list[str]) -> None:
    said = call(*words)
    assert said.code == 2
    assert said.out == ""
    assert "Error" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["data", "--help"]])
def test_help_is_no_mistake(call: Call, words: list[str]) -> None:
    said = call(*words)
    assert (said.code, said.err) == (0, "")
    assert "Usage: vitrap" in said.out


# ---- how the process ends


ENDING = """
import atexit, sys
from vitrap.cli.main import process
atexit.register(print, "exit functions had their turn")
sys.argv = ["vitrap", *sys.argv[1:]]
process()
print("still here")
"""


@pytest.mark.parametrize(("words", "code"), [(["list", "attacks"], 0), (["run", "gone.toml"], 2), (["nothing"], 2)])
def test_a_process_ends_with_all_said_and_its_code(words: list[str], code: int) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", ENDING, *words], capture_output=True, text=True, env=buffered)
    assert done.returncode == code
    assert done.stdout.endswith("exit functions had their turn\n")
    assert ("ageb" in done.stdout) == (code == 0)
    assert bool(done.stderr) == (code != 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_printed_is_a_failure_of_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("list", "attacks"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("vitrap: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("closing", "words", "code"), [(">&-", "list attacks", 0), ("2>&-", "run gone.toml", 2)])
def test_a_closed_stream_is_no_failure(closing: str, words: str, code: int) -> None:
    line = f'"{sys.executable}" -m vitrap.cli.main {words} {closing}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_reader_that_has_gone_gets_no_traceback() -> None:
    process = subprocess.Popen(command("list", "attacks"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == ("", 1)
    process.stderr.close()


# ---- what is loaded


WATCH = """
import sys
from vitrap.cli.main import main
sys.argv = ["vitrap", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    loaded = {"torch", "timm", "torchvision", "matplotlib", "sklearn"} & set(sys.modules)
    sys.exit(f"loaded {loaded}" if loaded else end.code)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["--version"], 0),
        (["list", "attacks"], 0),
        (["list", "defences"], 0),
        (["list", "models"], 0),
        (["list", "data"], 0),
        (["defend", "gone", "--defence", "strop"], 2),
        (["run", "gone.toml"], 2),
        (["run", "broken.toml"], 2),
        (["run", "sed=1"], 2),
        (["run", "attack.name=agbe"], 2),
        (["run", "recipe.epochs=0"], 2),
        (["run", "recipe.lr=nan"], 2),
        (["run", "model.pretrained=3"], 2),
    ],
)
def test_torch_is_loaded_only_to_compute(tmp_path: Path, words: list[str], code: int) -> None:
    (tmp_path / "broken.toml").write_text("name =")
    done = subprocess.run([sys.executable, "-c", WATCH, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr


def test_the_package_itself_loads_nothing() -> None:
    code = "import sys, vitrap; dir(vitrap); sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- real data, where it is at hand


@pytest.mark.skipif("VITRAP_DATA" not in os.environ, reason="VITRAP_DATA names no data cache")
@pytest.mark.parametrize(("name", "limit", "classes"), [("gtsrb", 2000, 43), ("cifar10", 500, 10)])
@pytest.mark.parametrize("attack", ["ageb", "badnets"])
def test_a_smoke_run_on_real_images(
    call: Call, tmp_path_factory: pytest.TempPathFactory, name: str, limit: int, classes: int, attack: str
) -> None:
    out = tmp_path_factory.getbasetemp() / "smoke"
    words = [*TINY, f"data.name={name}", f"data.limit={limit}", f"attack.name={attack}", "attack.target=1"]
    said = call("run", *words, "--json", "--device", "cpu", "--out", out)
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert record["data"]["classes"] == classes
    assert 0 < record["data"]["n_train"] <= limit
    assert record["data"]["n_poisoned"] == round(0.1 * record["data"]["n_train"])
    assert record["data"]["n_test"] == record["victim"]["cda"]["n"] == {"gtsrb": 12_630, "cifar10": 10_000}[name]
    assert record["spec"]["data"]["limit"] == limit


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["s.toml", "seed=1"], "s.toml"),
        (["seed=1"], None),
        (["attack.picture=a/b.png"], None),
        (["./a=b/s.toml", "seed=1"], "./a=b/s.toml"),
        (["there=1.toml", "seed=1"], "there=1.toml"),
        (["gone=1.toml", "seed=1"], None),
        (["x" * 5000], "x" * 5000),
        ([], None),
    ],
)
def test_a_path_may_have_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], path: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there=1.toml").touch()
    found = console.split(words)
    assert found == (Path(path) if path else None, words[1:] if path else words)
