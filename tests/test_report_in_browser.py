"""The report as a browser shows it: tables are sorted by clicks, plots are there, nothing is asked of the network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastalign import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,  # a browser takes seconds to start
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium and no google-chrome"),
]

# Clicks through the page and writes what it sees into the page, from where --dump-dom brings it here.
SPY = """
const seen = { clicks: {}, violations: [] };
document.addEventListener("securitypolicyviolation", (event) => seen.violations.push(event.effectiveDirective));
const heads = [...document.querySelectorAll("thead th")];
const order = () => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent).join(" ");
const state = () => heads.map((head) => head.getAttribute("aria-sort")).join(" ");
seen.before = order();
for (const head of heads) {
  const button = head.querySelector("button");
  const name = button.textContent;
  seen.clicks[name] = [];
  for (let i = 0; i < 3; i++) { button.click(); seen.clicks[name].push([order(), state()]); }
}
const plots = [...document.querySelectorAll("svg")];
const filled = (element) => getComputedStyle(element).fill;
seen.boxes = plots.map((svg) => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height]);
seen.marks = plots.map((svg) => [...svg.querySelectorAll("path, use, text")]
  .filter((mark) => mark.getBoundingClientRect().width > 0).length);
seen.letters = plots.map((svg) => filled(svg.querySelector("text")));
seen.ink = getComputedStyle(document.body).color;
seen.page = getComputedStyle(document.body).backgroundColor;
seen.bars = [...new Set([...document.querySelectorAll("svg path")].map(filled))];
seen.wide = document.documentElement.scrollWidth > innerWidth;
seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
// What the page itself never has: it must come to nothing.
document.body.insertAdjacentHTML("beforeend", "<img src='https://outside.example/x.png' onerror='window.ran = 1'>");
setTimeout(() => {
  seen.ran = [typeof window.ran, typeof window.injected];
  const box = document.createElement("pre");
  box.id = "seen";
  box.textContent = JSON.stringify(seen);
  document.body.append(box);
}, 50);
"""


def make(path: Path) -> Path:
    columns = [report.Column("row"), report.Column("word"), report.Column("number"), report.Column("same")]
    rows = [
        ["a", "layer 10", report.Cell(9.0, "± 30"), 1],
        ["b", None, None, 2],
        ["c", "Layer 2", report.Cell(10.0, "± 1", best=True), 1],
        ["d", "été", float("nan"), None],
        ["e", "zoo", -1000.5, 2],
        ["f", "layer 10", float("inf"), 1],
        ["g", "zoo", -20.25, 2],
        ["h", "zoo", 2e-05, 3],
    ]
    curve = report.Series("loss", [0, 1, 2], [3, 2, 1], [2, 1, 0], [4, 3, 2])
    return report.write(path, "Title", [
        report.Table(columns, rows, "Caption"),
        report.lines([curve], x_label="step", y_label="loss", title="Loss"),
        report.bars(["de", "fr"], {"a": [1, 2], "b": [2, None]}, y_label="F1", title="F1"),
    ])  # fmt: skip


def show(path: Path, folder: Path, *options: str) -> dict[str, Any]:
    """What `SPY` sees in a page. A script that is not ours is in it too, which the page's policy has to stop."""
    digest = base64.b64encode(hashlib.sha256(SPY.encode()).digest()).decode()
    page = path.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{digest}' ")
    page = page.replace("</body>", f"<script>{SPY}</script><script>window.injected = 1</script></body>")
    copy = folder / "copy.html"
    copy.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1000,800",
            f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=2000", *options, "--dump-dom", copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("browser")
    return show(make(folder / "report.html"), folder, "--blink-settings=preferredColorScheme=1")


def test_a_click_on_a_header_sorts_and_another_one_reverses(seen):
    orders = {name: [order for order, _ in clicks] for name, clicks in seen["clicks"].items()}
    assert seen["before"] == "a b c d e f g h"
    # Each is sorted from what the one before has left. What has no value stays last both ways.
    assert orders["row"] == ["a b c d e f g h", "h g f e d c b a", "a b c d e f g h"]
    assert orders["word"] == ["d c a f e g h b", "e g h a f c d b", "d c a f e g h b"], "2 before 10, é as e"
    assert orders["number"] == ["e g h a c f d b", "f c a h g e d b", "e g h a c f d b"], "as numbers, not as words"
    assert orders["same"] == ["a c f e g b h d", "h e g b a c f d", "a c f e g b h d"], "equal ones keep their order"
    states = [state for _, state in seen["clicks"]["number"]]
    assert states == [f"none none {way} none" for way in ("ascending", "descending", "ascending")]


def test_plots_are_there(seen):
    assert all(width > 300 and height > 150 for width, height in seen["boxes"]) and len(seen["boxes"]) == 2
    assert all(marks > 15 for marks in seen["marks"])
    assert not seen["wide"], "the page itself does not scroll sideways"


def test_nothing_leaves_and_only_our_script_runs(seen):
    assert seen["requests"] == [] and seen["ran"] == ["undefined", "undefined"]
    assert any(name.startswith("img-src") for name in seen["violations"]), "the policy is in force"
    assert any(name.startswith("script-src") for name in seen["violations"])


def test_colours_follow_the_scheme(seen, tmp_path):
    dark = show(make(tmp_path / "report.html"), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert seen["page"] == "rgb(255, 255, 255)" and dark["page"] == "rgb(22, 24, 28)"
    for shown in (seen, dark):
        assert set(shown["letters"]) == {shown["ink"]}
    assert "rgb(31, 95, 168)" in seen["bars"] and "rgb(108, 178, 235)" in dark["bars"]


def test_a_phone_scrolls_no_page_sideways(tmp_path):
    path = make(tmp_path / "report.html")
    frame = tmp_path / "frame.html"  # a window has a least width, a frame has none
    frame.write_text(
        f"""<iframe src="{path.as_uri()}" style="width:340px;height:600px"></iframe><script>
        onload = () => {{
          const page = document.querySelector("iframe").contentDocument.documentElement;
          document.title = page.scrollWidth + " of " + page.clientWidth;
        }}</script>""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--allow-file-access-from-files", "--virtual-time-budget=2000", "--dump-dom", frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    found = re.search(r"<title>(\d+) of (\d+)", done.stdout)
    assert found, done.stdout + done.stderr[-2000:]
    assert int(found[1]) <= int(found[2]) <= 340
