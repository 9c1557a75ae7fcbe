"""Against outputs of the official DeepCache code and of CompVis' latent diffusion (golden/README.md). The differences
seen, relative L2, float32 on an x86 CPU: 2.0e-6 to 2.5e-6 for single passes of the first, 1.1e-6 to 1.5e-6 of the
second; for whole sampling loops 6e-7 to 9e-7, and 7e-7 to 2.5e-6."""

import json

import pytest
import torch
from conftest import GOLDEN, compvis, relative

from minicache import nonuniform, sample, uniform
from minicache.checkpoints import read

TOLERANCE = 2e-5


@pytest.mark.parametrize("t", [0, 10, 500, 999])
def test_full_pass(official, official_unet, t):
    assert relative(official_unet(torch.tensor(official["x"]), t), official[f"full_t{t}"]) < TOLERANCE


@pytest.mark.parametrize("branch", range(2, 10))
def test_partial_pass_with_a_cache_of_another_step(official, official_unet, branch):
    x, x2 = torch.tensor(official["x"]), torch.tensor(official["x2"])
    _, cached_U = official_unet.forward_full(x, 500, branch)
    assert list(cached_U.shape) == official[f"cached_b{branch}_shape"].tolist()
    assert (
        relative(official_unet.forward_partial(x2, 490, cached_U, branch), official[f"partial_b{branch}"]) < TOLERANCE
    )


@pytest.mark.parametrize(
    "name, plan, spacing",
    [
        ("sample_S20_N5_branch3_uniform", uniform(20, 5, branch=3), "uniform"),
        ("sample_S20_N5_branch2_quad", uniform(20, 5, branch=2), "quad"),
        ("sample_S20_N1_branch3_uniform", uniform(20, 1, branch=3), "uniform"),
        ("sample_S20_N4_branch3_uniform_c6_p1.4", nonuniform(20, 4, 6, 1.4, branch=3, official=True), "uniform"),
    ],
)
def test_sampling_loop(official, official_unet, name, plan, spacing):
    x = sample(official_unet, x_T=torch.tensor(official["x"]), plan=plan, spacing=spacing)
    assert relative(x, official[name]) < TOLERANCE


@pytest.mark.parametrize("case", json.loads((GOLDEN / "official_nonuniform_schedules.json").read_text()), ids=str)
def test_nonuniform_schedule_of_the_official_code(case):
    plan = nonuniform(case["steps"], case["interval"], case["center"], case["power"], official=True)
    assert list(plan.refresh) == case["official"]


def conditions(golden) -> torch.Tensor:
    """Tokens of the miniature Stable Diffusion; labels, one a picture, of the miniature LDM-4-G."""
    labels = json.loads(str(golden["meta"])).get("labels")
    return torch.tensor(labels)[:, None] if labels else torch.tensor(golden["context"])


@pytest.mark.parametrize("name", ["sd", "ldm"])
def test_passes_of_latent_diffusion(tmp_path, name):
    golden, config, diffusion, state = compvis(name)
    torch.save(state, tmp_path / "net.ckpt")
    unet = read(tmp_path / "net.ckpt", config=config, diffusion=diffusion)
    for t in (0, 1, 500, 999):
        assert relative(unet(torch.tensor(golden["x"]), t, conditions(golden)), golden[f"eps_t{t}"]) < 5e-6


@pytest.mark.parametrize("sampler, theirs", [("ddim", "ddim"), ("pndm", "plms")])
@pytest.mark.parametrize("name", ["sd", "ldm"])
def test_guided_samples_of_latent_diffusion(tmp_path, name, sampler, theirs):
    """20 guided steps of CompVis' samplers; plms calls the network once more. LDM's null class says nothing."""
    golden, config, diffusion, state = compvis(name)
    torch.save(state, tmp_path / "net.ckpt")
    unet = read(tmp_path / "net.ckpt", config=config, diffusion=diffusion)
    guidance = json.loads(str(golden["meta"]))["scale"]
    negative = {"negative": torch.tensor(golden["unconditional"])} if name == "sd" else {}
    x = sample(unet, x_T=torch.tensor(golden["x"]), context=conditions(golden), guidance=guidance, steps=20,
               sampler=sampler, spacing="offset", clip_x0=False, **negative)  # fmt: skip
    assert relative(x, golden[f"{theirs}_S20_scale{guidance:g}"]) < 1e-5
