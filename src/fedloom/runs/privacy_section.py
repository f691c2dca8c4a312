"""[privacy] of a run file: what the server sees of an upload, and what the model may tell of a client or a row."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fedloom.runs.section import Section
from fedloom.text import shown


class PrivacySection(Section):
    """[privacy]: what the server sees of an upload, and what the model may tell of a client or a row."""

    secure_aggregation: bool = False
    """The server gets the sum of the uploads and no single one."""
    min_clients: int = Field(3, ge=2)
    """Clients of the smallest sum that is opened."""
    min_cover: int = Field(3, ge=1)
    """Clients that must train a number of the adapter; with fewer, it stays as it was."""
    limit: float = Field(65536.0, gt=0)
    """Largest size of a number in a secure sum: a client with a larger one leaves the round."""
    bits: Literal[32, 64] = 64
    """Of a number in a secure sum; 32 with a small limit, about 1."""
    roster: str | None = None
    """A TOML file, client = "ed25519:...", of the sites' identities: their keys for secure sums are authenticated by it."""

    unit: Literal["client", "example"] | None = None
    """Differential privacy of all of a client's rows, or of each row; without it, none."""
    clip: Annotated[float, Field(gt=0)] | Literal["auto", "adaptive"] = 1.0
    """Largest norm of a client's change, or of a row's gradient. For clients also `auto`, that of what the server changes on
    its own rows (task.proxy_data), or `adaptive`, the clients' median, counted under noise."""
    clip_start: float = Field(0.1, gt=0)
    """The first norm where clip is `adaptive`; it moves by a tenth a round at most."""
    noise_multiplier: float | None = Field(None, ge=0)
    """Standard deviation of the noise over `clip`; 0 clips alone, which is no differential privacy."""
    target_epsilon: float | None = Field(None, gt=0)
    """Never passed: the run stops before. Without a noise_multiplier, the noise is such that train.rounds just keep to it."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Of (epsilon, delta)-differential privacy: well below one over the number of what is protected."""
    noise: Literal["server", "clients"] = "server"
    """Who adds the noise that protects clients; `clients`: each a share, under the secure sum: the server is not trusted."""
    canaries: int = Field(0, ge=0)
    """Training rows that get a random label, each left out by a secret coin: `fedloom audit` bounds epsilon from them."""

    @field_validator("clip", mode="before")
    @classmethod
    def _known_clip(cls, clip: Any) -> Any:
        if isinstance(clip, str) and clip not in ("auto", "adaptive"):
            raise ValueError(f"got {shown(clip)}, expected a number above 0, 'auto' or 'adaptive'")
        return clip

    @model_validator(mode="after")
    def _noise(self) -> PrivacySection:
        if self.unit is None and (self.noise_multiplier is not None or self.target_epsilon is not None):
            raise ValueError(
                'noise_multiplier or target_epsilon is set without a unit, expected unit = "client" or "example"'
            )
        if self.unit is not None and self.noise_multiplier is None and self.target_epsilon is None:
            raise ValueError("unit is set without noise: set target_epsilon, or noise_multiplier")
        if self.unit != "client" and (self.noise == "clients" or isinstance(self.clip, str)):
            key, value = ("clip", self.clip) if isinstance(self.clip, str) else ("noise", self.noise)
            raise ValueError(
                f"{key} is {value!r}, which protects clients, and unit is {self.unit!r}: set unit to 'client'"
                + (", or clip to a number" if key == "clip" else ", or remove noise")
            )
        if self.noise == "clients" and not self.secure_aggregation:
            raise ValueError(
                "noise is 'clients' without secure_aggregation: a share of the noise protects nothing that is seen by itself. "
                "Set secure_aggregation = true, or noise = 'server'"
            )
        return self

    @property
    def clipping(self) -> Literal["fixed", "auto", "adaptive"]:
        """Where the clipping bound comes from."""
        return self.clip if isinstance(self.clip, str) else "fixed"

    @property
    def first_clip(self) -> float:
        """The clipping bound of the first round; of `auto`, a stand-in until it is measured."""
        return self.clip_start if isinstance(self.clip, str) else self.clip
