"""What goes to disk when a plan is worth keeping."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minicache.files import replacing
from minicache.plan import CachePlan


@dataclass(frozen=True)
class Recipe:
    """All that decides a picture but the weights and the seed, as JSON on disk."""

    plan: CachePlan
    sampler: str = "ddim"
    spacing: str = "uniform"
    eta: float = 0.0
    variance: str | None = None  # None: the checkpoint's own
    fingerprint: str | None = None  # of the weights it was made for (convert.fingerprint); None: any
    error: float | None = None  # measured: relative L2 of the final image

    def settings(self, fingerprint: str | None = None) -> dict[str, Any]:
        """Keyword arguments for `sample` and `denoise`; refused for weights of another fingerprint."""
        if self.fingerprint is not None and self.fingerprint != fingerprint:
            raise ValueError(f"the recipe was made for the weights {self.fingerprint}, and these are {fingerprint}")
        return {name: getattr(self, name) for name in ("sampler", "spacing", "eta", "variance", "plan")}

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
