"""Each deterministic sampler against diffusers' scheduler of the same name, step for step."""

import pytest
from conftest import noise, relative

from minicache import denoise

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
LATENT = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}  # Stable Diffusion's conventions
TOLERANCE = 1e-5


def follow(unet, scheduler, last: int = 0, **settings) -> None:
    """Each step from the same x, so that differences do not add up; last: how many at the end are left out."""
    steps = list(denoise(unet, x_T=noise(2, 3, 16, 16, seed=1), **settings))
    for before, step in zip([None, *steps], steps[: len(steps) - last]):
        x = before.x if before else noise(2, 3, 16, 16, seed=1)
        theirs = scheduler.step(step.eps, scheduler.timesteps[step.i], x).prev_sample
        assert relative(step.x, theirs) < TOLERANCE, step.i


@pytest.mark.parametrize("steps", [2, 3, 12, 50])
def test_pndm(unet, steps):
    scheduler = diffusers.PNDMScheduler(**LATENT, skip_prk_steps=True)
    scheduler.set_timesteps(steps)
    ours = [step.t for step in denoise(unet, [0], sampler="pndm", steps=steps)]
    assert ours == scheduler.timesteps.tolist()
    follow(unet, scheduler, sampler="pndm", steps=steps)


def test_offset(unet):
    scheduler = diffusers.DDIMScheduler(**LATENT, clip_sample=False)
    scheduler.set_timesteps(12)
    assert [step.t for step in denoise(unet, [0], spacing="offset", steps=12)] == scheduler.timesteps.tolist()
    follow(unet, scheduler, spacing="offset", steps=12)
