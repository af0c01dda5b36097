"""The page as text: what stands on it, that odd records do no harm, and how large it is."""

import copy
import io
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.report.made import (
    HOSTILE,
    failure,
    found,
    hostile,
    judgement,
    record,
    repair,
    screen,
    sift,
    to_failure,
    to_record,
)
from vitrap.experiment.records import Found, Loaded
from vitrap.printable import printable
from vitrap.report.page import make_page as page
from vitrap.report.page.embed import embed
from vitrap.report.page.make_page import make_page

ROOT = Path(__file__).parents[3]
MEGABYTES = 1_000_000


class Reader(HTMLParser):
    """Tags, their attributes, ids and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.inside = tag
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [value or "" for _, key, value in self.attributes if key == name]


def loaded(
    *records: dict[str, Any], failures: tuple[dict[str, Any], ...] = (), skipped: tuple[str, ...] = ()
) -> Loaded:
    return Loaded(tuple(map(found, records)), tuple(map(to_failure, failures)), skipped)


def html(given: Loaded, **options: Any) -> str:
    return make_page(given, "runs", **options).content.decode()


def test_each_part_is_on_the_page() -> None:
    rows = [screen(), sift(), repair(), judgement()]
    records = [record(seed=i, number=i, attack=a, defences=rows) for i, a in enumerate(("ageb", "badnets", "badnets"))]
    text = html(
        loaded(*records, failures=(failure("lost", "out of memory"),), skipped=("'x' is skipped: it is damaged",))
    )
    read = Reader(text)
    assert set(read.values("id")) >= {"runs", "seeds", "stealth", "defences", "claims", "each", "failures", "summary"}
    words = " ".join(read.words)
    for said in ("out of memory", "is skipped: it is damaged", "99.85 %", "clean twin", "CDA 90 → 80 %", "3 runs of 2"):
        assert said in words, said


def test_the_page_is_the_same_for_the_same_records() -> None:
    given = loaded(*(record(number=i, seed=i, defences=[screen()]) for i in range(3)))
    assert make_page(given, "a") == make_page(given, "a")


def test_nothing_is_fetched() -> None:
    read = Reader(html(loaded(record(defences=[screen()]))))
    assert [value for value in read.values("src") if not value.startswith("data:image/")] == []
    links = read.values("href")
    assert {link.partition(":")[0] for link in links if not link.startswith("#")} == {"https", "data"}  # papers, icon
    assert "https://arxiv.org/abs/" not in links, "a paper that is not on arXiv has no link"
    (policy,) = [value for value in read.values("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "style" not in {name for _, name, _ in read.attributes}


def test_links_lead_somewhere() -> None:
    read = Reader(html(loaded(record(), record(), record(number=2), failures=(failure("lost", "no"),))))
    ids = read.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in read.values("href") if link.startswith("#")} <= set(ids)


def test_headings_leave_out_no_level() -> None:
    levels = [int(level) for level in re.findall(r"<h([1-6])", html(loaded(record(defences=[screen()]))))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def test_hostile_names_stay_text() -> None:
    lines = tuple(f"{text!r} is skipped" for text in HOSTILE)
    failures = tuple(failure(text, text, i) for i, text in enumerate(HOSTILE))
    plain = Reader(html(loaded(*(record(number=i) for i in range(6)))))
    read = Reader(make_page(loaded(*hostile(), failures=failures, skipped=lines), HOSTILE[0]).content.decode())
    assert read.tags["script"] == plain.tags["script"] == 1
    assert read.tags["img"] == plain.tags["img"] == 0
    names = {name for _, name, _ in read.attributes}
    assert not [name for name in names if name.startswith("on")]
    words = " ".join(read.words)
    assert "{{7*7}}{% raw %}" in words
    assert not re.search(r"(?<![\d.])49(?!\d)", words), "7*7 was computed"
    assert "<script>alert(1)</script>" in words
    assert printable(words) == words


def islands(text: str) -> list[str]:
    return re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)


def test_packed_sections_hold_what_the_page_would(monkeypatch: pytest.MonkeyPatch) -> None:
    import base64
    import zlib

    given = loaded(*hostile(), *(record(number=i + 10) for i in range(30)))
    open_text = html(given)
    monkeypatch.setattr(page, "BYTES", len(open_text) - 1)
    made = make_page(given, "runs")
    (island,) = islands(made.content.decode())
    assert "<" not in island
    bodies = [body for pack in json.loads(island) for body in json.loads(zlib.decompress(base64.b64decode(pack)))]
    assert len(bodies) == len(given.records)
    assert all(body in open_text for body in bodies)
    assert made.notes == ()


def test_curves_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    given = loaded(*(record(number=i, defences=[screen()]) for i in range(40)))
    assert html(given).count("<polyline") == 40 * 5
    monkeypatch.setattr(page, "BYTES", 1)
    made = make_page(given, "runs")
    assert made.notes[0] == "curves are left out, so that the page stays small"
    assert "too many runs" in made.notes[1]
    assert "curves are left out" in made.content.decode()


def thousand(**parts: Any) -> Loaded:
    """Runs that differ in each figure, as a sweep would leave them."""
    rows = [screen(), screen("psbd"), repair(optimizer="sgd"), sift(), judgement()]
    made = []
    for i in range(1000):
        content = record(
            f"sweep-{i}", ("ageb", "badnets")[i % 2], i // 20, i, lr=0.001 * (i % 10), defences=rows, **parts
        )
        made.append(shaken(content, i))
    return loaded(*made)


def shaken(content: dict[str, Any], i: int) -> dict[str, Any]:
    """Every rate and curve another: no two runs share their digits."""
    content = copy.deepcopy(content)
    content["curves"] = {
        role: {"cross_entropy": [2.0 / (e + 1) + (i * 7919 + e * 104729) % 997 / 997 for e in range(30)]}
        for role in ("victim", "twin", "surrogate")
    }

    def shake(value: Any, salt: int) -> Any:
        if isinstance(value, dict):
            return {key: shake(part, salt * 31 + len(key) + n) for n, (key, part) in enumerate(value.items())}
        return value * (1 - (salt * 2654435761 + i * 40503) % 9973 / 1e5) if isinstance(value, float) else value

    content["victim"] = shake(content["victim"], i)
    content["defences"] = [{**shake(row, i + n), "params": row["params"]} for n, row in enumerate(content["defences"])]
    return content


def test_a_thousand_runs_stay_under_three_megabytes() -> None:
    """In a process of its own, without the checks of types that tests run under."""
    code = (
        "from tests.report.page.test_make_page import make_page, thousand\n"
        "made = make_page(thousand(), 'sweep'); print(len(made.content), made.notes)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    size, _, notes = done.stdout.strip().partition(" ")
    assert MEGABYTES < int(size) < 3 * MEGABYTES
    assert notes == "()"


ABRIDGED = ("models", "attack", "curves", "memory", "stages", "defences")


@pytest.mark.parametrize("key", ABRIDGED)
def test_abridged_records_are_shown(key: str) -> None:
    content = record(defences=[screen()])
    del content[key]
    assert "run-000000000000" in html(loaded(content, record(number=1)))


def picture(mode: str = "RGBA", size: tuple[int, int] = (40, 30)) -> bytes:
    content = io.BytesIO()
    image = Image.new(mode, size, (200, 10, 10, 255)[: len(mode)])
    image.putpixel((3, 4), (1, 2, 3, 255)[: len(mode)])
    image.save(content, "PNG")
    return content.getvalue()


def test_a_picture_is_kept_without_loss(tmp_path: Path) -> None:
    import base64

    (tmp_path / "pictures.png").write_bytes(picture())
    kept = embed(tmp_path / "pictures.png")
    assert (kept.width, kept.height) == (40, 30)
    image = Image.open(io.BytesIO(base64.b64decode(kept.address.partition(",")[2]))).convert("RGB")
    assert (image.getpixel((3, 4)), image.getpixel((0, 0))) == ((1, 2, 3), (200, 10, 10))


@pytest.mark.parametrize("content", [b"", b"no picture", picture()[:60], picture("RGB", (5000, 5000))])
def test_a_broken_picture_is_left_out_and_said(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "run-1"
    place.mkdir()
    (place / "pictures.png").write_bytes(content)
    made = make_page(Loaded((Found(place, to_record(record())),), (), ()), "runs")
    assert len(made.notes) == 1
    assert "a picture is left out: " in made.notes[0]
    assert "pictures.png is not a readable image" in made.notes[0]
    assert b"is left out" in made.content


def with_pictures(folder: Path, runs: int) -> Loaded:
    records = []
    for i in range(runs):
        one = found(record(number=i), folder)
        one.place.mkdir()
        (one.place / "pictures.png").write_bytes(picture())
        records.append(one)
    return Loaded(tuple(records), (), ())


def test_pictures_have_a_text_and_can_be_left_out(tmp_path: Path) -> None:
    given = with_pictures(tmp_path, 2)
    seen: list[tuple[int, int]] = []
    read = Reader(html(given, progress=lambda done, whole: seen.append((done, whole))))
    assert read.tags["img"] == 2
    assert all("clean image" in text and "trigger" in text and "difference" in text for text in read.values("alt"))
    assert seen == [(1, 2), (2, 2)]
    assert Reader(html(given, pictures=False)).tags["img"] == 0


def test_too_many_pictures_are_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PICTURED", 2)
    made = make_page(with_pictures(tmp_path, 3), "runs")
    assert made.notes == ("pictures are left out: there are 3 runs, and they are shown for up to 2",)
    assert b"pictures are left out" in made.content
    assert b"<img" not in made.content
