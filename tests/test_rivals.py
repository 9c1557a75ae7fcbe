"""Each deterministic sampler against diffusers' scheduler of the same name, step for step."""

import math

import pytest
import torch
from conftest import noise, relative

from minicache import Diffusion, denoise

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


def test_plms(unet):
    """iPNDM's scheduler takes v, and its own alpha and sigma are of another schedule: it is given ours."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(12)
    a = torch.tensor([*(Diffusion().alpha_bar(t) for t in Diffusion().timesteps(12, "rho4")), 1.0])
    scheduler.alphas, scheduler.betas = a.sqrt(), (1 - a).sqrt()
    x = noise(2, 3, 16, 16, seed=1)
    for step in denoise(unet, x_T=x, sampler="plms", spacing="rho4", steps=12):
        v = a[step.i].sqrt() * step.eps - (1 - a[step.i]).sqrt() * step.x0
        x = scheduler.step(v, scheduler.timesteps[step.i], x).prev_sample
        assert relative(step.x, x) < TOLERANCE, step.i
        x = step.x


MULTISTEP = {
    "dpm++2m": ("DPMSolverMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "zero"}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
    "unipc3": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2"}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
}


@pytest.mark.parametrize("spacing", ["trailing", "logsnr", "rho7"])
@pytest.mark.parametrize("sampler", MULTISTEP)
def test_multistep(unet, sampler, spacing):
    """Their last step is of first order: ours is the image itself, as theirs with final_sigmas_type zero."""
    name, settings = MULTISTEP[sampler]
    scheduler = getattr(diffusers, name)(**BETAS, **settings, lower_order_final=False)
    ts, steps = Diffusion().timesteps(12, spacing), 12
    scheduler.set_timesteps(steps)
    sigmas = [math.sqrt(1 / Diffusion().alpha_bar(t) - 1) for t in ts]
    scheduler.sigmas, scheduler.timesteps = torch.tensor([*sigmas, 0.0]), torch.tensor(ts)
    follow(unet, scheduler, last=1, sampler=sampler, spacing=spacing, steps=steps)
    final = list(denoise(unet, [0], sampler=sampler, spacing=spacing, steps=steps))[-1]
    assert relative(final.x, final.x0) < 1e-6
