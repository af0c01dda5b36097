"""Records made up for the report, whole or with hostile names."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vitrap.experiment.defence_rows import Row
from vitrap.experiment.record import Failure, Record
from vitrap.experiment.records import Found, parse

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}{% raw %}",
    "\u202egnitaerht\u202d &amp; <!-- ",
    "W" * 100,
    "'; javascript:alert(1)//\x00\x1b[31m",
)


def rate(value: float, n: int = 1000) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - 0.02), "high": min(1.0, value + 0.02), "n": n}


def auroc(value: float) -> dict[str, Any]:
    return {
        "value": value,
        "low": max(0.0, value - 0.02),
        "high": min(1.0, value + 0.02),
        "n_triggered": 100,
        "n_clean": 100,
    }


def screen(name: str = "strip", value: float = 0.9, twin: float = 0.5, **params: Any) -> dict[str, Any]:
    rates = {"0.05": rate(0.3)}
    return {
        "name": name,
        "kind": "screen",
        "params": params,
        "seconds": {"apply": 0.01, "score": 2.0},
        "layer": "",
        "report": {},
        "auroc": auroc(value),
        "tpr_at_fpr": rates,
        "fpr_on_test": rates,
        "auroc_on_hits": auroc(value),
        "tpr_at_fpr_on_hits": rates,
        "auroc_clean_model": auroc(twin),
        "fpr_on_clean_model": rates,
        "n_threshold": 100,
        "key": "0" * 16,
    }


def repair(
    name: str = "fine_tune", der: float = 0.7, cda: float = 0.8, asr: float = 0.2, **params: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "repair",
        "params": params,
        "seconds": {"apply": 12.0, "predict": 3.0},
        "layer": "",
        "report": {"lr": 0.01},
        "cda": rate(cda),
        "asr": rate(asr),
        "ra": rate(0.1),
        "before": {"cda": rate(0.9), "asr": rate(0.8), "ra": rate(0.1)},
        "der": der,
        "cda_clean_model": rate(0.8),
        "cda_clean_model_before": rate(0.9),
        "key": "1" * 16,
    }


def sift(name: str = "spectral", value: float = 0.4) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "filter",
        "params": {},
        "seconds": {"apply": 1.0, "retrain": 0.0},
        "layer": "",
        "report": {},
        "auroc": auroc(value),
        "tpr": rate(0.25),
        "fpr": rate(0.125),
        "n_flagged": 10,
        "cda_retrained": rate(0.9),
        "asr_retrained": rate(0.5),
        "ra_retrained": rate(0.1),
        "fpr_on_clean_model": rate(0.1),
        "key": "2" * 16,
    }


def judgement(name: str = "mm_bd", score: float = 0.99, backdoored: bool = True) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "judgement",
        "params": {},
        "seconds": {"apply": 1.0},
        "layer": "",
        "report": {},
        "score": score,
        "score_clean_model": 0.25,
        "threshold": 0.95,
        "backdoored": backdoored,
        "backdoored_clean_model": False,
        "suspected": 1,
        "suspected_clean_model": None,
        "suspects_target": True,
        "key": "3" * 16,
    }


def record(
    name: str = "one", attack: str = "badnets", seed: int = 0, number: int = 0, **changes: Any
) -> dict[str, Any]:
    """A whole record. `changes` are settings by dotted key (`recipe_lr=...` is `recipe.lr`), `asr`, `psnr`, ..."""
    spec = {
        "name": name,
        "seed": seed,
        "data": {"name": changes.get("data", "cifar10"), "holdout": 0.1},
        "model": {"name": "vit_tiny_patch16_224", "pretrained": False, "depth": 4},
        "attack": {"name": attack, "target": 0, "poison_rate": changes.get("poison_rate", 0.1)},
        "recipe": {"epochs": 3, "lr": changes.get("lr", 0.001)},
    }
    if "setting" in changes:
        spec["attack"]["setting"] = changes["setting"]
    psnr = changes.get("psnr", 25.0)
    centre = {"mean": psnr, "median": psnr}
    return {
        "schema": 1,
        "name": name,
        "spec": spec,
        "hash": f"{number:012x}",
        "seed": seed,
        "environment": {
            "python": "3.11.7",
            "device": "a processor",
            "device_kind": "cpu",
            "threads": 1,
            "torch": "2.11.0",
            "timm": "1.0.31",
        },
        "data": {"n_train": 100, "n_test": 1000, "n_poisoned": 10, "classes": 10, "fingerprint": "f" * 64},
        "models": {
            "victim": {
                "name": "vit_tiny_patch16_224",
                "size": 32,
                "n_classes": 10,
                "overrides": {"depth": 4},
                "pretrained": False,
                "checkpoint": False,
            },
            "surrogate": None,
        },
        "victim": {
            "cda": rate(changes.get("cda", 0.9)),
            "asr": rate(changes.get("asr", 0.95), 900),
            "ra": rate(0.05, 900),
            "asr_clean_model": rate(changes.get("asr_twin", 0.02), 900),
            "cda_clean_model": rate(changes.get("cda_twin", 0.91)),
            "stealth": {"psnr_db": centre, "ssim": centre, "linf": centre, "l1": centre, "lpips": None, "n": 1000},
        },
        "attack": {},
        "curves": {
            "victim": {"cross_entropy": [2.0, 1.0, 0.5], "cda": [0.3, 0.6, 0.9], "asr": [0.1, 0.5, 0.95]},
            "twin": {"cross_entropy": [2.0, 0.9, 0.4], "cda": [0.3, 0.6, 0.91]},
        },
        "precision": "fp32",
        "memory": {"host_peak_bytes": 1 << 30, "device_peak_bytes": None},
        "seconds": {"poison": 0.1, "victim": 700.0, "twin": 30.0},
        "stages": {"victim": "4" * 16, "twin": "5" * 16},
        "defences": changes.get("defences", []),
    }


def to_record(content: dict[str, Any]) -> Record:
    return parse(json.dumps(content).encode(), Record)


def to_failure(content: dict[str, Any]) -> Failure:
    return parse(json.dumps(content).encode(), Failure)


def to_row(content: dict[str, Any]) -> Row:
    return TypeAdapter(Row).validate_json(json.dumps(content), strict=True)


def found(content: dict[str, Any], folder: Path = Path("runs")) -> Found:
    return Found(folder / f"{content['seed']}-{content['hash']}", to_record(content))


def write(folder: Path, content: dict[str, Any], file: str = "record.json") -> Path:
    """A record as a run leaves it."""
    place = folder / f"run-{content['hash']}"
    place.mkdir(parents=True, exist_ok=True)
    (place / file).write_text(json.dumps(content), "utf-8")
    return place


def failure(name: str, error: str, number: int = 99) -> dict[str, Any]:
    content = record(name, number=number)
    return {key: content[key] for key in ("schema", "name", "hash", "seed", "spec")} | {"error": error}


def hostile() -> list[dict[str, Any]]:
    """Records whose every free string is an attack on the page."""
    made = []
    for i, text in enumerate(HOSTILE):
        rows = [
            screen(text, 0.9, key=text, other=i),
            repair(text, report=text),
            {**judgement(text), "report": {text: text}},
        ]
        content = record(text, text, i % 2, i, data=text, setting=text, defences=[*rows, sift(text)])
        content["attack"] = {text: {text: text}}
        content["environment"] |= {"device": text}
        content["spec"][text] = {text: text}
        content["curves"]["victim"][text] = [1.0, 0.5]
        content["curves"][text] = {text: [2.0, 1.0]}
        content["models"]["victim"]["name"] = text
        content["stages"]["victim"] = text
        made.append(content)
    made[1]["hash"] = HOSTILE[1]
    return made
