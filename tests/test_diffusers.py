"""diffusers as an independent implementation of the network and of the schedulers."""

import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, compvis, noise, random_unet, relative

from minicache import CIFAR10, LDM_IMAGENET, SD_15, Diffusion, UNet, denoise
from minicache.checkpoints import read
from minicache.formats.diffusers import DIFFUSERS, OLD_ATTENTION, config_to_diffusers, save_diffusers

diffusers = pytest.importorskip("diffusers")
TOLERANCE = 1e-5  # seen: 1e-6 to 3e-6 relative L2, from sums in another order
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, groups=8), CIFAR10], ids=["small", "8 groups", "cifar10"])
def test_network(config):
    unet = random_unet(config)
    theirs = diffusers.UNet2DModel(
        **{k: v for k, v in config_to_diffusers(config).items() if k != "_class_name"}
    ).eval()
    state = unet.state_dict()
    theirs.load_state_dict({key: state[ours] for ours, key in DIFFUSERS.keys(unet).items()}, strict=True)
    x = noise(2, 3, config.image_size, config.image_size)
    for t in (0, 10, 999):
        assert relative(unet(x, t), theirs(x, t).sample) < TOLERANCE
    t = torch.tensor([3, 700])
    assert relative(unet(x, t), theirs(x, t).sample) < TOLERANCE


@pytest.fixture(params=["sd", "ldm"])
def latent(request, tmp_path):
    """A latent network in miniature, every weight random: ours, and theirs by way of a folder."""
    _, config, diffusion, state = compvis(request.param)
    torch.save(state, tmp_path / "bare.ckpt")
    ours = read(tmp_path / "bare.ckpt", config=config, diffusion=diffusion)
    save_diffusers(tmp_path / "unet", ours)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert theirs.config.cross_attention_dim == config.context_dim
    return ours, theirs


def tokens(ours, B: int = 2):
    return noise(B, 1 if ours.config.num_tokens else 9, ours.config.context_dim, seed=2)


def test_latent_networks(latent):
    ours, theirs = latent
    x, context = noise(2, ours.config.in_channels, 16, 16), tokens(ours)
    for t in (0, 10, 999, torch.tensor([3, 700])):
        assert relative(ours(x, t, context), theirs(x, t, context).sample) < TOLERANCE


@pytest.mark.parametrize("branch", [1, 2, 3, 4, 7, 12])
def test_partial_pass_of_latent_networks(latent, branch):
    """Theirs run in full, but what the ResBlock of U_branch takes from below is kept from the step before."""
    ours, theirs = latent
    n = ours.config.num_res_blocks + 1
    block, kept = theirs.up_blocks[-1 - (branch - 1) // n].resnets[n - 1 - (branch - 1) % n], []
    x, x2 = (noise(2, ours.config.in_channels, 16, 16, seed=seed) for seed in (0, 1))
    context = tokens(ours)
    eps, cached_U = ours.forward_full(x, 500, branch, context)

    def below(module, inputs):
        h, temb = inputs
        kept.append(h[:, : cached_U.shape[1]])
        return torch.cat([kept[0], h[:, cached_U.shape[1] :]], 1), temb

    block.register_forward_pre_hook(below)
    assert relative(eps, theirs(x, 500, context).sample) < TOLERANCE
    assert relative(cached_U, kept[0]) < TOLERANCE
    partial = theirs(x2, 490, context).sample
    assert relative(kept[1], kept[0]) > 0.01  # from below comes something else by now
    assert relative(ours.forward_partial(x2, 490, cached_U, branch, context), partial) < TOLERANCE


@pytest.mark.parametrize("branch", [1, 2, 3, 4, 5])
def test_the_official_helper_caches_what_we_do(latent, branch):
    """DeepCache's own package, whose cache_branch_id is branch - 1; four steps, the first and the third in full."""
    deepcache = pytest.importorskip("DeepCache.extension.deepcache")
    ours, theirs = latent
    steps, cached_U = torch.tensor([900, 700, 500, 300]), None
    pipe = types.SimpleNamespace(unet=theirs, scheduler=types.SimpleNamespace(timesteps=steps))
    helper = deepcache.DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=2, cache_branch_id=branch - 1)
    helper.enable()
    context = tokens(ours)
    for i, t in enumerate(steps):
        x = noise(2, ours.config.in_channels, 16, 16, seed=i)
        if i % 2 == 0:
            eps, cached_U = ours.forward_full(x, t, branch, context)
        else:
            eps = ours.forward_partial(x, t, cached_U, branch, context)
        assert relative(eps, pipe.unet(x, t, context).sample) < TOLERANCE


def test_latent_folders_go_both_ways(tmp_path, latent):
    ours, theirs = latent
    for safe in (False, True):
        theirs.save_pretrained(tmp_path / f"theirs{safe}", safe_serialization=safe)
        again = read(tmp_path / f"theirs{safe}", diffusion=ours.diffusion)
        x, context = noise(2, ours.config.in_channels, 16, 16), tokens(ours)
        assert torch.equal(again(x, 10, context), ours(x, 10, context))
        assert again.config == replace(ours.config, num_tokens=None, null_token=0)  # theirs leave the table out


@pytest.mark.parametrize("config", [SD_15, replace(LDM_IMAGENET, num_tokens=None, null_token=0)], ids=["sd", "ldm"])
def test_names_and_shapes_of_true_size(config):
    with torch.device("meta"):
        unet = UNet(config)
        fields = {k: v for k, v in config_to_diffusers(config).items() if k != "_class_name"}
        shapes, theirs = unet.state_dict(), diffusers.UNet2DConditionModel(**fields).state_dict()
    for ours, key in DIFFUSERS.keys(unet).items():
        assert theirs.pop(key).squeeze().shape == shapes[ours].squeeze().shape
    assert not theirs


@pytest.mark.parametrize("adm", [False, True])
def test_adm_without_a_context(tmp_path, adm):
    """Both conventions of diffusers' unconditional network: Google's, and that which it assumes itself."""
    unet = random_unet(replace(SMALL, adm=adm))
    save_diffusers(tmp_path / "net", unet)
    x = noise(2, 3, 16, 16)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "net")
    assert relative(unet(x, 77), theirs(x, 77).sample) < TOLERANCE
    assert read(tmp_path / "net").config == unet.config


def test_folders_go_both_ways(tmp_path, unet):
    x = noise(1, 3, 16, 16)
    save_diffusers(tmp_path / "ours", unet)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    assert relative(unet(x, 10), theirs(x, 10).sample) < TOLERANCE
    for safe in (False, True):
        theirs.save_pretrained(tmp_path / f"theirs{safe}", safe_serialization=safe)
        assert torch.equal(read(tmp_path / f"theirs{safe}", diffusion=Diffusion())(x, 10), unet(x, 10))


def test_old_attention_names_in_safetensors(tmp_path, unet):
    safetensors = pytest.importorskip("safetensors.torch")
    save_diffusers(tmp_path / "old", unet)
    weights = torch.load(tmp_path / "old" / "diffusion_pytorch_model.bin", weights_only=True)
    for old, new in OLD_ATTENTION.items():
        weights = {key.replace(new, old): value for key, value in weights.items()}
    (tmp_path / "old" / "diffusion_pytorch_model.bin").unlink()
    safetensors.save_file(weights, tmp_path / "old" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert any(".query." in key for key in weights)
    assert torch.equal(read(tmp_path / "old")(noise(1, 3, 16, 16), 3), unet(noise(1, 3, 16, 16), 3))


def test_pipelines_load_our_folders(tmp_path, unet):
    unet.diffusion = Diffusion(beta_end=0.015, variance="fixed_small")
    save_diffusers(tmp_path / "net", unet)
    for kind in (diffusers.DDPMPipeline, diffusers.DDIMPipeline):
        pipeline = kind.from_pretrained(tmp_path / "net")
        assert pipeline.scheduler.config.beta_end == 0.015
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
        assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
    unet.diffusion = Diffusion()


def settings() -> dict:
    return {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


@pytest.mark.parametrize("spacing, name", [("uniform", "leading"), ("trailing", "trailing"), ("linspace", "linspace")])
@pytest.mark.parametrize("steps", [10, 50])
def test_timesteps(spacing, name, steps):
    scheduler = diffusers.DDIMScheduler(**settings(), timestep_spacing=name)
    scheduler.set_timesteps(steps)
    assert Diffusion().timesteps(steps, spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_step_for_step(unet, clip):
    scheduler = diffusers.DDIMScheduler(**settings(), clip_sample=clip)
    scheduler.set_timesteps(20)
    x = noise(2, 3, 16, 16, seed=1)
    for step in denoise(unet, x_T=x, steps=20, clip_x0=clip):
        x = scheduler.step(unet(x, step.t), step.t, x).prev_sample
        assert relative(step.x, x) < 1e-4
        x = step.x  # differences do not add up


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_ddpm_step_for_step(unet, variance, steps):
    """Their step draws its own noise: both draw from one generator, x_T first, then z at each step but the last."""
    scheduler = diffusers.DDPMScheduler(**settings(), variance_type=variance, clip_sample=True)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, 16, 16, generator=generator)
    for step in denoise(unet, [3], sampler="ddpm", variance=variance, steps=steps):
        x = scheduler.step(unet(x, step.t), step.t, x, generator=generator).prev_sample
        assert relative(step.x, x) < 1e-4
        x = step.x
        if step.i == 20:
            break


def test_dpmpp_2m_step_for_step(unet):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **settings(), timestep_spacing="trailing", algorithm_type="dpmsolver++", solver_order=2,
        final_sigmas_type="zero", lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == Diffusion().timesteps(20, "trailing")
    x = noise(2, 3, 16, 16, seed=1)
    for step in denoise(unet, x_T=x, sampler="dpm++2m", steps=20, spacing="trailing"):
        x = scheduler.step(unet(x, step.t), step.t, x).prev_sample
        assert relative(step.x, x) < 1e-4
        x = step.x
