"""The page, in a browser: a slider is moved, and the pictures change."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import random_unet

from minicache.checkpoints import save
from minicache.tools import explore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOVE = """<script>
const seen = [];
const look = () => seen.push([$("cached").src, ...["gmacs", "interval-value", "psnr"].map(id => $(id).textContent)]);
look();
for (const [id, value] of [["interval", data.intervals.indexOf(10)], ["branch", 1], ["interval", 0]]) {
  $(id).value = value;
  $(id).dispatchEvent(new Event("input"));
  look();
}
$("interval").value = data.intervals.indexOf(10);
$("forecast").click();
look();
document.body.innerHTML = "<pre>" + JSON.stringify(seen) + "</pre>";
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    save(folder / "net.pt", random_unet())
    explore.main(explore.parse(["--ckpt", str(folder / "net.pt"), "--steps", "20", "--num", "2",
                                "--out", str(folder / "x.html")]))  # fmt: skip
    return folder / "x.html"


def test_page_is_whole_and_asks_for_nothing(page):
    text = page.read_text()
    data = json.loads(re.search(r"const data = (.*);", text)[1])
    assert len(data["plans"]) == 1 + 7 * 3 * 2
    assert not re.search(r"(src|href)=\"|https?://|url\(|@import", text)
    assert data["plans"]["2,1,hold"]["gmacs"] < data["plans"]["1,1,hold"]["gmacs"]
    assert data["plans"]["2,1,hold"]["psnr"] > data["plans"]["20,1,hold"]["psnr"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_sliders_change_the_pictures(page, tmp_path):
    (tmp_path / "moved.html").write_text(page.read_text().replace("</html>", MOVE + "</html>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'x'}", "--dump-dom", f"file://{tmp_path / 'moved.html'}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(re.search(r"<pre>(.*)</pre>", dom, re.DOTALL)[1])
    pictures, costs, intervals, likeness = zip(*seen)
    assert len(set(pictures)) == 5 and intervals[0] == "1 step in 5" and intervals[3] == "1 (uncached)"
    assert "x less" in costs[1] and "x less" not in costs[3] and likeness[3] == "the same" and " dB" in likeness[1]


def test_wrong_flags(tmp_path):
    for flags, words in ((["--num", "0"], "--num 0"), (["--out", str(tmp_path / "x.txt")], "must end in .html")):
        with pytest.raises(ValueError, match=words):
            explore.main(explore.parse(flags))
