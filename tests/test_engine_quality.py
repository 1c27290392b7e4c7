"""What benchmarks.engine_quality makes of an engine's answers; the engine itself is run by `make test-engines`."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.engine_quality import _aims
from benchmarks.engine_reader import LogP, Run, differences, kl_nats, leading
from benchmarks.harness import Row
from benchmarks.report import main as report


def log_p(*rows: list[float]) -> LogP:
    return np.log(np.array(rows, np.float32))


def test_kl_is_the_mean_over_tokens() -> None:
    exact = log_p([0.5, 0.5], [0.25, 0.75])
    assert kl_nats(exact, exact) == 0
    other = log_p([0.25, 0.75], [0.25, 0.75])
    assert kl_nats(exact, other) == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2, rel=1e-5)


def test_runs_are_compared_up_to_their_first_difference() -> None:
    assert [leading([1, 2, 3], other) for other in ([1, 2, 3], [1, 2, 4], [2, 2, 3], [1])] == [3, 2, 0, 1]
    found = log_p([0.9, 0.1], [0.4, 0.6])
    own = Run([0, 1], found, found)
    assert list(differences(own, own)) == []
    [(position, margin)] = differences(own, Run([0, 0], found, found))
    assert position == 1
    assert margin == pytest.approx(np.log(1.5), rel=1e-5)


def rows(identical: int, derived_kl: float) -> list[Row]:
    levels: list[Row] = [
        {"table": "levels", "workload": workload, "pipeline": pipeline, "level": level, "identical": identical,
         "answers_right": 3, "loaded_tokens": 1792, "kl_nats": 0.004, "kl_first_nats": 0.0, "prompts": 1,
         "agreement": 1.0, "ratio": 4.0}
        for workload in ("look-up", "text")
        for pipeline, level in (("own cache", None), ("raw", None), ("ladder", 2))
    ]  # fmt: skip
    kls = {"raw": 0.0, "one lossy load": 0.01, "store_derived off": derived_kl, "store_derived on": 0.03}
    turns: list[Row] = [
        {"table": "conversation", "variant": name, "turn": turn, "kl_nats": kl, "kl_worst_nats": kl, "loaded_tokens": 9}
        for name, kl in kls.items()
        for turn in (1, 2)
    ]
    return [*levels, *turns]


def test_aims_are_met_by_what_they_ask_for() -> None:
    assert all(aim.met for aim in _aims(rows(1, 0.01), 2))
    assert [aim.met for aim in _aims(rows(0, 0.02), 2)] == [False, True, True, True, True, False]


def test_the_page_shows_every_table(tmp_path: Path) -> None:
    result = {
        "benchmark": "engine_quality", "date": "d", "commit": "c", "versions": {}, "seed": 0,
        "machine": {"memory_bytes": 1, "processor": "p", "cores": 1, "gpu": None, "kernel": "k"},
        "rows": rows(1, 0.01), "aims": [aim.as_json() for aim in _aims(rows(1, 0.01), 2)],
    }  # fmt: skip
    (tmp_path / "engine_quality.json").write_text(json.dumps(result))
    report(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "### Levels" in page
    assert "### Conversations" in page
    assert (tmp_path / "docs" / "plots" / "engine_quality.png").exists()
