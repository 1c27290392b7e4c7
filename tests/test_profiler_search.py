"""The search on objectives that are known, and the hypervolume it is judged by."""

import itertools
import math
import random

import pytest
import torch
from botorch.utils.multi_objective.box_decompositions import DominatedPartitioning

from kvstore.profiler.objectives import Loss, Outcome, Trial
from kvstore.profiler.pareto import KL_FLOOR, best_cover, front, hypervolume, point
from kvstore.profiler.search import Search, points_of, start_pool
from kvstore.profiler.space import Configuration, Space
from kvstore.profiler.surrogate import Features, fit_quality, observations, predict

SPACE = Space(6, 2, 64)
REFERENCE = (1.0, 20.0, 0.3)


def made_trial(configuration: Configuration) -> Trial:
    """A codec whose objectives follow from the values: ratio and error both grow with the step."""
    values = configuration.values
    if values["quantiser"] == "nested":
        finest = 3.0 ** (float(values["step"]) / 80 - configuration.levels + 1)
        gain = {"hadamard": 1.0, "weighted": 0.7, "klt-head": 0.6, "klt": 0.4, "klt-joint": 0.35}
        error = 0.02 * gain[str(values["transform"])] * finest**2
        speed = {"hadamard": 4.0, "weighted": 4.5, "klt-head": 6.0, "klt": 8.0, "klt-joint": 9.0}
        decode_s = speed[str(values["transform"])]
    else:
        finest, error, decode_s = 0.3, 0.02, 3.0
    levels = range(configuration.levels - 1, -1, -1)
    return Trial(
        ratio=tuple(3 + 4 * math.log1p(finest * 3**n) for n in levels),
        encode_s_per_gb=10.0,
        decode_s_per_gb=tuple(decode_s / (1 + n) for n in levels),
        weighted_error=tuple(error * 9**n for n in levels),
        attention_error=tuple(error * 9**n / 3 for n in levels),
    )


def made_outcome(configuration: Configuration, trial: Trial) -> Outcome:
    """Quality that the proxy is wrong about, by a factor for each transform."""
    wrong = {"hadamard": 0.5, "weighted": 1.5, "klt": 1.2, "klt-joint": 0.8}
    factor = wrong.get(str(configuration.values.get("transform")), 1.0)
    losses = [{"text-512": Loss(kl, kl / 20, 0.0, 1.0)} for kl in (factor * e for e in trial.weighted_error)]
    return Outcome(trial.ratio, tuple(losses))


def searched(search: Search, pool: list[Configuration], budget: int) -> list[float]:
    for configuration in pool:
        search.add(configuration, made_trial(configuration))
    volumes: list[float] = []
    while len(volumes) < budget:
        batch = search.ask(2)
        assert batch
        for configuration in batch:
            trial = made_trial(configuration)
            search.tell(configuration, trial, made_outcome(configuration, trial))
            volumes.append(search.volume)
    return volumes


def test_the_search_finds_most_of_what_there_is_with_few_runs() -> None:
    pool = start_pool(SPACE, 120, 7)
    points = [points_of(trial, made_outcome(one, trial)) for one in pool if (trial := made_trial(one))]
    whole = hypervolume(torch.cat(points), torch.tensor(point(*REFERENCE), dtype=torch.float64))
    volumes = searched(Search(SPACE, REFERENCE, 3), pool, 8)
    assert volumes == sorted(volumes)
    assert volumes[-1] > 0.93 * whole
    drawn = random.Random(0)
    at_random = []
    for _ in range(20):
        chosen = torch.cat(drawn.sample(points, 8))
        at_random.append(hypervolume(chosen, torch.tensor(point(*REFERENCE), dtype=torch.float64)))
    assert volumes[-1] > max(at_random)


def test_the_search_is_seeded_and_never_asks_twice() -> None:
    pool = start_pool(SPACE, 60, 1)
    first, again = Search(SPACE, REFERENCE, 5), Search(SPACE, REFERENCE, 5)
    assert searched(first, pool, 6) == searched(again, pool, 6)
    assert first.candidates == 54
    few = Search(SPACE, REFERENCE, 5)
    few.add(pool[0], made_trial(pool[0]))
    assert few.ask(3) == [pool[0]]
    few.drop(pool[0])
    assert few.ask(3) == []
    assert few.volume == 0.0


def test_the_model_of_quality_corrects_the_proxy_and_knows_what_it_does_not_know() -> None:
    pool = [one for one in start_pool(SPACE, 120, 2) if one.values["quantiser"] == "nested"]
    features = Features(SPACE)
    trials = [made_trial(one) for one in pool]
    outcomes = [made_outcome(one, trial) for one, trial in zip(pool, trials, strict=True)]
    rows = [features.rows(one, trial) for one, trial in zip(pool, trials, strict=True)]
    model = fit_quality(features, rows[:40], [observations(one) for one in outcomes[:40]])
    mean, deviation = predict(model, torch.cat(rows[40:]))
    truth = torch.cat([observations(one)[0][:, 0] for one in outcomes[40:]])
    proxy = torch.cat([torch.tensor(trial.weighted_error).clamp_min(KL_FLOOR).log() for trial in trials[40:]])
    assert (mean - truth).square().mean() < 0.25 * (proxy - truth).square().mean()
    assert (((mean - truth) / deviation).abs() < 3).double().mean() > 0.9
    known, _ = predict(model, torch.cat(rows[:40]))
    assert (known - torch.cat([observations(one)[0][:, 0] for one in outcomes[:40]])).abs().mean() < 0.2


def test_rows_have_a_column_for_everything() -> None:
    features = Features(SPACE)
    for configuration in start_pool(SPACE, 80, 4):
        rows = features.rows(configuration, made_trial(configuration))
        assert rows.shape == (configuration.levels, features.weighted_error + 2)
        assert torch.isfinite(rows).all()


def test_hypervolume_is_that_of_boxes() -> None:
    reference = torch.zeros(3, dtype=torch.float64)
    one, two = torch.tensor([[2.0, 3.0, 4.0]]).double(), torch.tensor([[1.0, 5.0, 1.0]]).double()
    assert hypervolume(one, reference) == pytest.approx(24)
    assert hypervolume(torch.cat([one, two]), reference) == pytest.approx(24 + 5 - 3)
    assert hypervolume(-one, reference) == 0.0
    assert front(torch.cat([one, two, one / 2])).tolist() == [True, True, False]


def test_hypervolume_is_that_of_botorch() -> None:
    generator = torch.Generator().manual_seed(3)
    reference = torch.full((3,), -1.0, dtype=torch.float64)
    for number in range(60):
        points = torch.randn(int(torch.randint(1, 30, (1,), generator=generator)), 3, generator=generator).double()
        if number % 3 == 0:
            # Ties on every axis, and points that are there twice.
            points = torch.cat([points.round(), points.round()])
        better = points[(points > reference).all(-1)]
        expected = DominatedPartitioning(ref_point=reference, Y=better).compute_hypervolume() if len(better) else 0.0
        assert hypervolume(points, reference) == pytest.approx(float(expected))


def test_losses_below_the_floor_are_alike() -> None:
    assert point(2.0, 1.0, 0.0) == point(2.0, 1.0, KL_FLOOR / 2) == (math.log(2), 0.0, -math.log(KL_FLOOR))


def test_the_greedy_cover_is_the_greedy_one() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [torch.rand(2, 3, generator=generator, dtype=torch.float64) for _ in range(12)]
    reference = torch.zeros(3, dtype=torch.float64)
    chosen = best_cover(groups, reference, 4)
    held: list[int] = []
    for number, volume in chosen:
        volumes = {n: hypervolume(torch.cat([groups[m] for m in [*held, n]]), reference) for n in range(12)}
        assert volume == pytest.approx(max(volumes.values()))
        held.append(number)
    best = max(
        hypervolume(torch.cat([groups[n] for n in some]), reference) for some in itertools.combinations(range(12), 4)
    )
    assert chosen[-1][1] >= (1 - 1 / math.e) * best
    everything = best_cover(groups, reference, 99)
    assert everything[-1][1] == pytest.approx(hypervolume(torch.cat(groups), reference))
