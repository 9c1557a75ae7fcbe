"""Plant one small error at a time in a copy of the package, and see whether a test fails. A command, not a test:

    python tests/mutants.py            all mutants, about ten minutes on one core
    python tests/mutants.py unet fit   those of these files

Exit 1 if a mutant lives: then a test is missing. A mutant whose text is gone is an error: it must be written anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("minicache", "tests", "weights", "pyproject.toml", "README.md", "sample.py", "train_tiny.py")
LIMIT = 600  # seconds for the tests of a mutant, which may make them wait for ever

# Of each file of the package: a text, what it becomes wherever it stands, and the test files one of which must fail.
MUTANTS = {
    "unet": [
        ("steps = half if adm else half - 1", "steps = half", "golden"),
        ('"b n (heads c) -> b heads n c"', '"b n (c heads) -> b heads n c"', "golden"),
        ("nn.init.zeros_(self.proj_out.weight)", "pass", "unet"),
        ("nn.init.zeros_(self.conv_out.weight)", "pass", "unet"),
        ("value * F.gelu(gate)", "value * F.silu(gate)", "golden"),
        ("F.pad(h, (0, 1, 0, 1))", "F.pad(h, (1, 0, 1, 0))", "golden"),
        ("torch.cat([h, skip], dim=1)", "torch.cat([skip, h], dim=1)", "golden"),
        ("return 1e-5 if self.adm else 1e-6", "return 1e-6", "golden"),
        ("padding_idx=config.null_token", "padding_idx=None", "unet"),
        ("torch.full((B, 1), self.config.null_token", "torch.full((B, 1), 0", "unet"),
        ("self.pooled(context.sum(1))", "self.pooled(context.mean(1))", "unet"),
        ("level = (branch - 1) // (", "level = branch // (", "laws"),
    ],
    "diffusion": [
        ("power = 2 if", "power = 1 if", "diffusion"),
        ("return signal * x0 + noise * eps", "return signal * x0 - noise * eps", "diffusion"),
        ("t)).square().flatten(1)", "t)).abs().flatten(1)", "diffusion"),
        ("low + part * (high - low)", "low + part**2 * (high - low)", "samplers"),
        ("[i * T // S for i in range(S)]", "[i * (T // S) for i in range(S)]", "samplers"),
        ("(0.8 * T) ** 0.5", "T**0.5", "samplers"),
        ("i * (T // S) + 1", "i * (T // S) + 2", "samplers"),
        ("np.geomspace(*ends, S)", "np.linspace(*ends, S)", "samplers"),
    ],
    "plan": [
        ("(i - k) / (k - j)", "(i - k + 1) / (k - j)", "laws"),
        ("!= sorted(set(refresh))", "!= sorted(refresh)", "plan"),
        ("+ center + 1e-9)", "+ center)", "plan"),
        ("1 + alpha) if alpha", "alpha) if alpha", "laws"),
        ("self.newer if self.two else None, cached_U", "self.newer, cached_U", "doors"),
    ],
    "samplers": [
        ("sqrt(1 - a_next - sigma**2)", "sqrt(1 - a_next)", "samplers"),
        ('beta if variance == "fixed_large" else', 'beta if variance == "fixed_small" else', "samplers"),
        ("-16 / 12, 5 / 12", "-15 / 12, 4 / 12", "samplers"),
        ("(now.eps + past[0].eps) / 2, past[0]", "now.eps, past[0]", "rivals"),
        ("step_length(past[0].a, now.a) / step_length(now.a, a_next)", "1", "samplers"),
        ("quadratic: float = 0.5", "quadratic: float = 1.0", "rivals"),
        ("else (now.x0 + past[0].x0) / 2", "else past[0].x0", "rivals"),
        ('h if of == "x0" else -h', "h", "samplers"),
        ("predict_x0(now.x, eps, now.a, now.clip)", "predict_x0(now.x, eps, now.a)", "samplers"),
        ("Sampler(plms_step, history=2", "Sampler(plms_step, history=3", "samplers"),
    ],
    "sampling": [
        ('alpha_bar(0) if s.spacing == "offset" else 1.0', "1.0", "samplers"),
        ("eps = away + s.guidance", "eps = towards + s.guidance", "doors"),
        ("[now, *past][: sampler.history]", "[now, *past]", "samplers"),
        ("cached_U = cache.stand_in(i)", "cached_U = cache.newer", "laws"),
        ("a_next != a or (i == 1 and sampler.twice)", "True", "samplers"),
        ("torch.Generator()", "torch.default_generator", "laws"),
    ],
    "solver": [
        ("past = [now, *past][: entry.history]", "past = [now]", "solver"),
        ("any(a <= b for a, b", "any(a < b for a, b", "solver"),
        ("zip(self.weights[now.i], points)", "zip(self.weights[-1], points)", "solver"),
    ],
    "fit": [
        ("(1 + 2 * u) * (1 - u) ** 2", "(1 - u) ** 2", "fit"),
        ("weights[0] += 1", "weights[0] += 0.9", "fit"),
        ("self.newer = self.newer, cached_U", "self.newer = self.older, cached_U", "fit"),
    ],
    "recipe": [
        ("if self.fingerprint not in (None, fingerprint)", "if False", "plan"),
        (" and recipe.start == start", "", "plan"),
        ("costs[min((c for c in costs if c <= 1.25 * budget)", "costs[min((c for c in costs)", "sample"),
    ],
    "checkpoints": [
        ("for name in needed if name not in state", "for name in () if name not in state", "strictness"),
        ("if not torch.isfinite(", "if False and (", "strictness"),
        ("hasher.update(tensor", "(tensor", "checkpoints formats"),
        ("tensor.half() if half else", "tensor if half else", "checkpoints"),
    ],
    "tensors": [
        ("allow_pickle=False", "allow_pickle=True", "untrusted"),
        ("weights_only=True", "weights_only=False", "untrusted"),
    ],
    "shards": [
        ("np.load(self.files(shard)[0]", "np.load(self.files(shard)[0], allow_pickle=True", "untrusted"),
        ("images.shards[rank::world]", "images.shards[rank:]", "shards"),
    ],
    "tools/evaluate": [
        ("allow_pickle=False", "allow_pickle=True", "untrusted"),
    ],
    "files": [
        ("os.replace(temporary, path)",
         "(shutil.copytree if temporary.is_dir() else shutil.copy)(temporary, path)", "images_and_data"),
        ("if checksum and digest(part, algorithm) != expected", "if False", "files"),
    ],
    "cost": [
        ("PassCost(weighted // 2", "PassCost(weighted", "cost"),
        ("(1 + plan.forecasts)", "1", "cost"),
        ("not made.expired() and", "", "cost"),
    ],
    "metrics": [
        ("torch.log10(4 / (", "torch.log10(1 / (", "metrics"),
        ("/ (count - 1))", "/ count)", "metrics"),
        ("- 2 * cross", "- cross", "metrics"),
        ("features = features / features.norm(dim=2, keepdim=True)", "pass", "metrics"),
    ],
}  # fmt: skip


def main(files: list[str]) -> int:
    chosen = [(file, *mutant) for file in files or MUTANTS for mutant in MUTANTS[file]]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            where = ROOT / name
            (shutil.copytree if where.is_dir() else shutil.copy)(where, copy / name)
        for stale in copy.rglob("__pycache__"):
            shutil.rmtree(stale)
        if outcome(copy, {test for *_, tests in chosen for test in tests.split()}) != "lives":
            raise SystemExit("the tests fail without any mutant")
        results = []
        for file, old, new, tests in chosen:
            began = time.monotonic()
            results.append(planted(copy, copy / "minicache" / f"{file}.py", old, new, tests))
            print(f"{results[-1]:7} {time.monotonic() - began:4.0f} s  {file}: {old} -> {new or 'nothing'}", flush=True)
    print(f"\n{len(results)} mutants: " + ", ".join(f"{results.count(each)} {each}" for each in sorted(set(results))))
    return int(set(results) != {"caught"})


def planted(copy: Path, path: Path, old: str, new: str, tests: str) -> str:
    """What becomes of one mutant; the file is mended afterwards."""
    text = path.read_text()
    if old not in text:
        return "gone"
    path.write_text(text.replace(old, new))
    try:
        return outcome(copy, tests.split())
    finally:
        path.write_text(text)


def outcome(copy: Path, tests: Iterable[str]) -> str:
    """ "caught" where a test fails, "lives" where none does, "broken" where they do not even begin."""
    files = [f"tests/test_{test}.py" for test in sorted(tests)]
    command = [sys.executable, "-B", "-m", "pytest", "-qx", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        code = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        return "caught"
    return {0: "lives", 1: "caught"}.get(code, "broken")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
