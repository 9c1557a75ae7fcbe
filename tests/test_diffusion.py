import numpy as np
import pytest
import torch
from conftest import noise

from minicache import Diffusion
from minicache.samplers import predict_x0


def test_alphas_bar_are_those_of_ho_et_al():
    abar = Diffusion().alphas_bar
    assert abar.dtype == torch.float64 and len(abar) == 1000
    for t, published in ((0, 0.9999), (1, 0.9997800921), (499, 0.0785872429), (999, 4.03582977e-5)):
        assert abar[t].item() == pytest.approx(published, rel=1e-8)


def test_scaled_linear_betas_are_those_of_stable_diffusion():
    """The roots of the betas are linear in t, not the betas."""
    diffusion = Diffusion(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert np.allclose(diffusion.alphas_bar, np.cumprod(1 - betas), rtol=1e-12)
    assert diffusion.alpha_bar(0) == pytest.approx(1 - 0.00085)


def test_forward_process_and_back():
    diffusion, t = Diffusion(), torch.tensor([0, 499, 999])
    x0, eps = noise(3, 3, 4, 4), noise(3, 3, 4, 4, seed=1)
    x_t = diffusion.q_sample(x0, t, eps)
    assert torch.allclose(x_t[1], 0.0785872429**0.5 * x0[1] + (1 - 0.0785872429) ** 0.5 * eps[1], atol=1e-6)
    back = [predict_x0(x_t[i], eps[i], diffusion.alpha_bar(t[i].item())) for i in range(3)]
    assert torch.allclose(torch.stack(back), x0, atol=1e-4)
    assert x_t.dtype == torch.float32


def test_loss_is_the_mean_square_of_each_image():
    diffusion, t = Diffusion(), torch.tensor([10, 900])
    x0, eps = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    assert torch.equal(diffusion.loss(lambda x, t: eps, x0, t, eps), torch.zeros(2))
    assert torch.allclose(diffusion.loss(lambda x, t: eps + torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1), x0, t, eps),
                          torch.tensor([1.0, 9.0]), atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("spacing", ["trailing", "logsnr", "rho7"])
def test_noised_images_are_not_noisier_than_the_last_timestep(spacing):
    assert Diffusion().timesteps(5, spacing, start=1000)[0] == 999
    with pytest.raises(ValueError, match=r"does not begin at t = 1000,"):
        Diffusion().timesteps(5, spacing, start=1001)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_timesteps": 0}, "num_timesteps=0"),
        ({"num_timesteps": 4000}, "num_timesteps=4000"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"beta_start": 0.03}, "beta_start"),
        ({"beta_end": np.float64(0.02)}, r"need floats .* not 0\.0001 and np\.float64"),
        ({"beta_start": 1e-20}, "beta_start"),  # 1 - beta is 1
        ({"beta_end": 0.9}, "beta_end=0.9 leaves nothing"),  # of all that float64 can divide by
        ({"variance": "learned"}, "variance='learned'"),
    ],
)
def test_wrong_diffusions(change, words):
    with pytest.raises(ValueError, match=words):
        Diffusion(**change)
