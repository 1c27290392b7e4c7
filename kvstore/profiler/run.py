"""A profiling run: calibrate, try candidates, search with the model, measure what was found on text nobody chose on.

Everything that was found out is in the journal at once, so a run can be killed at any point and go on.
"""

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import kvstore
from kvstore.calibration.calibrate import calibrate_all
from kvstore.calibration.model import Model
from kvstore.calibration.settings import Settings
from kvstore.codecs.artefact import artefact_digest
from kvstore.codecs.ref.rope import is_known
from kvstore.errors import ConfigError
from kvstore.files import write_output
from kvstore.profile import ARTEFACTS, Level, Measured, Profile, ProfileSet, Quality
from kvstore.profiler.journal import Journal
from kvstore.profiler.objectives import InfeasibleError, Outcome, Task, Trial
from kvstore.profiler.options import Options
from kvstore.profiler.pareto import best_cover, front, point
from kvstore.profiler.prompts import CONTINUATION_TOKENS
from kvstore.profiler.search import Search, neighbours, points_of, start_pool
from kvstore.profiler.space import Configuration, Space
from kvstore.profiler.text import deal, stretches, windows
from kvstore.profiler.workers import Kind, Workers

_STALL_SHARE = 0.002
_STALL_RUNS = 14
_SEED_STEP = 1000
_SLOW_SHARE = 0.95
_BATCH = 2
"""Configurations for each process between two choices, which take as long as a measurement or two."""

log = logging.getLogger(__name__)

Watch = Callable[[str, int, int, str], None]
"""Told of progress: what is being done, how much of it is done, of how much, and what there is to say of it."""


@dataclass
class Found:
    """All that a run has found out so far.

    Args:
        trials: What the codec alone tells, by configuration.
        outcomes: What the model tells, by configuration, in the order in which it was measured.
        infeasible: Why a configuration cannot be run here.
        volumes: Hypervolume after each outcome.
        reference: What it counts from: ratio, decode seconds per GB, nats.
    """

    trials: dict[Configuration, Trial] = field(default_factory=dict)
    outcomes: dict[Configuration, Outcome] = field(default_factory=dict)
    infeasible: dict[Configuration, str] = field(default_factory=dict)
    volumes: list[float] = field(default_factory=list)
    reference: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Finished:
    """What a run ends with.

    Args:
        profiles: The set.
        found: All that was found out on the way.
        configurations: Of every profile, in their order.
        artefacts: Files of the artefacts that they need, by digest.
        took_s: Seconds of this session.
    """

    profiles: ProfileSet
    found: Found
    configurations: tuple[Configuration, ...]
    artefacts: Mapping[str, Path]
    took_s: float


class Run:
    """One run.

    Args:
        options: How.
        watch: Told of progress.

    Raises:
        ConfigError: Model, text or folder cannot be used.
    """

    def __init__(self, options: Options, watch: Watch) -> None:
        options.check()
        self._options = options
        self._watch = watch
        self._folder = options.out / ARTEFACTS
        self._began_s = time.monotonic()
        watch("loading the model", 0, 0, "")
        self._model = Model(options.model, dtype="float32", device=options.device)
        self._layout = self._model.layout_of([0, 1])
        if self._layout.rope is None or not is_known(self._layout.rope):
            raise ConfigError(
                "the model's configuration names no rotary embedding (rope_parameters) that this build knows; "
                "models without one cannot be profiled yet; 'raw', 'splitzip' and 'zstd' store their caches"
            )
        longest = max(options.buckets) + CONTINUATION_TOKENS
        if longest > self._model.positions:
            raise ConfigError(
                f"the longest bucket and the {CONTINUATION_TOKENS} tokens behind it are {longest} tokens, the model's "
                f"context has {self._model.positions}: use shorter --buckets"
            )
        heads, dim = self._layout.planes["k"].shape[2:]
        self.space = Space(self._layout.layers, heads, dim, calibrated=options.calibrated, token_ids=options.token_ids)
        self._parts = deal(stretches(options.texts, self._model, max(options.buckets) // 2))
        self._search_prompts = windows(self._parts[1], options.buckets, options.prompts, options.seed)
        self._final_prompts = windows(self._parts[2], options.buckets, options.final_prompts, options.seed)

    def finish(self) -> Finished:
        """Do all that is left to do.

        Raises:
            ConfigError: The folder cannot be written to, or nothing can be measured.
        """
        options = self._options
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"cannot write to {options.out}: {exc}") from exc
        with Journal(options.out / "journal.jsonl", self._card(), resume=options.resume) as journal:
            self._calibrate()
            found = self._read(journal)
            with Workers(self._task(self._search_prompts), options.jobs) as workers:
                pool = start_pool(self.space, options.pool, options.seed)
                self._try(workers, journal, found, pool, shown=True)
                self._refer(journal, found)
                self._search(workers, journal, found)
            chosen = self._choose(found)
            finals = self._measure(journal, chosen)
        return self._finished(found, chosen, finals)

    def _card(self) -> dict[str, Any]:
        """What makes two runs the same one."""
        options = self._options
        left_out = ("model", "texts", "out", "resume", "jobs", "budget", "profiles")
        settings = {name: value for name, value in asdict(options).items() if name not in left_out}
        return {
            "kvstore": kvstore.__version__,
            "model": self._layout.model,
            "revision": self._layout.revision,
            "texts": [text.name for text in options.texts],
            "tokens": [sum(len(ids) for ids in part) for part in self._parts],
            "settings": settings,
        }

    def _task(self, prompts: Mapping[str, Sequence[tuple[int, ...]]]) -> Task:
        options = self._options
        return Task(options.model, options.device, self._folder, self.space, prompts)

    def _calibrate(self) -> None:
        """Make the artefacts that are not there yet."""
        options = self._options
        folder = self._folder
        bases = [basis for basis in self.space.bases if not (folder / basis.name).is_file()]
        if not bases:
            return
        ids = [token for part in self._parts[0] for token in part]
        fits = tuple(bucket for bucket in options.buckets if bucket <= 1024) or (min(options.buckets),)
        base = Settings(prompts=options.calibration_prompts, prefix_tokens=fits, seed=options.seed)
        names = [text.name for text in options.texts]
        made = calibrate_all(
            self._model,
            ids,
            names,
            [basis.settings(base) for basis in bases],
            lambda share: self._watch("calibrating", round(share * base.prompts), base.prompts, ""),
        )
        for basis, data in zip(bases, made, strict=True):
            write_output(folder / basis.name, data)

    def _read(self, journal: Journal) -> Found:
        """What an earlier session found out."""
        found = Found()
        for record in journal.records:
            kind = record["kind"]
            if kind == "reference":
                found.reference = (record["ratio"], record["decode_s_per_gb"], record["kl_nats"])
            if kind not in ("trial", "outcome", "infeasible"):
                continue
            configuration = self.space.configuration(record["values"])
            if kind == "trial":
                found.trials[configuration] = Trial.read(record["trial"])
            elif kind == "outcome":
                found.outcomes[configuration] = Outcome.read(record["outcome"])
                found.volumes.append(record["volume"])
            else:
                found.infeasible[configuration] = record["reason"]
        return found

    def _try(
        self, workers: Workers, journal: Journal, found: Found, wanted: Sequence[Configuration], *, shown: bool = False
    ) -> list[Configuration]:
        """Try configurations without the model; those that can be run."""
        known = found.trials.keys() | found.infeasible.keys()
        left = [configuration for configuration in wanted if configuration not in known]
        for number, (configuration, result) in enumerate(workers.measure("trial", left)):
            self._note(journal, found, "trial", configuration, result)
            if shown:
                self._watch("trying candidates", len(wanted) - len(left) + number + 1, len(wanted), "")
        return [configuration for configuration in wanted if configuration in found.trials]

    def _note(self, journal: Journal, found: Found, kind: Kind, configuration: Configuration, result: object) -> None:
        """Keep what came of one measurement."""
        values = dict(configuration.values)
        if isinstance(result, InfeasibleError):
            found.infeasible[configuration] = str(result)
            journal.append({"kind": "infeasible", "of": kind, "values": values, "reason": str(result)})
            log.warning("not feasible here: %s: %s", configuration.label, result)
        elif isinstance(result, Trial):
            found.trials[configuration] = result
            journal.append({"kind": "trial", "values": values, "trial": asdict(result)})

    def _refer(self, journal: Journal, found: Found) -> None:
        """Fix what hypervolume counts from: no compression, a slower decoder than most of the first candidates have."""
        if not found.trials:
            reasons = "; ".join(list(found.infeasible.values())[:2])
            raise ConfigError(f"no candidate can be run here: {reasons}")
        if next(journal.of("reference"), None) is None:
            # Not the slowest: one that waited for something else would set the scale of all.
            decode_s = sorted(max(trial.decode_s_per_gb) for trial in found.trials.values())
            found.reference = (1.0, decode_s[int(_SLOW_SHARE * (len(decode_s) - 1))], self._options.loss_max)
            ratio, decode, kl = found.reference
            journal.append({"kind": "reference", "ratio": ratio, "decode_s_per_gb": decode, "kl_nats": kl})

    def _search(self, workers: Workers, journal: Journal, found: Found) -> None:
        options = self._options
        search = Search(self.space, found.reference, options.seed)
        for configuration, trial in found.trials.items():
            if configuration not in found.infeasible:
                search.add(configuration, trial)
        for configuration, outcome in found.outcomes.items():
            search.tell(configuration, found.trials[configuration], outcome)
        while len(found.outcomes) < options.budget and search.candidates and not stalled(found.volumes):
            done = len(found.outcomes)
            if found.outcomes and options.fresh:
                near = neighbours(self.space, best(found), options.fresh, options.seed + _SEED_STEP * done)
                for configuration in self._try(workers, journal, found, near):
                    if configuration not in found.outcomes and configuration not in found.infeasible:
                        search.add(configuration, found.trials[configuration])
            self._say(found)
            batch = search.ask(min(_BATCH * workers.jobs, options.budget - done))
            if not batch:
                return
            for configuration, result in workers.measure("outcome", batch):
                self._note(journal, found, "outcome", configuration, result)
                if not isinstance(result, Outcome):
                    search.drop(configuration)
                    continue
                search.tell(configuration, found.trials[configuration], result)
                found.outcomes[configuration] = result
                found.volumes.append(search.volume)
                values, volume = dict(configuration.values), search.volume
                journal.append({"kind": "outcome", "values": values, "outcome": asdict(result), "volume": volume})
                self._say(found)

    def _say(self, found: Found) -> None:
        volume = f"hypervolume {found.volumes[-1]:.3f}" if found.volumes else ""
        self._watch("searching", len(found.outcomes), self._options.budget, volume)

    def _choose(self, found: Found) -> list[Configuration]:
        """The configurations whose levels cover the front best."""
        configurations = list(found.outcomes)
        groups = [points_of(found.trials[one], outcome) for one, outcome in found.outcomes.items()]
        reference = _reference_point(found)
        chosen = [configurations[number] for number, _ in best_cover(groups, reference, self._options.profiles)]
        if not chosen:
            raise ConfigError(
                f"nothing that was measured loses less than {self._options.loss_max} nats: raise --budget or --loss-max"
            )
        return chosen

    def _measure(self, journal: Journal, chosen: Sequence[Configuration]) -> dict[Configuration, tuple[Trial, Outcome]]:
        """Measure what was chosen on the prompts that had no part in choosing it."""
        trials: dict[Configuration, Trial] = {}
        outcomes: dict[Configuration, Outcome] = {}
        for record in journal.of("final"):
            configuration = self.space.configuration(record["values"])
            outcomes[configuration] = Outcome.read(record["outcome"])
        task = self._task(self._final_prompts)
        left = [configuration for configuration in chosen if configuration not in outcomes]
        with Workers(task, self._options.jobs) as workers:
            for configuration, result in workers.measure("outcome", left):
                if isinstance(result, Outcome):
                    outcomes[configuration] = result
                    values = dict(configuration.values)
                    journal.append({"kind": "final", "values": values, "outcome": asdict(result)})
                self._watch("measuring the profiles", len(outcomes), len(chosen), "")
        # Alone, so that the times are those of a machine that does nothing else.
        with Workers(task, 1) as workers:
            for number, (configuration, timed) in enumerate(workers.measure("times", chosen)):
                if isinstance(timed, Trial):
                    trials[configuration] = timed
                self._watch("timing the profiles", number + 1, len(chosen), "")
        return {one: (trials[one], outcomes[one]) for one in chosen if one in trials and one in outcomes}

    def _finished(
        self, found: Found, chosen: Sequence[Configuration], finals: Mapping[Configuration, tuple[Trial, Outcome]]
    ) -> Finished:
        options = self._options
        kept = [configuration for configuration in chosen if configuration in finals]
        if not kept:
            raise ConfigError("none of the profiles that were chosen could be measured again; the journal says why")
        kept.sort(key=lambda one: finals[one][1].ratio[0])
        profiles: list[Profile] = []
        artefacts: dict[str, Path] = {}
        for number, configuration in enumerate(kept):
            digest = ""
            if configuration.basis:
                file = self._folder / configuration.basis.name
                digest = artefact_digest(file.read_bytes())
                artefacts[digest] = file
            profiles.append(self._profile(f"p{number + 1:02d}", configuration, digest, *finals[configuration]))
        measured = Measured(
            model=self._layout.model,
            revision=self._layout.revision,
            texts=tuple(text.name for text in options.texts),
            device=options.device,
            machine=_machine(options.device),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            kvstore=kvstore.__version__,
            seed=options.seed,
        )
        ratio, decode, kl = found.reference
        details = {
            "reference": {"ratio": ratio, "decode_s_per_gb": decode, "kl_nats": kl},
            "hypervolume": found.volumes[-1] if found.volumes else 0.0,
            "tried": len(found.trials),
            "measured": len(found.outcomes),
            "infeasible": len(found.infeasible),
            "continuation_tokens": CONTINUATION_TOKENS,
        }
        took_s = time.monotonic() - self._began_s
        return Finished(ProfileSet(measured, tuple(profiles), details), found, tuple(kept), artefacts, took_s)

    def _profile(
        self, number: str, configuration: Configuration, digest: str, trial: Trial, outcome: Outcome
    ) -> Profile:
        levels = tuple(
            Level(
                ratio,
                trial.decode_s_per_gb[level],
                {
                    bucket: Quality(**asdict(loss), prompts=self._options.final_prompts)
                    for bucket, loss in outcome.losses[level].items()
                },
            )
            for level, ratio in enumerate(outcome.ratio)
        )
        pipeline = self.space.pipeline(configuration, digest)
        name = f"{number}-{configuration.values.get('transform', configuration.values['quantiser'])}"
        return Profile(name, pipeline, (digest,) if digest else (), trial.encode_s_per_gb, levels)


def stalled(volumes: Sequence[float]) -> bool:
    """Whether hypervolume has hardly grown for a while."""
    if len(volumes) <= _STALL_RUNS:
        return False
    return volumes[-1] <= volumes[-1 - _STALL_RUNS] * (1 + _STALL_SHARE)


def best(found: Found) -> list[Configuration]:
    """Measured configurations with a level on the front."""
    groups = [points_of(found.trials[one], outcome) for one, outcome in found.outcomes.items()]
    owners = [one for one, group in zip(found.outcomes, groups, strict=True) for _ in group]
    held = front(torch.cat(groups)).tolist()
    return list(dict.fromkeys(owner for owner, on_front in zip(owners, held, strict=True) if on_front))


def _reference_point(found: Found) -> torch.Tensor:
    return torch.tensor(point(*found.reference), dtype=torch.float64)


def _machine(device: str) -> str:
    """Name of the processor or accelerator."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
