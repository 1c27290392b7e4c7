"""Benchmarks: each runs, writes its one file in the form that is documented, and the page is made from the files."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import at_least, at_most, missed_for, percentile, ratio_interval
from benchmarks.peer_servers import missing
from benchmarks.quality import envelope, ratio_at
from benchmarks.report import main as report

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FIELDS = ["benchmark", "date", "commit", "machine", "versions", "seed", "rows", "aims"]


def check_result(result: dict[str, Any]) -> None:
    assert list(result) == FIELDS
    assert {"processor", "cores", "gpu"} <= result["machine"].keys()
    assert result["rows"]
    for aim in result["aims"]:
        assert {"aim", "target", "value", "met"} <= aim.keys()
        assert (aim["value"] is None) == ("needs" in aim)
        assert aim["value"] is not None or not aim["met"]


def test_wire_runs(tmp_path: Path) -> None:
    out = tmp_path / "wire.json"
    command = [sys.executable, "-m", "benchmarks.wire", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    check_result(result)
    assert len(result["aims"]) == 10


@pytest.mark.parametrize(
    ("name", "aims"),
    [
        ("rate_distortion", 2),
        ("quality", 8),
        ("codec_speed", 4),
        ("tiers", 5),
        ("controller_regret", 3),
        ("published_settings", 2),
        ("tier_profiles", 4),
        ("bandwidth_sweep", 4),
    ],
)
def test_benchmarks_run(name: str, aims: int, tmp_path: Path) -> None:
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=115, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    check_result(result)
    assert len(result["aims"]) == aims


def test_peers_runs_with_what_is_installed(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    check_result(result)
    assert len(result["aims"]) == 8 + len(missing())
    stores = {row["store"] for row in result["rows"] if row["table"] == "peers"}
    assert {store.partition(",")[0] for store in stores} == {"kvstore", "redis", "lmcache", "mooncake"} - set(missing())


def test_a_ratio_is_read_between_the_settings_that_no_other_beats() -> None:
    sweep = [{"ratio": ratio, "kl_nats": kl} for ratio, kl in ((4.0, 0.001), (16.0, 0.1), (8.0, 0.2), (2.0, 0.0005))]
    assert [row["ratio"] for row in envelope(sweep)] == [2.0, 4.0, 16.0]
    assert ratio_at(sweep, 0.01) == pytest.approx(8.0, rel=1e-3)
    assert ratio_at(sweep, 0.2) is None
    assert ratio_at(sweep, 0.0001) is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_of_a_commit(path: Path) -> None:
    result = json.loads(path.read_text())
    check_result(result)
    assert re.fullmatch("[0-9a-f]{40}", result["commit"]), "results are measured on a clean tree"


def test_the_page_is_made_from_the_committed_results(tmp_path: Path) -> None:
    report(["--docs", str(tmp_path)])
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


def test_aims_are_judged() -> None:
    assert at_least("speed", 2, 2).met
    assert not at_least("speed", 2, 1.9).met
    assert at_most("time", 2, 2).met
    assert not at_most("time", 2, 2.1).met
    assert missed_for("speed", 2, "gpu").as_json() == {
        "aim": "speed", "target": 2, "value": None, "met": False, "needs": "gpu",
    }  # fmt: skip


def test_statistics_are_those_of_the_samples() -> None:
    assert percentile([1.0, 2.0, 3.0], 50) == 2
    interval = ratio_interval([2.0] * 9, [1.0] * 9, seed=0)
    assert tuple(interval) == (2.0, 2.0, 2.0)
    noisy = ratio_interval([1.0, 2.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0], seed=0)
    assert noisy.low <= noisy.value <= noisy.high
