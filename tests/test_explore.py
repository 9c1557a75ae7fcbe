"""The page, in a browser: real keys, real clicks, a phone's width, light and dark."""

import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import time
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, official_weight, random_unet

from minicache.checkpoints import save
from minicache.cost import full_passes, macs
from minicache.diffusion import Diffusion
from minicache.plan import uniform
from minicache.tools import explore
from minicache.unet import UNet
from minicache.words import Vocabulary

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, " ": 32}
WORDS = Vocabulary(("apple", "cat", "red", "script"), length=2, guidance=2.0, examples=("red apple", "cat"))
STEPS = 20
PICTURES = "[...document.querySelectorAll('#{0} canvas')].map(canvas => canvas.toDataURL()).join()"


class Browser:
    """Chromium, driven over its debugging pipe, as its DevTools do: what it is sent counts as a person's doing."""

    def __init__(self, folder):
        self.read, theirs_out = os.pipe()
        theirs_in, self.write = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 f"--user-data-dir={folder}"]  # fmt: skip
        connect = lambda: [os.dup2(end, number) for end, number in zip(high, (3, 4))]  # noqa: E731
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([CHROMIUM, *flags], preexec_fn=connect, close_fds=False, **silent)
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.number, self.buffer, self.session = 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.read], [], [], 120)[0], f"no answer to {method}"
                piece = os.read(self.read, 1 << 20)
                assert piece, "Chromium has gone"
                self.buffer += piece
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, script):
        """What JavaScript says in the page, or the promise of it."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path, width=1280, height=860, scheme="light"):
        """Wait until all pictures are drawn. The page begins anew."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=f"file://{path}")
        self.until("document.readyState == 'complete' && typeof data == 'object' && rival.image.complete")
        assert self.value("Promise.all([plan, rival, uncached].map(run => run.image.decode())).then(() => true)")

    def until(self, script, seconds=60):
        began = time.monotonic()
        while not self.value(script):
            assert time.monotonic() - began < seconds, script
            time.sleep(0.05)

    def press(self, key, times=1):
        event = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": key} if key == " " else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector):
        x, y = self.value(
            f"(e => (e.scrollIntoView({{block: 'center'}}), (b => [b.x + b.width / 2, b.y + b.height / 2])"
            f"(e.getBoundingClientRect())))(document.querySelector('{selector}'))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@pytest.fixture(scope="module")
def unet():
    """Takes words, is guided, and draws pictures that differ from step to step."""
    unet = UNet(replace(SMALL, model_channels=8, groups=4, context_dim=8, num_tokens=5)).eval()
    unet.load_state_dict({key: official_weight(key, tuple(old.shape)) for key, old in unet.state_dict().items()})
    unet.diffusion, unet.vocabulary = Diffusion(), WORDS
    return unet


def made(folder, unet, *flags):
    save(folder / "net.pt", unet)
    out = folder / "page.html"
    explore.main(explore.parse(["--ckpt", str(folder / "net.pt"), "--out", str(out), *flags]))
    return out


@pytest.fixture(scope="module")
def page(tmp_path_factory, unet):
    return made(tmp_path_factory.mktemp("page"), unet, "--steps", str(STEPS))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.process.terminate()
    browser.process.wait()


def data_of(page):
    return json.loads(re.search(r"const data = (.*);\n", page.read_text("utf-8"))[1])


def test_page_is_whole_and_asks_for_nothing(page):
    text = page.read_text("utf-8")
    assert not re.search(r"(src|href)=\"|https?://|url\(|@import|/\*DATA\*/", text)
    assert page.stat().st_size < 4e6


def test_costs_are_those_of_the_plans(page, unet):
    data = data_of(page)
    assert len(data["plans"]) == 1 + 4 * 3 * 2 and data["intervals"] == [1, 2, 3, 5, 10]
    for key, run in data["plans"].items():
        N, branch, forecast = key.split(",")
        plan = uniform(STEPS, int(N), int(branch), forecast)
        assert run["full"] == [i in plan.refresh for i in range(STEPS)]
        cost = full_passes(unet, plan)
        assert run["gmacs"][-1] == pytest.approx(cost * 2 * macs(unet) / 1e9)  # guided
        assert run["rival"] <= cost < run["rival"] + 1
        assert len(run["errors"]) == STEPS
    for steps, run in data["rivals"].items():
        assert run["gmacs"] == pytest.approx([2e-9 * macs(unet) * (i + 1) for i in range(int(steps))])
        assert run["name"] in explore.RIVALS


def test_a_plan_that_skips_less_is_nearer_to_uncached(page):
    plans = data_of(page)["plans"]
    assert plans["1,1,hold"]["psnr"] is None
    assert plans["2,3,hold"]["psnr"] > plans["10,3,hold"]["psnr"]


def test_rival_is_the_best_of_the_solvers(unet):
    stage = explore.Stage(unet, explore.Prompts([]), range(1), torch.ones(1, 3, 16, 16), dict.fromkeys((None, 1), 0))
    errors = {name: stage.run(uniform(4, 1), **s)[1]["errors"][-1] for name, s in explore.RIVALS.items()}
    best = stage.rival(4)
    assert len(set(errors.values())) > 1 and best["errors"][-1] == errors[best["name"]] == min(errors.values())


def test_sliders_change_pictures_and_words(browser, page):
    browser.open(page)
    words, seen = ("macs", "interval-value", "branch-value", "verdict"), []
    for control, key in ((None, None), ("interval", "ArrowLeft"), ("branch", "ArrowRight"), ("interval", "ArrowRight")):
        if control:
            browser.value(f"$('{control}').focus()")
            browser.press(key)
            assert browser.value(f"$('{control}').getAttribute('aria-valuetext') == $('{control}-value').textContent")
        browser.until("plan.image.complete && rival.image.complete")
        said = [browser.value(f"$('{id}').textContent") for id in words]
        seen.append((browser.value(PICTURES.format("cached")), *said))
    pictures, costs, intervals, branches, verdicts = zip(*seen)
    assert len(set(pictures)) == 4 and len(set(costs)) == 4
    assert intervals == ("1 step in 5", "1 step in 3", "1 step in 3", "1 step in 5")
    assert branches == ("1 of 4 pairs", "1 of 4 pairs", "2 of 4 pairs", "2 of 4 pairs")
    assert all(re.search(r"buys \d+ steps of (DDIM|DPM-Solver\+\+\(2M\)) without a cache", words) for words in verdicts)
    browser.value("$('interval').focus()")
    browser.press("ArrowLeft", 4)
    assert browser.value("[$('interval-value').textContent, $('macs').textContent]") == ["every step", "no MACs saved"]
    assert browser.value(PICTURES.format("cached")) == browser.value(PICTURES.format("uncached"))


def test_extrapolation_is_another_picture(browser, page):
    browser.open(page)
    before = browser.value(PICTURES.format("cached"))
    browser.click("label:has([value=linear])")
    browser.until("plan.image.complete")
    assert browser.value("forecast") == "linear" and browser.value(PICTURES.format("cached")) != before
    assert "of steps 11 and 16" in browser.value("$('unet').textContent")


def test_steps_light_the_blocks_that_run(browser, page):
    browser.open(page)
    lit = "[...document.querySelectorAll('#unet .live.name')].map(name => name.textContent)"
    browser.value("move(5)")
    assert len(browser.value(lit)) == 2 * 4 + 1 and "keeps cached_U" in browser.value("$('unet').textContent")
    browser.value("$('branch').focus()")
    browser.press("ArrowRight")
    browser.value("move(7)")
    assert browser.value(lit) == ["D0", "U0", "D1", "U1"] and "of step 6" in browser.value("$('unet').textContent")
    heights = browser.value("[...$('bars').children].map(bar => parseFloat(bar.style.height))")
    assert heights[5] == 100 and heights[6] == heights[7] < 100 and len(heights) == STEPS
    spent = browser.value("plan.gmacs[7] >= rival.gmacs[+$('rival-note').textContent.match(/step (\\d+) of/)[1] - 1]")
    assert spent  # the rival has had no more


def test_keyboard_steps_and_plays(browser, page):
    browser.open(page)
    at = "[+$('step').value, $('step').getAttribute('aria-valuetext'), $('now').textContent]"
    assert browser.value(at)[1:] == ["step 20 of 20, partial, t = 0"] * 2
    last = browser.value(PICTURES.format("cached"))
    browser.press("ArrowLeft", 3)
    assert browser.value(at)[0] == 16 and browser.value(PICTURES.format("cached")) != last
    browser.value("$('step').focus()")
    browser.press("ArrowLeft")
    assert browser.value(at) == [15, "step 16 of 20, full, t = 200", "step 16 of 20, full, t = 200"]
    browser.press(" ")
    assert browser.value("$('play').getAttribute('aria-label')") == "Pause"
    browser.until("+$('step').value >= 17")
    browser.press(" ")
    stopped = browser.value("+$('step').value")
    time.sleep(0.5)
    assert browser.value("+$('step').value") == stopped


def test_play_runs_from_the_first_step_to_the_last_and_stops(browser, page):
    browser.open(page)
    last = browser.value(PICTURES.format("cached"))
    browser.click("#play")
    assert browser.value("+$('step').value") < 15 and browser.value("$('play').getAttribute('aria-label')") == "Pause"
    dots = [browser.value("document.querySelector('#plot .dot.plan').getAttribute('cx')")]
    browser.until("timer === null")
    dots += [browser.value("document.querySelector('#plot .dot.plan').getAttribute('cx')")]
    assert float(dots[0]) < float(dots[1])
    assert browser.value("+$('step').value") == STEPS - 1 and browser.value(PICTURES.format("cached")) == last
    browser.value("$('play').focus()")
    browser.press(" ")
    assert browser.value("timer !== null")


@pytest.mark.parametrize("width", [320, 390])
def test_phone(browser, page, width):
    browser.open(page, width, 800)
    assert browser.value("document.documentElement.scrollWidth") == width
    boxes = "[...document.querySelectorAll('#{0} canvas')].map(c => c.getBoundingClientRect()).map(b => [b.width, b.y])"
    for strip in ("cached", "uncached", "rival"):
        widths, tops = zip(*browser.value(boxes.format(strip)))
        assert min(widths) >= 80 and len({round(top) for top in tops}) == 2
    assert browser.value("$('play').getBoundingClientRect().bottom") <= 800  # in sight, whatever else is


def test_dark_is_dark(browser, page):
    light = {}
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        paper = browser.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        light[scheme] = sum(paper) / 3, browser.value("getComputedStyle(document.querySelector('canvas')).filter")
    assert light["light"][0] > 240 and light["dark"][0] < 40
    assert light["light"][1] == "brightness(1)" and 0 < float(light["dark"][1][11:-1]) < 0.9


def test_prompts_are_shown_as_they_are(browser, tmp_path, unet, monkeypatch):
    monkeypatch.setattr(explore, "INTERVALS", (1, 5))
    said = "</script> cat < <!--<script>"  # which HTML would have a second script begin
    page = made(tmp_path, unet, "--steps", "10", "--prompt", said)
    assert data_of(page)["labels"] == [said]
    browser.open(page)
    assert browser.value("[...document.querySelectorAll('#cached figcaption')].map(f => f.textContent)") == [said]


def test_a_network_without_words(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "INTERVALS", (1, 5))
    monkeypatch.setattr(explore, "FINEST", {**explore.FINEST, "steps": 20})
    page = made(tmp_path, random_unet(), "--steps", "10", "--num", "2")
    assert data_of(page)["labels"] == ["seed 0", "seed 1"] and "guidance" not in data_of(page)["about"]
    browser.open(page)
    assert browser.value("document.querySelectorAll('#cached canvas').length") == 2


def test_own_examples_are_taken_from_all_over(tmp_path, unet, monkeypatch):
    monkeypatch.setattr(explore, "FINEST", {**explore.FINEST, "steps": 2})
    monkeypatch.setattr(unet, "vocabulary", replace(WORDS, examples=("red", "apple", "cat", "script", "red cat")))
    save(tmp_path / "net.pt", unet)
    for asked, texts, seeds in ((None, ["red", "cat"], [0, 2]), (["cat", "apple"], ["cat", "apple"], [0, 1])):
        stage = explore.prepared(str(tmp_path / "net.pt"), asked, num=2, steps=10)
        assert stage.prompts.labels(stage.seeds) == texts and list(stage.seeds) == seeds
        assert stage.prompts.guidance == WORDS.guidance and len(stage.reference) == 2
    with pytest.warns(UserWarning, match="of 3 prompts or classes, only the first 2 are drawn"):
        explore.prepared(str(tmp_path / "net.pt"), ["cat", "apple", "red"], num=2, steps=10)


def test_wrong_flags(tmp_path):
    save(tmp_path / "net.pt", random_unet())
    (tmp_path / "d.html").mkdir()
    ckpt = ["--ckpt", str(tmp_path / "net.pt")]
    for flags, words in (
        (["--num", "0"], "0 pictures"),
        (["--num", "7"], "7 pictures"),
        (["--out", str(tmp_path / "x.txt")], "must be .html"),
        (["--out", str(tmp_path)], "must be .html"),
        (["--out", str(tmp_path / "d.html")], "there is a folder of that name"),
        ([*ckpt, "--steps", "9"], "--steps 9"),
        ([*ckpt, "--steps", "1001"], "--steps 1001"),
        ([*ckpt, "--prompt", "cat"], "cannot be told"),
    ):
        with pytest.raises(ValueError, match=words):
            explore.main(explore.parse([*flags] if "--out" in flags else [*flags, "--out", str(tmp_path / "x.html")]))
    short = random_unet()
    short.diffusion = Diffusion(num_timesteps=100)
    save(tmp_path / "net.pt", short)
    with pytest.raises(ValueError, match=r"the reference takes 200 timesteps, and .* has 100"):
        explore.main(explore.parse([*ckpt, "--out", str(tmp_path / "x.html")]))
    save(tmp_path / "net.pt", random_unet(replace(SMALL, context_dim=8, num_tokens=5)))
    with pytest.raises(ValueError, match="takes a context, but no words"):
        explore.main(explore.parse([*ckpt, "--out", str(tmp_path / "x.html")]))
    assert not (tmp_path / "x.html").exists()
