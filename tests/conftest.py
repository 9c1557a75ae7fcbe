"""Networks for the tests: small, random in every weight, quick."""

import json
import re
import sys
import types
import zlib
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minicache import Diffusion, UNet, UNetConfig, placement
from minicache.captions import CATEGORIES
from minicache.formats.compvis import COMPVIS
from minicache.formats.diffusers import DIFFUSERS, OLD_ATTENTION
from minicache.formats.pesser import PESSER

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent
SMALL = UNetConfig(image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,))
BARE = {"image_size": 16, "groups": 32, "diffusion": Diffusion()}  # what a bare file of SMALL does not tell


def official_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weights of golden/README.md: a function of the key in the official code's naming, and of the shape."""
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        r *= np.prod(shape[1:]) ** -0.5
        if key.endswith((".q.weight", ".k.weight")):
            r *= 2
    elif key.endswith("weight") and re.search(r"norm|\.(in|out)_layers\.0\.|^out\.0\.", key):  # CompVis' norms, too
        r = 1 + 0.1 * r
    else:
        r *= 0.1
    return torch.from_numpy(r.astype(np.float32))


def random_unet(config: UNetConfig = SMALL) -> UNet:
    """Every weight random, so that none can hide: fresh networks have zeros in the last layers."""
    with torch.device("meta"):
        unet = UNet(config)
    shapes = unet.state_dict()
    keys = {name: name for name in shapes} if config.context_dim else PESSER.keys(unet)
    state = {ours: official_weight(key, tuple(shapes[ours].shape)) for ours, key in keys.items()}
    unet.load_state_dict(state, assign=True)
    unet.diffusion = Diffusion()
    return unet.eval()


@cache
def compvis(name: str) -> tuple[dict[str, np.ndarray], UNetConfig, Diffusion, dict[str, torch.Tensor]]:
    """Outputs of CompVis' code (golden/README.md), the network that gave them, and its weights by their names."""
    golden = dict(np.load(GOLDEN / f"compvis_{name}_16px.npz"))
    meta = json.loads(str(golden["meta"]))
    size, classes = meta["latent_size"], meta.get("classes")
    config = UNetConfig(
        size, meta["model_channels"], meta["channel_mult"], meta["num_res_blocks"],
        sorted((size // factor for factor in meta["attention_factors"]), reverse=True), meta["channels"],
        meta["channels"],
        context_dim=meta["context_dim"], heads=meta["heads"], num_tokens=classes, null_token=(classes or 1) - 1,
        adm=True,
    )  # fmt: skip
    with torch.device("meta"):
        unet = UNet(config)
    state = {}
    for ours, key in COMPVIS.keys(unet).items():
        conv = key.endswith((".proj_in.weight", ".proj_out.weight"))
        state[key] = official_weight(key, (*unet.state_dict()[ours].shape, *[1, 1] * conv))
    return golden, config, Diffusion(1000, *meta["betas"], "fixed_small", "scaled_linear"), state


def foreign(unet: UNet, form: str) -> dict[str, torch.Tensor]:
    """The network's tensors as others store them; written down apart from the code that reads them."""
    state = unet.state_dict()
    if form.startswith("diffusers"):
        names = {theirs: state[ours] for ours, theirs in DIFFUSERS.keys(unet).items()}
        if form == "diffusers old":
            for old, new in OLD_ATTENTION.items():
                names = {key.replace(new, old): value for key, value in names.items()}
        return names
    pesser = {}
    for ours, theirs in PESSER.keys(unet).items():
        attention = bool(re.search(r"attn.*\.(q|k|v|proj_out)\.weight", theirs))
        pesser[theirs] = state[ours][:, :, None, None] if attention else state[ours]
    return pesser


def tensorflow(unet: UNet, suffix: str = "") -> dict[str, np.ndarray]:
    variables = {}
    for key, tensor in foreign(unet, "pesser").items():
        path, _, parameter = key.rpartition(".")
        path = re.sub(r"(down|up)\.(\d+)", r"\1_\2", path)
        path = re.sub(r"\b(block|attn)\.(\d+)", r"\1_\2", path).replace("dense.", "dense")
        array = tensor.numpy()
        if array.ndim == 4:
            nin = array.shape[2:] == (1, 1)
            array = array[:, :, 0, 0].T if nin else array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            array = array.T
        normed = "norm" in path.split(".")[-1]
        name = {"weight": "gamma" if normed else "W", "bias": "beta" if normed else "b"}[parameter]
        variables[f"model/{path.replace('.', '/')}/{name}{suffix}"] = array
    return variables


@pytest.fixture(scope="session")
def unet() -> UNet:
    return random_unet()


@pytest.fixture(scope="session")
def official() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "official_deepcache_16px.npz"))


@pytest.fixture(scope="session")
def official_unet(official) -> UNet:
    meta = json.loads(str(official["meta"]))
    assert meta.pop("params") == 1624323
    return random_unet(UNetConfig(**meta))


@pytest.fixture(autouse=True)
def no_gradients():
    """Inference throughout; tests of training switch gradients on."""
    with torch.no_grad():
        yield


@pytest.fixture
def inception(monkeypatch) -> list[int]:
    """A stand-in for torch-fidelity, whose features are the three colours' means; how many images each call saw."""
    seen = []

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name: str, features_list: list[str]):
            super().__init__()
            assert features_list == ["2048"]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            seen.append(len(x))
            return (x.double().mean((2, 3)),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b) -> float:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm()).item()


def draw_emoji(folder: Path, names: tuple[str, ...] = ("red apple", "green apple", "blue cat")) -> Path:
    """Two packages, as npm unpacks them: each name is a plain square, darker by one of the vendors.

    The categories are those of `captions.CATEGORIES`, in turn.
    """
    for vendor, package, light in (("google", "emoji-datasource-google/package", 255), ("twitter", "twitter", 200)):
        rows = [emoji_row(name, category) for name, category in zip(names, cycle(CATEGORIES))]
        pictures = folder / package / "img" / vendor / "64"
        pictures.mkdir(parents=True)
        for row in rows:
            color = [light * (word in row["name"]) for word in ("RED", "GREEN", "BLUE")]
            Image.new("RGB", (64, 64), tuple(color)).save(pictures / row["image"])
        rows += [emoji_row("a flag", "Flags"), emoji_row("seven", "Symbols", subcategory="keycap")]
        (folder / package / "emoji.json").write_text(json.dumps([*rows, emoji_row("ghost", CATEGORIES[0], has=False)]))
    return folder


def emoji_row(name: str, category: str, subcategory: str = "thing", has: bool = True) -> dict:
    """A row of emoji.json; the short name is "NAME_thing" with a number, whose words are NAME and thing."""
    return {
        "name": name.upper(),
        "short_names": [f"{name.replace(' ', '_')}_thing2"],
        "image": f"{name.replace(' ', '-')}.png",
        "category": category,
        "subcategory": subcategory,
        "has_img_google": has,
        "has_img_twitter": has,
    }


class Recorder(torch.nn.Module):
    """Predicts zero and keeps what it was shown, so that x shows the noise bit for bit."""

    config, diffusion, D = SMALL, Diffusion(), range(4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward_full(self, x, t, branch, context=None):
        self.seen.append(x.clone())
        return torch.zeros_like(x), x


@pytest.fixture
def graphs(monkeypatch):
    """Compilation without the compiler: every graph that dynamo traces is noted here, and run as it is."""
    traced, original = [], torch.compile

    def note(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda forward, mode, **settings: original(forward, backend=note, **settings))
    monkeypatch.setattr(placement, "compiled", cache(placement.compiled.__wrapped__))
    torch._dynamo.reset()
    yield traced
    torch._dynamo.reset()
