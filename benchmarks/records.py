"""Ten thousand records as one DataFrame, beside reading their JSON and flattening it with pandas alone."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas

import vitrap
from benchmarks.compare import Figure, Scale, in_turns
from vitrap.experiment.record import to_table

TINY = ("data.limit=100", "attack.name=badnets", "recipe.epochs=1", "model.embed_dim=16", "model.depth=1")
WITHIN = 10.0
"""Seconds wanted for 10,000 records."""


def figures(scale: Scale) -> Iterator[Figure]:
    """As many small records as there are images in the scale, all made from one true record."""
    with tempfile.TemporaryDirectory() as own:
        record = to_table(vitrap.run(vitrap.load_spec(None, TINY), Path(own, "one"), device="cpu"))
        place = Path(own, "runs")
        for number in range(scale.images):
            folder = place / f"made-{number:05d}"
            folder.mkdir(parents=True)
            made = {**record, "name": "made", "seed": number, "spec": {**record["spec"], "seed": number}}
            (folder / "record.json").write_text(json.dumps(made, indent=1))
        ours, plain = in_turns(lambda: vitrap.load_records(place), lambda: flattened(place), scale)
        frame = vitrap.load_records(place)
        assert frame["run"].nunique() == scale.images
        note = f"{scale.images} records of {folder_size(place) / scale.images / 1e3:.1f} kB, {len(frame)} rows"
        yield Figure("records", "load_records over json and json_normalize", ours, plain, within=WITHIN, note=note)


def flattened(place: Path) -> pandas.DataFrame:
    """What somebody without vitrap would do: one row a record, one column a key."""
    return pandas.json_normalize([json.loads(file.read_bytes()) for file in sorted(place.glob("*/record.json"))])


def folder_size(place: Path) -> int:
    """Bytes of all records."""
    return sum(file.stat().st_size for file in place.glob("*/record.json"))
