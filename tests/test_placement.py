"""Device, dtype, memory format and compilation: what auto chooses, and what compiled networks must not do."""

import pytest
import torch
from conftest import noise, random_unet, relative
from torch.overrides import TorchFunctionMode

from minicache import denoise, load, sample, uniform
from minicache.metrics import unet_features
from minicache.placement import choose_device, choose_placement, compiled, place


def auto_on(monkeypatch, **capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    return choose_placement("cpu")


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


def test_what_is_asked_for_is_what_one_gets(monkeypatch):
    placement = choose_placement("cpu", "bfloat16", "contiguous", True)
    assert (placement.dtype, placement.memory_format, placement.compile, placement.why) == (
        torch.bfloat16, torch.contiguous_format, True, "")  # fmt: skip
    assert choose_placement("cpu", torch.float32, torch.channels_last).memory_format == torch.channels_last
    for wrong, words in (
        (("float64",), "dtype='float64' is none of auto, float32"),
        (("auto", "nchw"), "memory_format='nchw'"),
        (("auto", "auto", "maybe"), "compile='maybe'"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_placement("cpu", *wrong)


def test_low_precision_is_near_and_the_state_stays_float32(unet):
    low = load("tiny", dtype=torch.bfloat16)
    assert low.D[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    settings = dict(seeds=[0, 1], plan=uniform(10, 3, 2, "linear"))
    steps = list(denoise(low, **settings))
    assert steps[-1].x.dtype == steps[-1].eps.dtype == torch.float32 and steps[-1].cached_U.dtype == torch.bfloat16
    assert 0 < relative(steps[-1].x, sample(load("tiny"), **settings)) < 0.02


def test_float64_is_for_the_cpu_alone(unet):
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
        assert unet_features(unet, noise(2, 3, 16, 16)).dtype == torch.float64


def test_one_graph_for_full_and_one_for_partial_whatever_the_plan(monkeypatch):
    """torch.compile traces each once: the timestep, the alphas and the plan are no part of a graph."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward, dynamic, mode: original(forward, backend=count, dynamic=dynamic)
    )
    torch._dynamo.reset()
    unet = place(random_unet(), choose_placement("cpu", "float32", compile=True))
    expected = random_unet()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for plan, settings in ((uniform(6, 3, 2), {}), (uniform(9, 2, 2, "linear"), {"sampler": "plms"})):
            drawn = sample(unet, [0, 1], plan=plan, **settings)
            assert relative(drawn, sample(expected, [0, 1], plan=plan, **settings)) < 1e-5
    eps = unet(noise(2, 3, 16, 16), 500)
    assert len(graphs) == 3  # full and partial at branch 2; and full at branch 1, for unet(x, t)
    assert relative(eps, expected(noise(2, 3, 16, 16), 500)) < 1e-5


def test_outputs_of_cuda_graphs_are_cloned(monkeypatch):
    """A CUDA graph writes its outputs to the same memory at every replay. Here a stand-in does so, without a GPU."""

    def replayed(forward, **kwargs):
        assert kwargs["mode"] == "reduce-overhead"
        memory = {}

        def replay(x, t, *args):
            outputs = forward(x, t, *args)
            for k, output in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
                memory.setdefault(k, torch.empty_like(output)).copy_(output)
            return tuple(memory.values()) if isinstance(outputs, tuple) else memory[0]

        return replay

    monkeypatch.setattr(torch, "compile", replayed)
    unet, expected = random_unet(), random_unet()
    unet.forward_full = compiled(unet.forward_full, cuda_graphs=True)
    unet.forward_partial = compiled(unet.forward_partial, cuda_graphs=True)
    settings = dict(seeds=[0, 1], plan=uniform(12, 3, 2, "linear"), sampler="plms")
    assert torch.equal(sample(unet, **settings), sample(expected, **settings))
