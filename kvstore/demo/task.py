"""What both processes of the demo know: a model, token ids, and how they are cut."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

CHUNK_TOKENS = 256

PIPELINES = ("raw", "ladder-packed", "ladder-repeats")
"""Bit for bit, fast, and small without calibration."""


@dataclass(frozen=True, slots=True)
class Task:
    """The work of the demo.

    Args:
        folder: Folder of the model.
        token_ids: The prompt and the given continuation behind it.
        prompt_tokens: Length of the prompt.
        repeats: Timed repetitions.
    """

    folder: Path
    token_ids: list[int]
    prompt_tokens: int
    repeats: int

    @property
    def stored_tokens(self) -> int:
        """Tokens of the prompt's full chunks; at least one token is left, because its logits are needed."""
        return (self.prompt_tokens - 1) // CHUNK_TOKENS * CHUNK_TOKENS

    @property
    def stored_ids(self) -> list[int]:
        """Token ids whose KV is stored."""
        return self.token_ids[: self.stored_tokens]

    @property
    def tail_ids(self) -> list[int]:
        """Token ids of the prompt behind them, which every process computes itself."""
        return self.token_ids[self.stored_tokens : self.prompt_tokens]

    @property
    def continuation_ids(self) -> list[int]:
        """Token ids of the given continuation."""
        return self.token_ids[self.prompt_tokens :]

    def dump(self, file: Path) -> None:
        """Write the task for the other process."""
        file.write_text(json.dumps(asdict(self) | {"folder": str(self.folder)}), "utf-8")

    @classmethod
    def load(cls, file: Path) -> "Task":
        """Read what `dump` wrote."""
        fields = json.loads(file.read_text("utf-8"))
        return cls(Path(fields["folder"]), fields["token_ids"], fields["prompt_tokens"], fields["repeats"])


def salt_of(pipeline: str) -> bytes:
    """Salt that keeps what different pipelines store of the same tokens apart: a key holds one frame."""
    return f"demo {pipeline}".encode()
