"""The report in a real browser: sorting, filtering, opening, hostile names, widths, print, contrast, keyboard."""

import http.server
import threading
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import PATIENCE, Open, refuse
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
from tests.report.page.test_make_page import picture
from vitrap.experiment.records import Found, Loaded
from vitrap.printable import printable
from vitrap.report.page import make_page as report
from vitrap.report.page.make_page import make_page

WIDTHS = (380, 800, 1400)


def ordinary(folder: Path) -> Loaded:
    """Runs of three attacks on two data sets, with seeds, defences, curves, pictures, failures and what was skipped."""
    made = []
    for i, (attack, data, asr) in enumerate(
        [
            ("badnets", "cifar10", 0.95),
            ("badnets", "cifar10", 0.08),
            ("ageb", "gtsrb", 0.6),
            ("megatron", "cifar10", 1.0),
        ]
    ):
        rows = [screen(value=0.5 + i / 8), sift(), repair(optimizer="sgd", der=0.1 * i), judgement(backdoored=i > 1)]
        content = record(
            f"{attack}-{i}", attack, i, i, data=data, asr=asr, psnr=22.0 + 4 * i, defences=rows[: i + 1], lr=10.0**-i
        )
        place = folder / f"run-{i}"
        place.mkdir(parents=True)
        (place / "pictures.png").write_bytes(picture(size=(900, 700)))
        made.append(Found(place, to_record(content)))
    made.append(found(record("badnets-0", "badnets", 7, 7, data="cifar10", asr=0.5, psnr=22.0, lr=1.0)))
    return Loaded(
        tuple(made), (to_failure(failure("lost", "out of memory")),), ("'a/record.json' is skipped: it is damaged",)
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    page = folder / "report.html"
    page.write_bytes(make_page(ordinary(folder / "runs"), "runs").content)
    return page


@pytest.fixture(scope="module", params=["open", "packed"])
def nasty(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A page of hostile names, its sections in the page or packed."""
    loaded = Loaded(
        tuple(map(found, hostile())),
        tuple(to_failure(failure(text, text, i)) for i, text in enumerate(HOSTILE)),
        tuple(f"{text!r} {text}" for text in HOSTILE),
    )
    page = tmp_path_factory.mktemp("nasty") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "packed":
            patch.setattr(report, "BYTES", 1)
        page.write_bytes(make_page(loaded, HOSTILE[0]).content)
    return page


def column(page: Page, number: int) -> list[str]:
    """The first word of each shown row's cell."""
    cells = page.locator(f"#summary tbody tr:visible > :nth-child({number})").all_inner_texts()
    return [cell.split()[0] if cell.split() else "" for cell in cells]


def test_a_press_on_a_header_sorts(plain: Path, opened: Open) -> None:
    page = opened(plain)
    head = page.locator("#summary thead th", has=page.get_by_text("ASR", exact=True))
    head.get_by_role("button").click()
    assert column(page, 8) == ["8.00", "50.00", "60.00", "95.00", "100.00"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert column(page, 8) == ["100.00", "95.00", "60.00", "50.00", "8.00"]
    assert head.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="run", exact=True).first.click()
    assert head.get_attribute("aria-sort") is None
    assert column(page, 1) == ["ageb-2", "badnets-0", "badnets-0", "badnets-1", "megatron-3"]


def test_empty_cells_come_last_either_way(tmp_path: Path, opened: Open) -> None:
    bare = record("bare", number=5)
    del bare["spec"]["attack"]["poison_rate"]
    records = [record("b", poison_rate=0.3), record("a", number=1, poison_rate=0.05), bare]
    (tmp_path / "a.html").write_bytes(make_page(Loaded(tuple(map(found, records)), (), ()), "x").content)
    page = opened(tmp_path / "a.html")
    for order in (["5", "30", ""], ["30", "5", ""]):
        page.get_by_role("button", name="poison").click()
        assert column(page, 5) == order


def test_the_keyboard_sorts(plain: Path, opened: Open) -> None:
    page = opened(plain)
    button = page.locator("#summary thead button").nth(10)
    button.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    assert column(page, 11)[0] == "22.0"
    page.keyboard.press("Space")
    assert column(page, 11)[0] == "34.0"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "verdict"


def test_words_and_choices_filter(plain: Path, opened: Open) -> None:
    page = opened(plain)
    count = page.get_by_role("status")
    assert count.inner_text() == "5 of 5 runs shown"
    page.get_by_label("Filter", exact=True).fill("BADNETS in")
    assert count.inner_text() == "1 of 5 runs shown"
    assert page.locator("details.run:visible").count() == 1
    assert page.locator(".plot a:visible").count() == 1
    page.get_by_label("Filter", exact=True).fill("")
    page.get_by_label("Data", exact=True).select_option("cifar10")
    page.get_by_label("Attack", exact=True).select_option("badnets")
    assert count.inner_text() == "3 of 5 runs shown"
    page.get_by_label("Data", exact=True).select_option("gtsrb")
    assert count.inner_text() == "0 of 5 runs shown"
    assert count.get_attribute("aria-live") == "polite"


def test_a_link_opens_its_run(plain: Path, opened: Open) -> None:
    page = opened(plain)
    section = page.locator("#run-000000000003")
    assert not section.get_by_role("heading", name="Environment").is_visible()
    page.locator("#summary").get_by_role("link", name="megatron-3").click()
    assert section.get_by_role("heading", name="Environment").is_visible()
    assert section.get_by_role("img", name="Test images").is_visible()
    section.locator("summary").first.click()
    assert not section.get_by_role("heading", name="Environment").is_visible()
    page.locator('.plot a[href="#run-000000000003"]').click()
    assert section.get_by_role("heading", name="Environment").is_visible()


def test_a_link_from_outside_opens_its_run(plain: Path, opened: Open) -> None:
    page = opened(plain, at="#run-000000000002")
    assert page.locator("#run-000000000002").get_attribute("open") is not None


def test_all_runs_open_and_close(plain: Path, opened: Open) -> None:
    page = opened(plain)
    page.get_by_role("button", name="open all").click()
    assert page.locator("details.run[open]").count() == 5
    page.get_by_role("button", name="close all").click()
    assert page.locator("details.run[open]").count() == 0


def test_packed_runs_open(tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(f"run-{i}", number=i, seed=i) for i in range(60)]
    monkeypatch.setattr(report, "BYTES", 100_000)
    made = make_page(Loaded(tuple(map(found, records)), (), ()), "x")
    (tmp_path / "a.html").write_bytes(made.content)
    page = opened(tmp_path / "a.html", at="#run-000000000000")
    for i in (0, 24, 25, 59):
        page.locator(f'#summary a[href="#run-{i:012x}"]').click()
        section = page.locator(f"#run-{i:012x}")
        section.get_by_role("heading", name="Environment").wait_for()
        assert f"{i:012x}" in section.locator("code").first.inner_text()
    assert page.locator("details.run .body").count() == 4


def open_all(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    expect(page.locator("details.run .parts")).to_have_count(page.locator("details.run").count())
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")


def test_hostile_names_stay_text(nasty: Path, opened: Open) -> None:
    page = opened(nasty)
    open_all(page)
    names = set(page.locator("#summary tbody th").all_text_contents())
    assert {text for text in HOSTILE if printable(text) == text} <= names
    assert page.locator("img, iframe, object, base, link[rel=stylesheet]").count() == 0
    assert page.locator("script:not([type])").count() == 1
    assert (
        page.evaluate(
            "[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())"
            ".filter((name) => name.startsWith('on'))"
        )
        == []
    )
    assert page.locator("#failures tbody th").all_text_contents()[0] == HOSTILE[0]
    page.get_by_label("Attack", exact=True).select_option(f"{HOSTILE[1]} {HOSTILE[1]}")
    assert page.get_by_role("status").inner_text() == f"1 of {len(HOSTILE)} runs shown"
    page.get_by_label("Filter", exact=True).fill("onerror")
    page.get_by_role("button", name="attack").first.click()


def overflow(page: Page) -> list[str]:
    """What is wider than the page; tables may be, inside their own scrolling boxes."""
    return page.evaluate(
        """() => {
          const width = document.documentElement.clientWidth;
          const found = document.documentElement.scrollWidth > width ? ["the page"] : [];
          for (const part of document.querySelectorAll("body *")) {
            if (part.closest(".wide, svg, .skip") || !part.getClientRects().length) continue;
            if (part.getBoundingClientRect().right > width + 1) found.push(part.tagName + "." + part.className);
          }
          return found;
        }"""
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_its_window(plain: Path, nasty: Path, opened: Open, width: int) -> None:
    for path in (plain, nasty):
        page = opened(path, width=width)
        assert overflow(page) == []
        open_all(page)
        assert overflow(page) == []


@pytest.mark.parametrize("width", [690, 1040])  # A4, upright and landscape
def test_print_shows_whole_tables_on_white(plain: Path, opened: Open, width: int) -> None:
    page = opened(plain, width=width, scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert not page.get_by_label("Filter", exact=True).is_visible()
    tables = page.evaluate(
        "[...document.querySelectorAll('.sortable, .heat')].map((t) => t.getBoundingClientRect().right)"
    )
    assert max(tables) <= (width if width > 1000 else 10_000)
    open_all(page)
    assert faint(page) == []
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


FAINT = """() => {
  const parse = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    return { rgb: parts.slice(0, 3), alpha: parts.length > 3 ? parts[3] : 1 };
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const { rgb, alpha } = parse(getComputedStyle(e).backgroundColor);
      if (alpha > 0.99) return rgb;
      if (alpha > 0.01) return null;
    }
    return [255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, style, title, desc, defs, option, noscript, .skip"))
      continue;
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const colour = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(parse(colour).rgb), luminance(ground(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found[`${element.tagName}.${element.className} ${colour}`] = ratio.toFixed(2);
  }
  return Object.entries(found).map((pair) => pair.join(": "));
}"""


def faint(page: Page) -> list[str]:
    """Texts whose contrast with what is behind them is below 4.5."""
    return page.evaluate(FAINT)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(plain: Path, opened: Open, scheme: str) -> None:
    page = opened(plain, scheme=scheme)
    open_all(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    assert faint(page) == []
    page.locator("#summary tbody tr").first.hover()
    assert faint(page) == []


def test_every_step_of_the_map_stands_out(plain: Path, opened: Open) -> None:
    for scheme in ("light", "dark"):
        page = opened(plain, scheme=scheme)
        page.evaluate(
            """() => {
              const row = document.querySelector(".heat tbody tr");
              for (let step = -4; step <= 4; step++) {
                const cell = row.insertCell();
                cell.className = `h${step}`;
                cell.append("0.5", document.createElement("small"));
                cell.lastChild.append("n = 1");
              }
            }"""
        )
        assert faint(page) == []


def test_faint_text_would_be_found(plain: Path, opened: Open) -> None:
    page = opened(plain)
    page.evaluate("document.querySelector('h1').style.color = 'rgb(200, 200, 200)'")
    assert len(faint(page)) == 1


def test_without_javascript_all_can_be_read(plain: Path, opened: Open) -> None:
    page = opened(plain, script=False)
    assert page.locator("#summary tbody tr:visible").count() == 5
    assert not page.get_by_label("Filter", exact=True).is_visible()
    section = page.locator("#run-000000000003")
    section.locator("summary").first.click()
    assert section.get_by_role("heading", name="Environment").is_visible()
    section.locator(".tried summary").first.click()
    assert section.get_by_text("AUROC, triggered images that hit").is_visible()


def test_controls_have_names_and_pictures_texts(plain: Path, opened: Open) -> None:
    page = opened(plain)
    open_all(page)
    assert page.evaluate("[...document.images].filter((image) => image.alt.length < 40).length") == 0
    assert page.evaluate("[...document.querySelectorAll('input, select')].filter((e) => !e.labels.length).length") == 0
    assert page.evaluate("[...document.querySelectorAll('button')].filter((e) => !e.textContent.trim()).length") == 0
    unnamed = "[...document.querySelectorAll('.wide')].filter((e) => e.tabIndex !== 0 || !e.ariaLabel).length"
    assert page.evaluate(unnamed) == 0
    assert page.evaluate("document.documentElement.lang") == "en"


class Counting(http.server.BaseHTTPRequestHandler):
    """Serves one page under every address, and notes the addresses."""

    content = b""
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:  # noqa: N802
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(("place", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_a_missing_browser_fails_only_in_ci(
    place: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", place)
    with pytest.raises(outcome, match="apt-get install chromium, or playwright install chromium"):
        refuse()


def test_a_served_page_asks_for_nothing_else(plain: Path, browser: Browser) -> None:
    Counting.content, Counting.asked = plain.read_bytes(), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sent: list[str] = []
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: sent.append(request.url))
        page.goto(f"http://127.0.0.1:{server.server_port}/report.html")
        open_all(page)
        page.evaluate("() => new Promise((done) => requestIdleCallback(() => done()))")  # it has no more to do
        page.close()
        server.shutdown()
    assert len(sent) == 1
    assert Counting.asked == ["/report.html"]
