"""The benchmark that holds the profiler's search against others: what they may ask, and what is made of it."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Row
from benchmarks.profiler_efficiency import SHARE, _aims, read_grid, reference_of
from benchmarks.profiler_grid import grid as grid_of
from benchmarks.profiler_searchers import Grid, at_random, curve, kvserve, ours
from kvstore.profiler.pareto import hypervolume, point
from kvstore.profiler.search import start_pool
from kvstore.profiler.space import Space
from tests.test_profiler_search import SPACE, made_outcome, made_trial


@pytest.fixture(scope="module")
def grid() -> Grid:
    pool = tuple(start_pool(SPACE, 60, 3))
    trials = tuple(made_trial(one) for one in pool)
    outcomes = tuple(made_outcome(one, trial) for one, trial in zip(pool, trials, strict=True))
    return Grid(SPACE, pool, trials, outcomes, reference_of(trials, outcomes))


def volumes(grid: Grid, chosen: Iterator[int], budget: int) -> list[float]:
    reference = torch.tensor(point(*grid.reference), dtype=torch.float64)
    return curve(grid, list(chosen), budget, lambda points: hypervolume(points, reference))


def test_searchers_ask_once_and_stay_within_the_budget(grid: Grid) -> None:
    for searcher, budget in ((at_random, 10), (kvserve, 10), (ours, 6)):
        chosen = list(searcher(grid, budget, 1))
        assert len(set(chosen)) == len(chosen) <= budget
        assert list(searcher(grid, budget, 1)) == chosen, "seeded"
        found = volumes(grid, iter(chosen), budget)
        assert found == sorted(found)
        assert len(found) == budget
    assert list(at_random(grid, 10, 1)) != list(at_random(grid, 10, 2))


def test_kvserve_begins_with_its_start_points_and_then_looks_for_the_largest_feasible_ratio(grid: Grid) -> None:
    chosen = list(kvserve(grid, 16, 0))
    ratios = [max(outcome.ratio) for outcome in grid.outcomes]
    assert ratios[chosen[0]] == max(ratios)
    feasible = [
        outcome.ratio[level]
        for outcome in grid.outcomes
        for level in range(len(outcome.ratio))
        if outcome.kl_nats(level) < 0.03
    ]
    found = [
        grid.outcomes[number].ratio[level]
        for number in chosen
        for level in range(len(grid.outcomes[number].ratio))
        if grid.outcomes[number].kl_nats(level) < 0.03
    ]
    assert max(found) > 0.9 * max(feasible)


def test_a_grid_comes_back_from_its_file(tmp_path: Path, grid: Grid) -> None:
    path = tmp_path / "grid.jsonl"
    lines = [json.dumps({"kind": "run", "space": [SPACE.layers, SPACE.kv_heads, SPACE.head_dim]})]
    for one, trial, outcome in zip(grid.configurations, grid.trials, grid.outcomes, strict=True):
        values = dict(one.values)
        lines.append(json.dumps({"kind": "trial", "values": values, **asdict(trial)}))
        lines.append(json.dumps({"kind": "outcome", "values": values, **asdict(outcome)}))
    lines.append(json.dumps({"kind": "outcome", "values": dict(grid.configurations[0].values), "reason": "memory"}))
    path.write_text("\n".join(lines) + "\n")
    found = read_grid(path)
    assert set(found.configurations) == set(grid.configurations)
    assert found.reference == grid.reference
    number = found.configurations.index(grid.configurations[5])
    assert (found.trials[number], found.outcomes[number]) == (grid.trials[5], grid.outcomes[5])


def test_the_grid_has_more_than_two_thousand_configurations() -> None:
    found = list(grid_of(Space(6, 2, 64)))
    assert len(set(found)) == len(found) > 2_000


def test_aims_are_computed_from_the_rows(grid: Grid) -> None:
    def rows(ours: list[float], after_few: float) -> list[Row]:
        medians = {"kvstore": ours, "random": [0.5] * 10, "kvserve": [0.6] * 10}
        return [
            {"table": "searchers", "searcher": name, "p50": values, "after_1_in_50": after_few}
            for name, values in medians.items()
        ]

    few, lead = _aims(rows([0.7] * 10, 0.995), grid)
    assert few.met
    assert (few.target, few.value) == (SHARE, 0.995)
    assert lead.met
    assert lead.value == pytest.approx(0.1)
    # Only from the start points on.
    assert _aims(rows([0.1] * 7 + [0.7] * 3, 0.995), grid)[1].met
    few, lead = _aims(rows([0.7] * 9 + [0.55], 0.98), grid)
    assert not few.met
    assert not lead.met
