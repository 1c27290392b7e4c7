"""Checks of the options of stages: JSON of a frame's header is as untrusted as its bytes."""

from collections.abc import Sequence
from typing import Any

from kvstore.errors import PipelineError


def require_int(stage: str, option: str, value: Any, low: int, high: int) -> None:
    """Refuse what is not an integer (a bool is none) from `low` to `high`.

    Raises:
        PipelineError: It is something else.
    """
    if type(value) is not int or not low <= value <= high:
        raise PipelineError(f"stage {stage!r}: {option} must be an integer from {low} to {high}")


def require_bool(stage: str, option: str, value: Any) -> None:
    """Refuse what is not a bool.

    Raises:
        PipelineError: It is something else.
    """
    if type(value) is not bool:
        raise PipelineError(f"stage {stage!r}: {option} must be true or false")


def require_choice(stage: str, option: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is not one of a few words.

    Raises:
        PipelineError: It is something else.
    """
    if not isinstance(value, str) or value not in choices:
        raise PipelineError(f"stage {stage!r}: {option} must be one of {', '.join(choices)}")


def require_names(stage: str, option: str, value: Any) -> None:
    """Refuse what is not a tuple of names.

    Raises:
        PipelineError: It is something else.
    """
    if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
        raise PipelineError(f"stage {stage!r}: {option} must be a list of names")
    if len(set(value)) < len(value):
        raise PipelineError(f"stage {stage!r}: {option} names one plane twice")


def require_numbers(stage: str, option: str, value: Any, high: int) -> None:
    """Refuse what is not a tuple of different integers from 0 to `high`.

    Raises:
        PipelineError: It is something else.
    """
    if not isinstance(value, tuple) or not all(type(number) is int and 0 <= number <= high for number in value):
        raise PipelineError(f"stage {stage!r}: {option} must be a list of integers from 0 to {high}")
    if len(set(value)) < len(value):
        raise PipelineError(f"stage {stage!r}: {option} has a number twice")
