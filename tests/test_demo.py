"""The demo: the main job, on real input, through the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.cli import main


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore", "demo", "--repeats", "1", "--continuation", "16", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def test_a_second_process_goes_on_from_what_the_first_one_stored() -> None:
    done = demo("--tokens", "600", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {(row["pipeline"], row["level"]): row for row in report["rows"]}
    ladders = [(name, level) for name in ("ladder-packed", "ladder-repeats") for level in range(3)]
    assert list(rows) == [("raw", 0), *ladders]
    raw = rows["raw", 0]
    assert raw["identical"]
    assert raw["kl_nats"] == 0
    assert 0.99 < raw["ratio"] < 1
    ladder = [rows["ladder-packed", level] for level in range(3)]
    assert [round(row["ratio"], 1) for row in ladder] == [8.2, 4.5, 3.1]
    repeats = [rows["ladder-repeats", level] for level in range(3)]
    for packed, coded in zip(ladder, repeats, strict=True):
        assert coded["ratio"] > 1.3 * packed["ratio"]
    assert ladder[0]["kl_nats"] > ladder[1]["kl_nats"] > ladder[2]["kl_nats"] > 0
    assert (report["stored_tokens"], report["continuation_tokens"]) == (512, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no-such-folder"], "no model folder"),
        (["--tokens", "100"], "more than 256"),
        (["--tokens", "9000"], "use --tokens"),
        (["--text", "no-such-file"], "cannot read"),
        (["--text", "short.txt"], "tokens, 616 are needed"),
    ],
)
def test_what_the_demo_cannot_use_is_named(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("To be, or not to be")
    assert main(["demo", "--repeats", "1", "--continuation", "16", "--tokens", "600", *options]) == 2
    assert message in capsys.readouterr().err
