"""Profiling runs: from a model and a text to a set and a report, killed and resumed, and what is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kvstore.cli import main
from kvstore.codecs.artefact import artefact_digest
from kvstore.errors import ConfigError, PipelineError
from kvstore.profile import ProfileSet, load_profiles
from kvstore.profiler import objectives
from kvstore.profiler.command import run_profile
from kvstore.profiler.journal import Journal
from kvstore.profiler.objectives import Bench, InfeasibleError, Outcome, Task, Trial
from kvstore.profiler.options import Options
from kvstore.profiler.run import Finished, stalled
from kvstore.profiler.space import Configuration, Space
from kvstore.profiler.text import deal, stretches, windows
from kvstore.profiler.workers import Workers

DEMO = Path(__file__).parent.parent / "kvstore" / "demo"
MODEL, TEXT = DEMO / "shakespeare-llama", DEMO / "prompt.txt"
SPACE = Space(4, 2, 64)
PLAIN = SPACE.configuration(
    {
        "quantiser": "nested",
        "transform": "hadamard",
        "prediction": "none",
        "levels": 2,
        "step": 0.0,
        "value_step": 24.0,
        "sinks": 0,
        "recent": 0,
        "coder": "rans",
    }
)
EXACT = SPACE.configuration({"quantiser": "exact", "coder": "exponent-ans"})


def options(out: Path, **change: Any) -> Options:
    small: dict[str, Any] = {
        "budget": 5,
        "buckets": (256,),
        "prompts": 1,
        "final_prompts": 2,
        "pool": 7,
        "fresh": 1,
        "profiles": 2,
        "calibrated": False,
        "jobs": 1,
    }
    return Options(model=MODEL, texts=(TEXT,), out=out, **small | change)


class Inline:
    """`Workers` in this process: starting others takes longer than all that they measure here."""

    jobs = 1

    def __init__(self, task: Task, _: int | None = None) -> None:
        self._bench = Bench(task)

    def measure(self, kind: str, configurations: Sequence[Configuration]) -> Iterator[tuple[Configuration, Any]]:
        for configuration in configurations:
            measured = self._bench.run_model if kind == "outcome" else self._bench.try_codec
            yield configuration, measured(configuration)

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Finished, Path]]:
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        # The run that is killed, below, has the real ones.
        patch.setattr("kvstore.profiler.run.Workers", Inline)
        yield run_profile(options(out)), out


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    from kvstore.calibration.model import Model

    model = Model(MODEL, dtype="float32")
    prompts = windows(stretches([TEXT], model, 256), (256,), 2, 0)
    return Bench(Task(MODEL, "cpu", tmp_path_factory.mktemp("none"), SPACE, prompts))


def test_a_run_ends_with_a_set_and_a_report(finished: tuple[Finished, Path]) -> None:
    done, out = finished
    found = load_profiles((out / "profiles.json").read_bytes())
    assert found == done.profiles
    assert 1 <= len(found.profiles) <= 2
    assert found.measured.model == "shakespeare-llama"
    assert (found.measured.texts, found.measured.device) == (("prompt.txt",), "cpu")
    assert found.measured.machine
    for profile in found.profiles:
        ratios = [level.ratio for level in profile.levels]
        assert ratios == sorted(ratios, reverse=True)
        assert all(level.quality["text-256"].prompts == 2 for level in profile.levels)
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 3
    assert all(profile.name in page for profile in found.profiles)
    assert "<script" not in page


def test_hypervolume_never_falls(finished: tuple[Finished, Path]) -> None:
    volumes = finished[0].found.volumes
    assert len(volumes) == 5
    assert volumes == sorted(volumes)
    assert volumes[-1] > volumes[0] > 0


def test_a_run_that_is_done_is_not_done_again(finished: tuple[Finished, Path]) -> None:
    done, out = finished
    before = (out / "journal.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="go on with --resume, or name another folder"):
        run_profile(options(out))
    again = run_profile(options(out, resume=True))
    assert (out / "journal.jsonl").read_bytes() == before
    assert again.configurations == done.configurations
    qualities = [[level.quality for level in profile.levels] for profile in again.profiles.profiles]
    assert qualities == [[level.quality for level in profile.levels] for profile in done.profiles.profiles]
    with pytest.raises(ConfigError, match=r"another run \(settings differs\)"):
        run_profile(options(out, resume=True, seed=1))


@pytest.mark.long
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvstore", "profile", "--model", str(MODEL), "--calibration", str(TEXT)]
    command += ["--out", str(tmp_path / "out"), "--budget", "3", "--buckets", "256", "--prompts", "1"]
    command += ["--final-prompts", "1", "--pool", "4", "--profiles", "2", "--no-calibrated", "--jobs", "1", "--json"]
    journal = tmp_path / "out" / "journal.jsonl"
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ends_s = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b'"outcome"') < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends_s
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with journal.open("ab") as stream:
        # What a kill in the middle of a write leaves.
        stream.write(b'{"kind":"trial","val')
    held = journal.read_bytes().count(b'"kind":"outcome"')
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=240, check=True)
    assert json.loads(result.stdout)["measured"] == 3
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    outcomes = [line["values"] for line in lines if line["kind"] == "outcome"]
    assert len(outcomes) == 3 >= held
    assert len({json.dumps(one, sort_keys=True) for one in outcomes}) == 3
    assert load_profiles((tmp_path / "out" / "profiles.json").read_bytes()).profiles


def test_levels_get_better_and_larger(bench: Bench) -> None:
    trial, outcome = bench.try_codec(PLAIN), bench.run_model(PLAIN)
    assert trial.ratio[0] > trial.ratio[1] > 1
    assert outcome.ratio == pytest.approx(trial.ratio, rel=0.1)
    for errors in (trial.weighted_error, trial.attention_error):
        assert errors[0] > 2 * errors[1] > 0
    assert outcome.kl_nats(0) > outcome.kl_nats(1) > 0
    assert outcome.standard_error(0) > 0
    # The weighted error is in nats, and of the right size where errors are small.
    assert 0.1 < outcome.kl_nats(1) / trial.weighted_error[1] < 10
    assert Outcome.read(json.loads(json.dumps(_plain(outcome)))) == outcome
    assert Trial.read(json.loads(json.dumps(_plain(trial)))) == trial


def test_what_loses_nothing_is_measured_as_that(bench: Bench) -> None:
    trial, outcome = bench.try_codec(EXACT), bench.run_model(EXACT)
    assert trial.ratio[0] > 1.2
    assert trial.weighted_error == trial.attention_error == (0.0,)
    assert outcome.kl_nats(0) == 0.0
    assert outcome.losses[0]["text-256"].agreement == 1.0


def _plain(value: Any) -> Any:
    from dataclasses import asdict

    return asdict(value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        PipelineError("values too large"),
    ],
)
def test_what_this_machine_cannot_run_is_infeasible(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(objectives, "encode_prompt_levels", fail)
    with pytest.raises(InfeasibleError):
        bench.run_model(PLAIN)
    with pytest.raises(InfeasibleError):
        bench.try_codec(PLAIN)


def test_other_errors_are_not_taken_for_infeasible(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(objectives, "encode_prompt_levels", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        bench.run_model(PLAIN)


class Deadly(Configuration):
    """Kills the process that measures it, as the system does where memory runs out."""

    @property
    def levels(self) -> int:
        if sys.argv[0] != "pytest" and os.environ.get("KVSTORE_TEST_PID") != str(os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        return 1


@pytest.mark.long
def test_a_process_that_is_killed_takes_nothing_with_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_TEST_PID", str(os.getpid()))
    deadly = Deadly({**PLAIN.values, "step": 48.0})
    with Workers(bench._task, 2) as workers:
        found = dict(workers.measure("trial", [PLAIN, deadly, EXACT]))
        assert isinstance(found[PLAIN], Trial)
        assert isinstance(found[EXACT], Trial)
        assert isinstance(found[deadly], InfeasibleError)
        assert "killed" in str(found[deadly])
        assert isinstance(dict(workers.measure("trial", [EXACT]))[EXACT], Trial)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"model": "tiny"}, resume=False) as journal:
        journal.append({"kind": "trial", "values": {"n": 1}})
        monkeypatch.setattr("kvstore.profiler.journal.os.fsync", _full)
        with pytest.raises(ConfigError, match=r"No space left on device; what was measured before is kept"):
            journal.append({"kind": "trial", "values": {"n": 2}})
    monkeypatch.undo()
    with Journal(path, {"model": "tiny"}, resume=True) as journal:
        assert [record["values"] for record in journal.of("trial")] == [{"n": 1}]
        journal.append({"kind": "trial", "values": {"n": 3}})
    assert len(path.read_text().splitlines()) == 3


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"kind":"run","model":"other"}\n', r"another run \(model differs\)"),
        (b'{"kind":"run","model":"tiny"}\nrubbish\n{"kind":"trial"}\n', "damaged behind record 1"),
        (b"rubbish\n{}\n", "damaged behind record 0"),
    ],
)
def test_a_journal_of_something_else_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        Journal(path, {"model": "tiny"}, resume=True)
    assert path.read_bytes() == data


def run_command(*arguments: str | Path) -> int:
    return main(["profile", *map(str, arguments)])


def test_bad_input_is_refused_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("To be, or not to be. " * 40)
    out: Sequence[str | Path] = ("--out", tmp_path / "out", "--no-calibrated")
    model: Sequence[str | Path] = ("--model", MODEL)
    cases: list[tuple[Sequence[str | Path], str]] = [
        ((*model, "--calibration", short), "give more text, or shorter buckets"),
        ((*model, "--calibration", tmp_path / "none.txt"), "cannot read"),
        ((*model, "--calibration", TEXT, "--buckets", "300"), "multiples of 256"),
        ((*model, "--calibration", TEXT, "--buckets", "2048"), "context has 2048: use shorter --buckets"),
        ((*model, "--calibration", TEXT, "--budget", "0"), "must be above zero"),
        (("--model", tmp_path, "--calibration", TEXT), "it has no config.json"),
    ]
    if not torch.cuda.is_available():
        cases.append(((*model, "--calibration", TEXT, "--device", "cuda"), "there is no CUDA device here"))
    for arguments, says in cases:
        assert run_command(*arguments, *out) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_cache_that_can_be_stored_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=128, vocab_size=1024)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    assert run_command("--model", folder, "--calibration", TEXT, "--out", tmp_path / "out") == 2
    assert "rotary embedding" in capsys.readouterr().err


def test_text_is_dealt_out_in_stretches_that_do_not_meet() -> None:
    from kvstore.calibration.model import Model

    found = stretches([TEXT], Model(MODEL), 128)
    assert all(len(ids) >= 128 for ids in found)
    parts = deal(found)
    assert sum(len(part) for part in parts) == len(found)
    assert len(parts[0]) > len(parts[1]) > 0 < len(parts[2])


def test_a_search_that_finds_nothing_more_ends() -> None:
    assert not stalled([1.0] * 14)
    assert stalled([1.0] * 15)
    assert not stalled([*[1.0] * 14, 1.1])


def test_the_set_is_of_what_the_artefacts_are(finished: tuple[Finished, Path]) -> None:
    done: ProfileSet = finished[0].profiles
    assert done.artefacts == tuple(finished[0].artefacts)
    assert all(artefact_digest(path.read_bytes()) == digest for digest, path in finished[0].artefacts.items())
