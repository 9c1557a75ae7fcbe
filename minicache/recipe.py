"""What goes to disk when a plan is worth keeping."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minicache.files import replacing
from minicache.plan import CachePlan
from minicache.samplers import Settings


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

    def settings(self, fingerprint: str | None = None) -> dict[str, Any]:
        """Keyword arguments for `sample` and `denoise`; refused for weights of another fingerprint."""
        if self.fingerprint not in (None, fingerprint):
            raise ValueError(f"the recipe was made for the weights {self.fingerprint}, and these are {fingerprint}")
        return {field.name: getattr(self, field.name) for field in fields(Settings)}

    def save(self, path: str | Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Raises ValueError where the file is not a recipe."""
        try:
            values = json.loads(Path(path).read_text())
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
            return cls(**{**values, "plan": CachePlan(**values["plan"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a recipe: {error}") from None


def recipes_in(folder: str | Path, fingerprint: str | None, start: int | None = None) -> list[Recipe]:
    """The recipes (*.json) in a folder for weights of this fingerprint (or for any), and for this start."""
    found = [Recipe.load(path) for path in sorted(Path(folder).glob("*.json"))]
    return [recipe for recipe in found if recipe.fingerprint in (None, fingerprint) and recipe.start == start]
