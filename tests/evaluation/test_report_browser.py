"""The report in a real browser, at a desktop's and a phone's width, in light and dark: what no parser can see."""

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mip.config import load_profile
from mip.evaluation import report
from tests.closure import ROOT
from tests.evaluation.fake_profile import write_profile

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# Runs in the page after its own script, and leaves what it saw as JSON.
PROBE = """<script>
addEventListener("load", () => {
  const all = selector => [...document.querySelectorAll(selector)];
  const meet = (a, b, low, high) => a[low] < b[high] - 1 && b[low] < a[high] - 1;
  const overlap = (a, b) => meet(a, b, "left", "right") && meet(a, b, "top", "bottom");
  const light = colour => colour.match(/[\\d.]+/g).slice(0, 3)
    .map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
  };
  const contrast = element => {
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  };
  const sorted = all("table.sortable thead th button").map(button => {
    button.click();
    const head = button.closest("th"), rows = [...button.closest("table").tBodies[0].rows];
    const values = rows.map(row => row.cells[head.cellIndex].dataset.value).filter(v => v !== "");
    const order = (a, b) => isNaN(a - b) ? a.localeCompare(b, "en") : a - b;
    return head.ariaSort === "ascending" && values.every((v, i) => !i || order(values[i - 1], v) <= 0);
  });
  const seen = {
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    broken: all("img").filter(image => !image.naturalWidth).length,
    images: all("img").length,
    lost: all("nav a").map(a => a.getAttribute("href")).filter(href => !document.querySelector(href)),
    links: all("nav a").length,
    overlaps: all(".references").filter(box => [...box.querySelectorAll("img")].some(image =>
      [...box.closest("tr").querySelectorAll("td:not(:first-child) img")].some(other =>
        overlap(image.getBoundingClientRect(), other.getBoundingClientRect())))).length,
    sorted,
    contrast: Math.min(...all("p, td, th, h1, h2, figcaption, small, a").filter(e => e.offsetParent).map(contrast)),
    ground: light(getComputedStyle(document.body).backgroundColor),
  };
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with the probe in it, and without the policy that would stop it."""
    profile = load_profile(ROOT / "params.yaml", "toybox")[1]
    paths = write_profile(tmp_path_factory.mktemp("profile"))
    report.write(profile.report, paths=paths, profile=profile)
    text = (paths.reports / "report.html").read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    probed = paths.reports / "probed.html"
    probed.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    return probed


def look(page: Path, profile: Path, *, width: int, is_dark: bool) -> dict[str, Any]:
    """What the probe saw."""
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    shape = [f"--window-size={width},1200", f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"]
    command = [BROWSER, *options, *shape, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = found.partition('<pre id="seen">')[2].partition("</pre>")[0]
    assert seen, "the probe did not run"
    return json.loads(unescape(seen))


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_is_whole_in_a_browser(page: Path, tmp_path: Path, width: int, is_dark: bool):
    seen = look(page, tmp_path, width=width, is_dark=is_dark)
    assert seen["width"] == width
    assert seen["scroll"] <= width, "the page itself scrolls sideways"
    assert seen["images"] > 20 and seen["broken"] == 0
    assert seen["links"] > 8 and seen["lost"] == []
    assert seen["overlaps"] == 0
    assert seen["sorted"] and all(seen["sorted"])
    assert seen["contrast"] >= 4.5
    assert (seen["ground"] < 0.2) == is_dark
