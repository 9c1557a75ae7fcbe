"""Device, dtype, memory format and compilation: what auto chooses, and what compiled networks must not do."""

import copy
import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import noise, random_unet, relative
from torch.overrides import TorchFunctionMode

from minicache import UNet, UNetConfig, denoise, load, placement, sample, uniform
from minicache.metrics import moments
from minicache.placement import choose_device, choose_placement, place

TINIEST = UNetConfig(image_size=2, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())


def auto_on(monkeypatch, **capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    return choose_placement("cpu")


def compiled(unet: UNet) -> UNet:
    return place(unet, choose_placement("cpu", "float32", "contiguous", compile=True))


def test_auto_goes_by_the_hardware(monkeypatch):
    plain = auto_on(monkeypatch, avx2=True, avx512_bf16=False)
    assert (plain.dtype, plain.memory_format, plain.compile) == (torch.float32, torch.channels_last, False)
    for name in ("avx512_bf16", "amx_bf16"):
        able = auto_on(monkeypatch, **{name: True})
        assert (able.dtype, able.memory_format, able.compile) == (torch.bfloat16, torch.channels_last, False)
        assert name in able.why and "channels_last" in str(able) and "cpu" in str(able)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_placement("cpu").dtype == torch.float32  # older releases of torch


@pytest.mark.parametrize(("cuda", "mps", "name"), [(True, True, "cuda:1"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(shape))  # every device seems to work
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device(name)


def test_what_is_asked_for_is_what_one_gets():
    asked = choose_placement("cpu", "bfloat16", "contiguous", True)
    assert (asked.dtype, asked.memory_format, asked.compile, asked.why) == (
        torch.bfloat16, torch.contiguous_format, True, "")  # fmt: skip
    assert choose_placement("cpu", torch.float32, torch.channels_last).memory_format == torch.channels_last
    for name in ("hpu", "privateuseone"):  # which torch knows by name, and imports a package for
        with pytest.raises(ValueError, match=f"device {name} cannot be used here: No module named"):
            choose_device(name)
    for wrong, words in (
        (("float64",), "dtype='float64' is none of auto, float32"),
        (("auto", "nchw"), "memory_format='nchw'"),
        (("auto", "auto", "maybe"), "compile='maybe'"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_placement("cpu", *wrong)


def test_low_precision_is_near_and_the_state_stays_float32():
    low = load("tiny_cifar10", dtype=torch.bfloat16)
    assert low.D[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    settings = dict(seeds=[0, 1], plan=uniform(10, 3, 2, "linear"))
    steps = list(denoise(low, **settings))
    assert steps[-1].x.dtype == steps[-1].eps.dtype == torch.float32 and steps[-1].cached_U.dtype == torch.bfloat16
    assert 0 < relative(steps[-1].x, sample(load("tiny_cifar10"), **settings)) < 0.02


def test_float64_is_for_the_cpu_alone():
    """mps has no float64: what is to be double has to be on the CPU before."""

    class AsOnMps(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.double and not hasattr(args[0], "on_cpu"):
                raise TypeError("mps has no float64")
            result = function(*args, **kwargs or {})
            if function is torch.Tensor.cpu:
                result.on_cpu = True
            return result

    with AsOnMps():
        assert moments([noise(3, 4)]).mean.dtype == torch.float64


def test_one_graph_for_full_and_one_for_partial_whatever_the_plan(graphs):
    """torch.compile traces each once: the timestep, the alphas and the plan are no part of a graph. (t as a float has
    graphs of its own: a sampler's timesteps are all whole, or all floats.)"""
    unet, expected = compiled(random_unet(TINIEST)), random_unet(TINIEST)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for plan, settings in (
            (uniform(6, 3, 2), {}),
            (uniform(9, 2, 2, "linear"), {"sampler": "plms", "spacing": "linspace"}),
        ):
            drawn = sample(unet, [0, 1], plan=plan, **settings)
            assert relative(drawn, sample(expected, [0, 1], plan=plan, **settings)) < 1e-5
    eps = unet(noise(2, 3, 2, 2), 500)
    assert len(graphs) == 3  # full and partial at branch 2; and full at branch 1, for unet(x, t)
    assert relative(eps, expected(noise(2, 3, 2, 2), 500)) < 1e-5


def test_copies_of_a_compiled_network_run_their_own_weights(graphs):
    unet, expected, x = compiled(random_unet(TINIEST)), random_unet(TINIEST), noise(2, 3, 2, 2)
    before = unet(x, 500)
    for another in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(another(x, 500), before)
        for changed in (another, expected):
            changed.load_state_dict({name: 1.1 * tensor for name, tensor in random_unet(TINIEST).state_dict().items()})
        assert relative(another(x, 500), expected(x, 500)) < 1e-5
        assert torch.equal(unet(x, 500), before)


def test_hooks_of_a_compiled_network_fire(graphs):
    unet, x, fired = compiled(random_unet(TINIEST)), noise(2, 3, 2, 2), []
    for late in (False, True):  # before the first pass; and on a copy, whose graph is there already
        unet = copy.deepcopy(unet) if late else unet
        hooks = [module.register_forward_hook(lambda *_: fired.append(1)) for module in (unet, unet.M[0])]
        unet(x, 500)
        assert len(fired) == 2
        for hook in hooks:
            hook.remove()
        unet(x, 500)
        assert len(fired) == 2
        fired.clear()


def test_every_variant_is_compiled(graphs):
    """dynamo has a limit, eight graphs unless told otherwise, and runs further variants eagerly: not here."""
    unet, expected = compiled(random_unet(TINIEST)), random_unet(TINIEST)
    with torch._dynamo.config.patch(cache_size_limit=1):
        for B in (1, 2, 3, 1, 2, 3):
            x = noise(B, 3, 2, 2)
            assert relative(unet(x, 500), expected(x, 500)) < 1e-5
    assert len(graphs) == 3


def test_a_compiled_network_takes_a_context_and_refuses_what_the_network_refuses(graphs):
    torch.manual_seed(0)
    expected = UNet(replace(TINIEST, context_dim=8, num_tokens=5)).eval()
    for parameter in expected.parameters():
        parameter.normal_(std=0.1)
    unet, x = compiled(copy.deepcopy(expected)), noise(2, 3, 2, 2)
    for context in (torch.tensor([[1, 2], [3, 0]]), noise(2, 3, 8)):
        eps, cached_U = unet.forward_full(x, 500, 2, context)
        assert relative(eps, expected(x, 500, context)) < 1e-5
        partial = expected.forward_partial(x, 400, cached_U, 2, context)
        assert relative(unet.forward_partial(x, 400, cached_U, 2, context), partial) < 1e-5
    for wrong, words in (
        (dict(branch=9), r"branch=9 is not in 1\.\.2"),
        (dict(t=1000), "t=1000 is not a timestep"),
        (dict(context=noise(2, 3, 7)), "context is"),
    ):
        with pytest.raises(ValueError, match=words):
            unet.forward_full(**{"x": x, "t": 500, "branch": 1, **wrong})


def test_outputs_of_cuda_graphs_are_cloned(monkeypatch):
    """A CUDA graph writes its outputs to the same memory at every replay. Here a stand-in does so, without a GPU."""

    def replayed(forward, **kwargs):
        assert kwargs["mode"] == "reduce-overhead"
        memory = {}

        def replay(*args):
            outputs = forward(*args)
            for k, output in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
                memory.setdefault(k, torch.empty_like(output)).copy_(output)
            return tuple(memory.values()) if isinstance(outputs, tuple) else memory[0]

        return replay

    original = placement.compiled.__wrapped__
    monkeypatch.setattr(torch, "compile", replayed)
    monkeypatch.setattr(placement, "compiled", cache(lambda forward, cuda_graphs: original(forward, cuda_graphs=True)))
    settings = dict(seeds=[0, 1], plan=uniform(12, 3, 2, "linear"), sampler="plms")
    assert torch.equal(sample(compiled(random_unet()), **settings), sample(random_unet(), **settings))
