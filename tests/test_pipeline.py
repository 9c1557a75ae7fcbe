"""DeepCache in diffusers' own pipelines: whatever they do, each pass is the one that a plain loop would make."""

import pytest
import torch
from conftest import noise, relative
from miniature import SCHEDULE, SIDE, pipeline, unet2d

from minicache.pipeline import deepcache
from minicache.plan import FORECASTS

diffusers = pytest.importorskip("diffusers")
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-9  # in float64, where rounding hides nothing; seen: below 1e-12
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "LCMScheduler", "TCDScheduler",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return pipeline(tmp_path_factory.mktemp("pipe")).to(torch.float64)


@pytest.fixture(autouse=True)
def own_parts(pipe):
    """Each test gets back the pipeline that the first one had."""
    unet, scheduler = pipe.unet, pipe.scheduler
    yield
    assert pipe.unet is unet
    pipe.scheduler = scheduler


def latents(seed=0):
    return noise(1, 4, SIDE, SIDE, seed=seed).double()


def draw(pipe, seed=0, **settings):
    """Latents of one or more pictures."""
    settings = {"prompt": "cat dog", "num_inference_steps": 6, **settings}
    return pipe(generator=torch.Generator().manual_seed(seed), output_type="latent", **settings).images


def by_hand(pipe, interval, branch, forecast="hold", seed=0, prompt="cat dog", steps=6, scale=7.5, rescale=0.0, B=1,
            height=2 * SIDE, width=2 * SIDE):  # fmt: skip
    """The same latents by a loop written out here; the two passes of the network are tested elsewhere."""
    with deepcache(pipe):
        unet = pipe.unet.ours
    scheduler, generator, kept = pipe.scheduler, torch.Generator().manual_seed(seed), []
    context = torch.cat(pipe.encode_prompt([prompt] * B, "cpu", 1, True)[::-1])
    scheduler.set_timesteps(steps)
    x = (
        torch.randn(B, 4, height // 2, width // 2, generator=generator, dtype=torch.float64)
        * scheduler.init_noise_sigma
    )
    for i, t in enumerate(scheduler.timesteps):
        x2 = scheduler.scale_model_input(torch.cat([x, x]), t)
        if i % interval == 0:
            eps, cached_U = unet.forward_full(x2, t, branch, context)
            kept.append((i, cached_U))
        else:
            k, newer = kept[-1]
            j, older = kept[-2] if len(kept) > 1 else (-1, newer)
            eps = unet.forward_partial(x2, t, newer + FORECASTS[forecast](i, j, k) * (newer - older), branch, context)
        away, towards = eps.chunk(2)
        eps = away + scale * (towards - away)
        eps = rescale_noise_cfg(eps, towards, guidance_rescale=rescale) if rescale else eps
        noisy = pipe.prepare_extra_step_kwargs(generator, 0.0)
        x = scheduler.step(eps, t, x, **noisy, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(pipe, name):
    try:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    except ImportError as error:
        pytest.skip(str(error).strip())
    plain = draw(pipe)
    with deepcache(pipe, interval=1):
        assert relative(draw(pipe), plain) < TOLERANCE
    with deepcache(pipe, interval=3, branch=2, forecast="linear"):
        cached = draw(pipe)
    assert relative(cached, by_hand(pipe, 3, 2, "linear")) < TOLERANCE
    assert relative(cached, plain) > 1e-3


def test_pndm_with_its_runge_kutta_start(pipe):
    pipe.scheduler = diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=False)
    with deepcache(pipe, interval=2):
        cached = draw(pipe)
    assert relative(cached, by_hand(pipe, 2, 1)) < TOLERANCE


@pytest.mark.parametrize("settings", [{"interval": 2, "branch": 1}, {"interval": 4, "branch": 5}])
def test_branch_interval_and_rescaled_guidance(pipe, settings):
    with deepcache(pipe, **settings):
        cached = draw(pipe, guidance_rescale=0.7)
    assert relative(cached, by_hand(pipe, **settings, rescale=0.7)) < TOLERANCE


def test_nothing_leaks_from_one_picture_to_the_next(pipe):
    """With one pass in 100 in full, all but the first step of each call depend on what is kept."""
    with deepcache(pipe, interval=100):
        pictures = [draw(pipe, seed) for seed in (0, 1)]
        other_words = draw(pipe, 0, prompt="a")
        more = draw(pipe, 2, prompt=["cat dog"] * 2)
        wide = draw(pipe, 3, height=2 * SIDE, width=4 * SIDE)
        again = draw(pipe, 0)
    for seed, cached in enumerate(pictures):
        assert relative(cached, by_hand(pipe, 100, 1, seed=seed)) < TOLERANCE
    assert torch.equal(again, pictures[0])
    assert relative(other_words, by_hand(pipe, 100, 1, prompt="a")) < TOLERANCE
    assert relative(more, by_hand(pipe, 100, 1, seed=2, B=2)) < TOLERANCE
    assert relative(wide, by_hand(pipe, 100, 1, seed=3, width=4 * SIDE)) < TOLERANCE


def test_nothing_leaks_from_a_call_that_was_interrupted(pipe):
    """The next picture begins at a lower t than the last one ended at, and with the same words."""

    def stop(pipe, i, t, tensors):
        pipe._interrupt = True
        return tensors

    img2img = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    settings = {"image": latents(), "strength": 0.5, "num_inference_steps": 8}
    with deepcache(img2img, interval=100):
        alone = draw(img2img, **settings)
    with deepcache(img2img, interval=100):
        draw(img2img, 1, **{**settings, "strength": 1.0}, callback_on_step_end=stop)
        assert torch.equal(draw(img2img, **settings), alone)


def test_img2img_begins_in_the_middle(pipe):
    img2img = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    settings = {"image": latents(), "strength": 0.6, "num_inference_steps": 10}
    plain, calls = draw(img2img, **settings), []
    with deepcache(img2img, interval=1):
        assert relative(draw(img2img, **settings), plain) < TOLERANCE
    with deepcache(img2img, interval=3):
        full = img2img.unet.ours.forward_full
        img2img.unet.ours.forward_full = lambda x, t, **at: calls.append(int(t)) or full(x, t, **at)
        draw(img2img, **settings)
        begun = img2img.scheduler.timesteps[-len(calls) * 3 :]
    assert calls and calls[0] < 700 and set(calls) <= set(begun.tolist())
    assert img2img.unet is pipe.unet


def in_two_calls(pipe, seed=0, steps=6, scale=7.5, timesteps=True):
    """Guidance with one call for each half, as some pipelines do to save memory."""
    towards, away = pipe.encode_prompt("cat dog", "cpu", 1, True)
    x = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if timesteps:
        pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        eps = [pipe.unet(x, t, encoder_hidden_states=context).sample for context in (away, towards)]
        x = pipe.scheduler.step(eps[0] + scale * (eps[1] - eps[0]), t, x).prev_sample
    return x


@pytest.mark.parametrize("forecast", FORECASTS)
def test_guidance_in_two_calls(pipe, forecast):
    pipe.scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    with deepcache(pipe, interval=2, forecast=forecast):
        together, apart = draw(pipe), in_two_calls(pipe)
        assert not pipe.unet.trajectories  # their contexts are gone
    assert relative(apart, together) < TOLERANCE
    assert relative(apart, by_hand(pipe, 2, 1, forecast)) < TOLERANCE


def test_loops_that_keep_their_words(pipe):
    """A context made once for many pictures, which begin where t rises, with new timesteps, or in another shape."""
    pipe.scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    context = pipe.encode_prompt("cat dog", "cpu", 1, False)[0]

    def loop(seed, stop=None):
        x = latents(seed)
        for t in pipe.scheduler.timesteps[:stop]:
            x = pipe.scheduler.step(pipe.unet(x, t, context).sample, t, x).prev_sample
        return x

    with deepcache(pipe, interval=100):
        full, passes = pipe.unet.ours.forward_full, []
        pipe.unet.ours.forward_full = lambda *args, **at: passes.append(1) or full(*args, **at)
        pipe.scheduler.set_timesteps(4)
        first, second, again = loop(0), loop(1), loop(1)
        assert torch.equal(second, again) and not torch.equal(first, second) and len(passes) == 3
        loop(0, stop=1)  # given up at t = 751; the next one begins below it
        pipe.scheduler.set_timesteps(2)
        below = loop(1)
        assert len(passes) == 5
        pipe.unet(torch.cat([latents(), latents()], 3), 0, context)
        assert len(passes) == 6
    with deepcache(pipe, interval=100):
        assert torch.equal(loop(1), below)


def test_words_that_change_on_the_way_begin_anew(pipe):
    """A callback ends guidance half way: the batch is halved, and so must the cache be."""
    pipe.scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)

    def unguided(pipe, i, t, tensors):
        if i == 2:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    settings = {"callback_on_step_end": unguided, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain = draw(pipe, **settings)
    with deepcache(pipe, interval=1):
        assert relative(draw(pipe, **settings), plain) < TOLERANCE
    with deepcache(pipe, interval=100):
        assert draw(pipe, **settings).isfinite().all()


def test_the_weights_are_shared_and_the_network_comes_back(pipe):
    theirs = pipe.unet
    with pytest.raises(RuntimeError, match="stop"):
        with deepcache(pipe, interval=2):
            addresses = {parameter.data_ptr() for parameter in theirs.parameters()}
            assert {parameter.data_ptr() for parameter in pipe.unet.ours.parameters()} == addresses
            assert pipe.unet.config is theirs.config
            assert (pipe.unet.dtype, pipe.unet.device) == (theirs.dtype, theirs.device)
            assert isinstance(pipe.unet(latents(), 3, noise(1, 5, 64), return_dict=False), tuple)
            raise RuntimeError("stop")
    assert pipe.unet is theirs and pipe.config["unet"] == ("diffusers", "UNet2DConditionModel")


def test_half_precision(pipe):
    try:
        pipe.to(torch.bfloat16)
        with deepcache(pipe, interval=2):
            assert draw(pipe).dtype == torch.bfloat16
    finally:
        pipe.to(torch.float64)


@pytest.mark.parametrize("settings, words", [
    ({"interval": 0}, "interval=0"),
    ({"branch": 7}, "branch=7 is not in 1..6"),
    ({"forecast": "cubic"}, "forecast='cubic' is none of hold, linear"),
])  # fmt: skip
def test_wrong_settings(pipe, settings, words):
    with pytest.raises(ValueError, match=words):
        with deepcache(pipe, **settings):
            pass


PATCHED = "it is changed otherwise than in its weights"


def with_freeu(unet):
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def with_adapter(unet):
    unet.conv_in.register_parameter("lora", torch.nn.Parameter(torch.zeros(1)))


def with_other_attention(unet):
    unet.set_attn_processor(type("Own", (diffusers.models.attention_processor.AttnProcessor2_0,), {})())


@pytest.mark.parametrize("change, settings, words", [
    (with_freeu, {}, "FreeU is enabled"),
    (with_adapter, {}, r"unexpected tensor conv_in\.lora: fuse adapters"),
    (with_other_attention, {}, "its attention is not the plain one"),
    (lambda unet: setattr(unet, "_hf_hook", None), {}, "offloading moves its weights"),
    (lambda unet: unet.mid_block.register_forward_hook(lambda *them: 2 * them[2]), {}, PATCHED),
    (lambda unet: setattr(unet.conv_in, "padding_mode", "circular"), {}, PATCHED),  # a trick for seamless textures
    (lambda unet: setattr(unet.conv_norm_out, "eps", 0.1), {}, PATCHED),
    (lambda unet: setattr(unet.mid_block, "forward", lambda h, *_, **__: 0 * h), {}, PATCHED),
    (lambda unet: None, {"time_cond_proj_dim": 8}, "pipe.unet: time_cond_proj_dim=8 is not what this network does"),
    (lambda unet: None, {"attention_head_dim": (2, 4)}, r"attention_head_dim=\[2, 4\]"),
])  # fmt: skip
def test_networks_that_are_not_ours_are_refused(pipe, change, settings, words):
    plain, pipe.unet = pipe.unet, unet2d(**settings)
    change(pipe.unet)
    try:
        with pytest.raises(ValueError, match=words):
            with deepcache(pipe):
                pass
    finally:
        pipe.unet = plain


def test_what_changes_the_network_from_outside_is_refused(pipe):
    with deepcache(pipe):
        with pytest.raises(ValueError, match="cannot take cross_attention_kwargs"):
            draw(pipe, cross_attention_kwargs={"other": 1})
        draw(pipe, cross_attention_kwargs={})  # which says nothing
        with pytest.raises(ValueError, match="not a CachedUNet"):
            with deepcache(pipe):
                pass
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="not StableDiffusionInpaintPipeline"):
        with deepcache(inpaint):
            pass
