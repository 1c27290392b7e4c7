"""How to profile a model."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore.errors import ConfigError
from kvstore.profiler.prompts import CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class Options:
    """How to profile.

    Args:
        model: Folder of a Hugging Face causal LM.
        texts: Text of the kind that will be served.
        out: Folder of the run.
        budget: Configurations that are measured with the model.
        device: `cpu` or `cuda`.
        resume: Whether to go on with a run that is there.
        jobs: Processes; by default one a core, or one on a GPU.
        buckets: Prompt lengths, tokens.
        prompts: Prompts of each bucket that the search measures on.
        final_prompts: Prompts of each bucket that the profiles found are measured on.
        pool: Candidates that are tried without the model at first.
        fresh: Candidates near the front that are tried before each batch.
        profiles: Profiles to keep at most.
        loss_max: Largest quality loss of interest, nats.
        calibrated: Whether to look at strategies that need calibration.
        token_ids: Whether readers will know the token ids of what they decode.
        calibration_prompts: Prompts to calibrate on.
        seed: Of everything random.
    """

    model: Path
    texts: tuple[Path, ...]
    out: Path
    budget: int = 32
    device: str = "cpu"
    resume: bool = False
    jobs: int | None = None
    buckets: tuple[int, ...] = (256, 512, 1536)
    prompts: int = 10
    final_prompts: int = 64
    pool: int = 256
    fresh: int = 12
    profiles: int = 10
    loss_max: float = 0.3
    calibrated: bool = True
    token_ids: bool = True
    calibration_prompts: int = 48
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: A setting is out of range.
        """
        counts = (self.budget, self.prompts, self.final_prompts, self.pool, self.profiles, self.calibration_prompts)
        if min(counts) < 1 or self.fresh < 0 or not self.buckets or not self.loss_max > 0:
            raise ConfigError("budget, prompts, pool, profiles and the largest loss must be above zero")
        wrong = [bucket for bucket in self.buckets if bucket < 1 or bucket % CHUNK_TOKENS]
        if wrong or len(set(self.buckets)) < len(self.buckets):
            raise ConfigError(f"buckets are different multiples of {CHUNK_TOKENS} tokens, the tokens of a chunk")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"the device is cpu or cuda, not {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device here: use --device cpu")
