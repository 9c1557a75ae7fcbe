"""What goes to disk when a plan is worth keeping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from minicache.checkpoints import embedded_folder
from minicache.cost import full_passes
from minicache.files import replacing
from minicache.plan import CachePlan, nonuniform, uniform
from minicache.reading import read_whole, understood
from minicache.samplers import passes
from minicache.sampling import STEPS, Settings
from minicache.solver import Solver
from minicache.unet import UNet


@dataclass(frozen=True)
class Recipe(Settings):
    """Settings worth keeping, as JSON on disk. ValueError for what no sampler takes."""

    fingerprint: str | None = None  # of the weights they were made for (checkpoints.fingerprint); None: any
    error: float | None = None  # measured: relative L2 of the final image

    def __post_init__(self):
        super().__post_init__()
        for name, kinds in (("plan", CachePlan), ("fingerprint", str | None), ("error", float | int | None)):
            if not isinstance(getattr(self, name), kinds):
                raise ValueError(f"{name}={getattr(self, name)!r} is of the wrong kind")
        if self.error is not None and not 0 <= self.error < math.inf:
            raise ValueError(f"error={self.error} must be finite, and not negative")

    @property
    def label(self) -> str:
        """The sampler and the spacing, as "plms, rho7"; a solver's name alone."""
        return f"{self.sampler}, {self.spacing}" if self.spacing else str(self.sampler)

    def settings(self, fingerprint: str | None = None) -> dict[str, Any]:
        """Keyword arguments for `sample` and `denoise`; refused for weights of another fingerprint."""
        if self.fingerprint not in (None, fingerprint):
            raise ValueError(f"the recipe was made for the weights {self.fingerprint}, and these are {fingerprint}")
        return {field.name: getattr(self, field.name) for field in fields(Settings)}

    def save(self, path: str | Path) -> None:
        text = json.dumps(asdict(self), indent=1, default=lambda number: number.item())  # of NumPy, as plans take them
        with replacing(path) as temporary:
            temporary.write_text(text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Raises ValueError where the file is not a recipe."""
        content = read_whole(Path(path))
        with understood(path, "a recipe"):
            values = {**json.loads(content)}
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
            made = {"plan": CachePlan(**values["plan"])}
            if isinstance(values.get("sampler"), dict):
                made["sampler"] = Solver(**values["sampler"])
            return cls(**{**values, **made})


def recipes_in(folder: str | Path, fingerprint: str | None, start: int | None = None) -> list[Recipe]:
    """The recipes (*.json) in a folder for weights of this fingerprint (or for any), and for this start."""
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder} of recipes")
    paths = sorted(Path(folder).iterdir())  # glob would find nothing where it may not look
    found = [Recipe.load(path) for path in paths if path.suffix == ".json"]
    return [recipe for recipe in found if recipe.fingerprint in (None, fingerprint) and recipe.start == start]


def recipe_from(
    steps: int = STEPS,
    interval: int = 5,
    branch: int = 1,
    center: float | None = None,
    power: float | None = None,
    forecast: str = "hold",
    **settings: Any,
) -> Recipe:
    """1:N caching, by the flags of sample.py; settings: other fields of Recipe, as sampler and spacing.

    steps counts timesteps, of which pndm takes one twice. The plan is `uniform`, or `nonuniform` where center or power
    is given; the other one is then half its steps or 1.2.
    Raises ValueError for values that plans or recipes do not take.
    """
    steps = passes(steps, settings.get("sampler"))
    if center is None and power is None:
        plan = uniform(steps, interval, branch, forecast)
    else:
        center, power = steps / 2 if center is None else center, 1.2 if power is None else power
        plan = nonuniform(steps, interval, center, power, branch, forecast)
    return Recipe(plan, **settings)


def recipe_from_file(path: str | Path, **flags: Any) -> Recipe:
    """A recipe on disk. Flags (see `recipe_from`) may repeat what it says: ValueError where they contradict it.

    Raises ValueError as well where it is for noised images, and not for pure noise.
    """
    recipe = Recipe.load(path)
    if recipe.start is not None:
        raise ValueError(f"{path} is for images noised to t = {recipe.start - 1}, not for pure noise")
    fixed = {**asdict(recipe), "sampler": str(recipe.sampler), "steps": recipe.steps, "branch": recipe.plan.branch}
    for name, value in flags.items():
        if name not in fixed:
            raise ValueError(f"--{name} contradicts {path}, which says itself which steps run in full")
        if value != fixed[name]:
            raise ValueError(f"--{name} {value} contradicts {path}, which has {fixed[name]}")
    return recipe


def nearest_recipe(recipes: Iterable[Recipe], budget: float, cost: Callable[[CachePlan], float]) -> Recipe:
    """The recipe whose plan costs nearest to the budget, in full passes, and at most a quarter more than it.

    Raises ValueError where there is none.
    """
    costs = {cost(recipe.plan): recipe for recipe in recipes}
    if not costs:
        raise ValueError("there is no calibrated plan for these weights")
    if min(costs) > 1.25 * budget:
        raise ValueError(f"the cheapest plan for these weights costs {min(costs):.1f} full passes")
    return costs[min((c for c in costs if c <= 1.25 * budget), key=lambda c: abs(c - budget))]


def shipped_recipe(unet: UNet, weights: str, budget: float, guidance: float = 1.0) -> Recipe:
    """The `nearest_recipe` of those that ship for these weights (a fingerprint) and this guidance."""
    shipped = [each for each in recipes_in(embedded_folder() / "recipes", weights) if each.guidance == guidance]
    return nearest_recipe(shipped, budget, partial(full_passes, unet, guidance=guidance))
