"""Pages on a phone, in a real browser at 390 px: nothing is cut off, and pictures can be read."""

import json
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from fedlora.reports import compared, html, report
from fedlora.reports.axes import STYLE
from tests.reports.test_report import PARTS, PARTS_BEFORE, make_run

WIDTH = 390
"""In CSS pixels, of a common phone."""
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
MEASURE = """<!doctype html><meta charset="utf-8"><body>
<iframe src="{page}" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
window.onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const scrolls = e => e && (/auto|scroll/.test(page.defaultView.getComputedStyle(e).overflowX)
                             || scrolls(e.parentElement));
  const wide = [...page.body.querySelectorAll("*")].filter(
    e => e.getBoundingClientRect().right > {width} + 1 && !scrolls(e.parentElement));
  const told = {
    wide: root.scrollWidth, out: wide.map(e => e.tagName + " " + e.textContent.slice(0, 40)),
    text: Math.min(...[...page.querySelectorAll("p, td, th, figcaption")].map(
      e => parseFloat(page.defaultView.getComputedStyle(e).fontSize))),
    pictures: [...page.images].map(i => [i.alt, i.naturalWidth, i.clientWidth]),
  };
  document.body.textContent = "<<" + JSON.stringify(told) + ">>";
};
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="needs Chromium: apt-get install chromium"),
]


def at_width(page: Path, tmp_path: Path, width: int = WIDTH) -> dict[str, Any]:
    """What a browser makes of the page in a window this wide."""
    around = tmp_path / "around.html"
    text = MEASURE.replace("{width}", str(width)).replace("{page}", page.resolve().as_uri())
    around.write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update",
               "--allow-file-access-from-files", "--virtual-time-budget=20000",
               f"--user-data-dir={tmp_path / 'browser'}"]  # fmt: skip
    done = subprocess.run([BROWSER, *options, "--dump-dom", around.as_uri()],
                          capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
    found: dict[str, Any] = json.loads(unescape(done.stdout).split("<<")[1].split(">>")[0])
    return found


def of_every_task(folder: Path) -> Path:
    run = make_run(folder / "quickstart")
    (run / "parts.json").write_text(json.dumps(PARTS))
    (run / "parts-before.json").write_text(json.dumps(PARTS_BEFORE))
    return report.write(run)


def of_a_language_model(folder: Path) -> Path:
    return report.write(make_run(folder / "chat", causal=True, clients=40))


def of_two_runs(folder: Path) -> Path:
    return compared.write([make_run(folder / x, clients=3) for x in "ab"], folder / "both.html")


def of_a_comparison(folder: Path) -> Path:
    """As `fedlora compare` and the privacy lab write theirs."""
    drawn = html.drawn({"curve": lambda: plt.figure()})
    head = [f"column {i}" for i in range(14)]
    body = "{{ table(head, rows) }}{{ figure('curve', plots.curve) }}<pre>{{ command }}</pre>"
    text = html.render(body, drawn, title="t" * 80, head=head, rows=[["a long cell"] * 14],
                       command="fedlora compare x " + "--set a.b=c " * 20)  # fmt: skip
    (folder / "table.html").write_text(text)
    return folder / "table.html"


PAGES = [of_every_task, of_a_language_model, of_two_runs, of_a_comparison]


@pytest.mark.parametrize("write", PAGES, ids=lambda f: f.__name__)
def test_on_a_phone_nothing_is_cut_off_and_every_picture_can_be_read(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    found = at_width(write(tmp_path), tmp_path)
    assert found["out"] == []
    assert found["wide"] <= WIDTH
    assert found["text"] >= 12, "CSS pixels of the smallest words"
    assert found["pictures"]
    for title, _, shown in found["pictures"]:
        assert shown <= WIDTH, title


def test_letters_of_a_runs_pictures_are_nine_pixels_or_more_on_a_phone(
    tmp_path: Path,
) -> None:
    pictures = at_width(of_every_task(tmp_path), tmp_path)["pictures"]
    assert len(pictures) > 5
    points = min(STYLE["font.size"], STYLE["legend.fontsize"])
    for title, drawn, shown in pictures:
        assert points * 96 / 72 * shown / drawn >= 9, title


def test_what_is_too_wide_is_seen(tmp_path: Path) -> None:
    """The measure itself can fail."""
    page = tmp_path / "wide.html"
    page.write_text("<!doctype html><p style='width: 600px'>too wide</p>")
    found = at_width(page, tmp_path)
    assert found["wide"] > WIDTH
    assert found["out"] == ["P too wide"]
