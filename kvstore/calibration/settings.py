"""How to calibrate."""

from dataclasses import dataclass
from typing import Literal

from kvstore.codecs.ref.predict import HISTORY
from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """How to calibrate.

    Args:
        prompts: Number of prompts.
        prefix_tokens: Their lengths; prompts take turns.
        continuation_tokens: Tokens behind each over which an error is charged.
        group_layers: Layers that a basis spans.
        span: One basis a head, or one over all heads (of all layers of the group).
        joint: Whether one basis covers K and V together.
        window: Tokens from which K and V are predicted, 0 for a mean alone; see the stage `predict`.
        token_dims: Dimensions of a token's vector in the artefact.
        metric: What an error costs: `fisher`, `power` (queries and output projection, no gradients) or `none`.
        repeats: Continuations that are sampled for each prompt.
        probes: Queries kept a head, which stand for those to come.
        seed: Of everything random.
    """

    prompts: int = 64
    prefix_tokens: tuple[int, ...] = (256, 512, 1024)
    continuation_tokens: int = 128
    group_layers: int = 1
    span: Literal["head", "heads"] = "heads"
    joint: bool = False
    window: int = 0
    token_dims: int = 256
    metric: Literal["fisher", "power", "none"] = "fisher"
    repeats: int = 4
    probes: int = 48
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: A setting is out of range.
        """
        numbers = (self.prompts, *self.prefix_tokens, self.continuation_tokens, self.group_layers, self.repeats)
        if min(numbers) < 1 or self.probes < 1:
            raise ConfigError("calibration needs at least one prompt, token, layer, repeat and probe")
        if self.span == "head" and (self.group_layers > 1 or self.joint):
            raise ConfigError("a basis for each head spans one layer of K or V: use span 'heads'")
        if not 0 <= self.window <= HISTORY + 1 or self.token_dims < 1:
            raise ConfigError(f"a prediction looks at 0 to {HISTORY + 1} tokens of at least one dimension")
