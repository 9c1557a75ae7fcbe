"""DeepCache (arXiv 2312.00858) with onnxruntime, NumPy and Pillow alone: 8 pictures, into example.png."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

here = Path(__file__).parent
network = json.loads((here / "network.json").read_text())
full, partial = (onnxruntime.InferenceSession(here / network[name]) for name in ("full", "partial"))
T = len(network["alphas_bar"])  # timesteps
alphas_bar = np.array([*network["alphas_bar"], 1.0])  # the last, at index -1, is where no noise is left


def ddim(x: np.ndarray, steps: int, interval: int) -> np.ndarray:
    """Noise [B, C, H, W] -> images near [-1, 1]: one step in `interval` in full, the others around its cached_U."""
    ts = [i * T // steps for i in range(steps)][::-1]
    for i, (t, t_next) in enumerate(zip(ts, [*ts[1:], -1])):
        inputs = {"x": x, "t": np.array([t])}
        if i % interval == 0:
            eps, cached_U = full.run(None, inputs)
        else:
            (eps,) = partial.run(None, {**inputs, "cached_U": cached_U})
        a, a_next = alphas_bar[t], alphas_bar[t_next]
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x = (np.sqrt(a_next) * x0 + np.sqrt(1 - a_next) * eps).astype(np.float32)
    return x


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int, nargs="?", default=min(100, T))
    parser.add_argument("interval", type=int, nargs="?", default=5, help="one step in so many runs in full")
    args = parser.parse_args()
    if not (2 <= args.steps <= T and args.interval >= 1):  # a single step would begin at t = 0
        parser.error(f"steps must be in 2..{T}, and interval at least 1")
    noise = np.random.RandomState(0).standard_normal((8, *network["shape"])).astype(np.float32)
    images = ((ddim(noise, args.steps, args.interval) + 1) * 127.5).clip(0, 255).round().astype(np.uint8)
    Image.fromarray(np.hstack(images.transpose(0, 2, 3, 1)).squeeze()).save("example.png")
    print("example.png")
