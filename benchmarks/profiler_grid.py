"""The true objectives of a grid of configurations, each measured once: what `profiler_efficiency` searches.

    python -m benchmarks.profiler_grid --model PATH --calibration FILE

It takes an hour and goes on where it was stopped. Quality does not depend on what else the machine does; times do, so
they are taken in a second pass (`--times`), with nothing else on the machine.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from kvstore.calibration.calibrate import calibrate_all
from kvstore.calibration.model import Model
from kvstore.calibration.settings import Settings
from kvstore.files import write_whole
from kvstore.profiler.journal import Journal
from kvstore.profiler.objectives import InfeasibleError, Outcome, Task, Trial
from kvstore.profiler.space import Configuration, Space
from kvstore.profiler.text import deal, stretches, windows
from kvstore.profiler.workers import Kind, Workers

GRID = Path(__file__).parent / "results" / "profiler_grid.jsonl"
ARTEFACTS = Path(__file__).parent.parent / "build" / "profiler_grid"
SEED = 0
BUCKET = 512
PROMPTS = 12
CALIBRATION_PROMPTS = 64
_DIGITS = 5

_STEPS = (-48.0, -24.0, 0.0, 24.0, 48.0)
_PARTS: tuple[dict[str, Sequence[Any]], ...] = (
    {
        "quantiser": ("nested",),
        "transform": ("hadamard",),
        "levels": (1, 3),
        "step": _STEPS,
        "value_step": (0.0, 24.0, 48.0),
        "recent": (0,),
        "coder": ("rans", "rans-pack-1"),
    },
    {
        "quantiser": ("nested",),
        "transform": ("weighted", "klt-head"),
        "levels": (1, 3),
        "step": _STEPS,
        "value_step": (-32.0, 0.0, 24.0),
        "importance": (0.0, 30.0),
        "rank": (8,),
        "sinks": (0,),
        "recent": (0,),
        "coder": ("rans", "rans-pack-1"),
    },
    {
        "quantiser": ("nested",),
        "transform": ("klt",),
        "levels": (1, 3),
        "step": _STEPS,
        "value_step": (0.0, 24.0),
        "importance": (0.0, 30.0),
        "rank": (4, 8),
        "sinks": (0,),
        "recent": (0,),
        "coder": ("rans", "rans-pack-1"),
    },
    {
        "quantiser": ("nested",),
        "transform": ("klt-joint",),
        "levels": (1, 3),
        "step": _STEPS,
        "importance": (0.0, 30.0),
        "rank": (4, 8),
        "sinks": (0,),
        "recent": (0,),
        "coder": ("rans", "rans-pack-1"),
    },
    {
        "quantiser": ("minmax",),
        "k_levels": (8, 12, 16, 24),
        "v_levels": (4, 6, 8, 12),
        "group": (0, 64),
        "sinks": (0,),
        "recent": (0,),
        "coder": ("ans-layer", "pack"),
    },
    {
        "quantiser": ("absmax",),
        "k_bins": (8, 12, 24),
        "v_bins": (8, 12, 24),
        "sinks": (0,),
        "recent": (0,),
    },
    {"quantiser": ("codebook", "step", "fp8", "exact"), "sinks": (0,), "recent": (0,)},
)
"""Values of every part of the space that are combined; what is not named takes all that the space's own grid has."""


def grid(space: Space) -> Iterator[Configuration]:
    """The configurations, in a fixed order."""
    for part in _PARTS:
        yield from space.grid(part)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model whose KV cache is compressed")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate and to measure on")
    parser.add_argument("--jobs", type=int, help="processes (one a core)")
    parser.add_argument(
        "--times", action="store_true", help="take the times of what was measured; nothing else may run"
    )
    args = parser.parse_args(argv)
    model = Model(args.model, dtype="float32")
    space = space_of(model)
    parts = deal(stretches([args.calibration], model, BUCKET))
    _calibrate(model, space, [token for ids in parts[0] for token in ids], args.calibration.name)
    prompts = windows(parts[1], [BUCKET], PROMPTS, SEED)
    layout = model.layout_of([0, 1])
    card = {
        "model": layout.model,
        "revision": layout.revision,
        "text": args.calibration.name,
        "prompts": PROMPTS,
        "bucket": BUCKET,
        "space": [space.layers, space.kv_heads, space.head_dim],
    }
    kind: Kind = "trial" if args.times else "outcome"
    task = Task(args.model, "cpu", ARTEFACTS, space, prompts, trials=1)
    with Journal(GRID, card, resume=True) as journal:
        known = {configuration_of(space, record) for record in journal.of(kind)}
        left = [configuration for configuration in grid(space) if configuration not in known]
        with _bar() as bar, Workers(task, args.jobs) as workers:
            shown = bar.add_task(kind, total=len(left) + len(known), completed=len(known))
            for configuration, result in workers.measure(kind, left):
                journal.append({"kind": kind, "values": dict(configuration.values), **_result(result)})
                bar.advance(shown)


def space_of(model: Model) -> Space:
    """All strategies for a model."""
    layout = model.layout_of([0, 1])
    heads, dim = layout.planes["k"].shape[2:]
    return Space(layout.layers, heads, dim)


def configuration_of(space: Space, record: dict[str, Any]) -> Configuration:
    """The configuration that a record of the grid is about."""
    return space.configuration(record["values"])


def _calibrate(model: Model, space: Space, token_ids: Sequence[int], text: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    bases = [basis for basis in space.bases if not (ARTEFACTS / basis.name).is_file()]
    if not bases:
        return
    base = Settings(prompts=CALIBRATION_PROMPTS, prefix_tokens=(256, 512, 1024), seed=SEED)
    with _bar() as bar:
        shown = bar.add_task("calibrating", total=1.0)
        settings = [basis.settings(base) for basis in bases]
        made = calibrate_all(model, token_ids, [text], settings, lambda share: bar.update(shown, completed=share))
    for basis, data in zip(bases, made, strict=True):
        write_whole(ARTEFACTS / basis.name, data)


def _result(result: object) -> dict[str, Any]:
    if isinstance(result, InfeasibleError):
        return {"reason": str(result)}
    assert isinstance(result, Trial | Outcome)
    found = _rounded(asdict(result))
    assert isinstance(found, dict)
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _bar() -> Progress:
    return Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())


if __name__ == "__main__":
    main()
