"""Properties of all values, not of chosen ones: what is valid runs, what is not is refused in one sentence, and what
goes to JSON comes back. hypothesis draws the values, the same ones in every run.
"""

import csv
import json
import math
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minicache import CachePlan, Diffusion, Recipe, nonuniform, sample, uniform
from minicache.captions import captioned
from minicache.diffusion import BETA_SCHEDULES, SPACINGS, VARIANCES
from minicache.plan import FORECASTS
from minicache.samplers import SAMPLERS
from minicache.solver import Solver
from minicache.words import Vocabulary, words_in

quick = settings(derandomize=True, deadline=None, max_examples=40, database=None)

# Anything that JSON can say, numbers out of all bounds among it.
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2.5, 1e308, 10**9, 10**400, math.nan, math.inf])
few_numbers = st.lists(numbers, max_size=4)
few_floats = st.lists(st.floats(), max_size=4)
plain = st.none() | st.booleans() | numbers | st.text(max_size=5)
junk = plain | st.lists(plain, max_size=4) | st.lists(st.lists(plain, max_size=3), max_size=3) | st.dictionaries(
    st.sampled_from(["steps", "t", "x"]), plain, max_size=2
)  # fmt: skip

spacings = st.sampled_from(SPACINGS) | st.floats(0.5, 100).map(lambda rho: f"rho{rho:.2f}")
schedules = st.sampled_from(BETA_SCHEDULES)
steps = st.integers(1, 60)


@st.composite
def plans(draw, length=steps):
    """Any plan: from the constructors, or refreshes and alphas of one's own."""
    S, branch = draw(length), draw(st.integers(1, 4))
    forecast, interval = draw(st.sampled_from(list(FORECASTS))), draw(st.integers(1, 70))
    kind = draw(st.sampled_from(["uniform", "nonuniform", "free"]))
    if kind == "uniform":
        return uniform(S, interval, branch, forecast)
    if kind == "nonuniform":
        return nonuniform(S, interval, draw(st.floats(0, S)), draw(st.floats(1, 4)), branch, forecast)
    refresh = sorted({0, *draw(st.lists(st.integers(0, S - 1), max_size=8))})
    partial = [i for i in range(S) if len(refresh) > 1 and i > refresh[1] and i not in refresh]
    alpha = {i: draw(st.floats(-2, 2)) for i in partial[:5]}
    return CachePlan(S, branch, refresh, [alpha.get(i, 0.0) for i in range(S)] if alpha else ())


@st.composite
def recipes(draw):
    """Any recipe for pure noise, of a sampler by name or of a solver."""
    plan = draw(plans(st.integers(3, 60)))
    common = {
        "clip_x0": draw(st.sampled_from([None, True, False])),
        "guidance": draw(st.floats(0, 100)),
        "fingerprint": draw(st.none() | st.text("0123456789abcdef", min_size=16, max_size=16)),
        "error": draw(st.none() | st.floats(0, 10)),
    }
    if draw(st.booleans()):
        hundredths = st.integers(100, 99900).map(lambda t: t / 100)
        t = draw(st.lists(hundredths, min_size=plan.steps, max_size=plan.steps, unique=True))
        rows = draw(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=4), min_size=plan.steps))
        solver = Solver(sorted(t, reverse=True), [row[: j + 1] for j, row in enumerate(rows[: plan.steps])])
        return Recipe(plan, solver, **common)
    sampler = draw(st.sampled_from(list(SAMPLERS)))
    noise = {"eta": {"eta": draw(st.floats(0, 1))}, "variance": {"variance": draw(st.sampled_from(VARIANCES))}}
    spacing = draw(st.none() | spacings)
    return Recipe(plan, sampler, spacing, **common, **noise.get(SAMPLERS[sampler].noise, {}))


class Perfect(torch.nn.Module):
    """A network that knows the one image there is, and so the noise in any x, full pass or partial."""

    class config:
        in_channels, image_size = 3, 2

    def __init__(self, diffusion: Diffusion):
        super().__init__()
        self.diffusion = diffusion
        self.image = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2))

    def forward_full(self, x, t, branch, context=None):
        a = self.diffusion.alpha_bar(t.item())
        return (x - math.sqrt(a) * self.image) / math.sqrt(1 - a), x

    def forward_partial(self, x, t, cached_U, branch, context=None):
        return self.forward_full(x, t, branch)[0]


def or_one_sentence(make, *args, **named):
    """What make gives; None where it refuses, as it should: by a ValueError of one line."""
    try:
        return make(*args, **named)
    except ValueError as error:
        assert str(error) and "\n" not in str(error), str(error)
        assert not str(error).startswith(("could not convert", "math domain", "cannot convert")), str(error)


def as_json(value) -> dict:
    return json.loads(json.dumps(asdict(value)))


@quick
@given(plans())
def test_plans(plan):
    assert CachePlan(**as_json(plan)) == plan
    assert plan.refresh[0] == 0 and len(plan.alpha) == plan.steps
    assert not any(plan.alpha[i] for i in plan.refresh)


@quick
@given(steps, st.integers(1, 70), st.floats(0, 1), st.floats(1, 100), st.booleans())
def test_nonuniform_plans(S, interval, center, power, official):
    plan = or_one_sentence(nonuniform, S, interval, center * S, power, official=official)
    assert official or plan
    assert plan is None or len(plan.refresh) == math.ceil(S / interval)


@quick
@given(numbers, numbers, few_numbers, few_floats, st.text(max_size=5))
def test_plans_of_any_numbers(S, branch, refresh, alpha, forecast):
    or_one_sentence(CachePlan, S, branch, refresh, alpha)
    or_one_sentence(CachePlan, 3, 1, refresh, alpha)
    or_one_sentence(CachePlan, 3, 1, (0, 1), alpha)
    or_one_sentence(uniform, S, branch, 1, forecast)
    or_one_sentence(uniform, 10, branch, S)


@quick
@given(numbers, numbers, numbers, numbers)
def test_nonuniform_plans_of_any_numbers(S, interval, center, power):
    or_one_sentence(nonuniform, S, interval, center, power)
    or_one_sentence(nonuniform, 10, 3, center, power)


@quick
@given(st.integers(1, 1000), st.floats(1e-9, 1), st.floats(0, 1), spacings, st.floats(0, 1), schedules)
def test_spacings(T, beta_end, ratio, spacing, share, schedule):
    """So many timesteps, falling, between 0 and T - 1; or a sentence."""
    diffusion = or_one_sentence(Diffusion, T, ratio * beta_end, beta_end, beta_schedule=schedule)
    S = max(1, round(share * T))
    ts = diffusion and or_one_sentence(diffusion.timesteps, S, spacing)
    if ts:
        assert len(ts) == S and ts == sorted(ts, reverse=True)
        assert T > ts[0] > 0 and ts[-1] >= 0


@quick
@given(st.integers(), st.text(max_size=9) | numbers.map(lambda rho: f"rho{rho}"), st.integers(), numbers, numbers)
def test_spacings_and_diffusions_of_anything(S, spacing, start, low, high):
    or_one_sentence(Diffusion().timesteps, S, spacing, start)
    or_one_sentence(Diffusion().timesteps, 10, spacing)
    or_one_sentence(Diffusion().timesteps, 10, "trailing", start)
    or_one_sentence(Diffusion, S, low, high)
    or_one_sentence(Diffusion, 1000, low, high)
    or_one_sentence(Diffusion, 1000, 1e-4, high)


@quick
@given(recipes())
def test_recipes(tmp_path_factory, recipe):
    """Through a file and back, and through the loop: however the steps are cached and weighed, a perfect network's
    image comes out."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    recipe.save(path)
    assert Recipe.load(path) == recipe
    drawn = recipe.settings(recipe.fingerprint) | {"guidance": 1.0}
    network = Perfect(Diffusion())
    images = or_one_sentence(sample, network, [0], **drawn)
    if images is not None and isinstance(recipe.sampler, str) and recipe.spacing != "offset":  # which leaves some noise
        assert torch.allclose(images, network.image, atol=0.02)


@quick
@given(recipes(), st.data())
def test_recipes_of_anything(tmp_path_factory, recipe, data):
    content = as_json(recipe)
    inner = [content, content["plan"], *([content["sampler"]] if isinstance(content["sampler"], dict) else [])]
    for _ in range(3):
        place = data.draw(st.sampled_from(inner))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(junk)
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(json.dumps(content))
    loaded = or_one_sentence(Recipe.load, path)
    if loaded:
        loaded.save(path)
        assert Recipe.load(path) == loaded


LATIN = st.text("abcxyzABZßéÉñüǚ _.,'-\n\0", max_size=20)  # what words_in takes


@quick
@given(st.lists(LATIN, max_size=6), st.lists(LATIN | st.text(max_size=20), max_size=4), st.integers(1, 20))
def test_vocabularies(texts, prompts, length):
    words = words_in(" ".join(texts))
    assert words_in(" ".join(words)) == words
    vocabulary = Vocabulary(words, length)
    assert Vocabulary(**as_json(vocabulary)) == vocabulary
    for prompt in [*prompts, *texts, " ".join(words[:length])]:
        ids = or_one_sentence(vocabulary.encode, prompt)
        if ids is not None:
            assert [words[i - 1] for i in ids[0].tolist() if i] == words_in(prompt)


@quick
@given(st.lists(st.text(max_size=5), max_size=3), numbers, numbers, st.lists(st.text(max_size=9), max_size=3))
def test_vocabularies_of_anything(words, length, guidance, examples):
    or_one_sentence(Vocabulary, words, length, guidance, examples)
    or_one_sentence(Vocabulary, ["red"], 3, guidance, examples)
    or_one_sentence(Vocabulary, ["red"], 3, 1.0, examples)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("a.png", "b c.png", "ü.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    return folder


@quick
@given(st.lists(st.tuples(st.sampled_from(["a.png", "b c.png", "ü.png"]), LATIN | st.text(max_size=9)), max_size=5))
def test_captions(pictures, rows):
    """What a CSV writer wrote is read back."""
    with open(pictures / "captions.csv", "w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows(rows)
    found = or_one_sentence(captioned, pictures)
    said = [(name, tuple(or_one_sentence(words_in, caption) or ())) for name, caption in rows]
    if rows and all(words for _, words in said) and len({*said}) == len(said):
        assert [path.name for path in found.files] == [name for name, _ in rows]
        assert [words_in(caption) for caption in found.captions] == [words_in(caption) for _, caption in rows]
        assert found.vocabulary().encode(*found.captions).any(1).all()


@quick
@given(st.binary(max_size=60) | st.text("a.png,\"'\n\r\0 x", max_size=40).map(str.encode))
def test_captions_of_any_bytes(pictures, content):
    (pictures / "captions.csv").write_bytes(content)
    or_one_sentence(captioned, pictures)
