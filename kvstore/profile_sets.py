"""Sets of profiles on disk: the ones that ship with kvstore, and `kvstore profiles list|show|push`."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvstore.client import Client
from kvstore.errors import ConfigError, ProfileError
from kvstore.keys import NAMESPACE_BYTES, parse_hex
from kvstore.profile import ARTEFACTS, SET_BYTES_MAX, SET_FILE, ProfileSet, load_profiles

DEFAULT = "default"
"""Name of the set for models that nobody profiled; nothing in it needs calibration."""
_DEFAULT_FILE = Path(__file__).parent / "default_profiles.json"


def read_set(path: Path) -> ProfileSet:
    """A set from its file, from the folder of a run of `kvstore profile`, or by the name `default`.

    Raises:
        ConfigError: There is no such file, or it is no set.
    """
    file = set_file(path)
    try:
        with file.open("rb") as stream:
            return load_profiles(stream.read(SET_BYTES_MAX + 1))
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror or exc}") from exc
    except ProfileError as exc:
        raise ConfigError(f"{file} is no set of profiles: {exc}") from exc


def set_file(path: Path) -> Path:
    """Where a set is that is named on the command line."""
    if str(path) == DEFAULT and not path.exists():
        return _DEFAULT_FILE
    return path / SET_FILE if path.is_dir() else path


def list_sets(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """What there is to say of sets in a line each: of those named, or of the default and those in folders here."""
    named = list(paths) or [Path(DEFAULT), *sorted(file.parent for file in Path().glob(f"*/{SET_FILE}"))]
    found = []
    for path in named:
        held = read_set(path)
        levels = [level for profile in held.profiles for level in profile.levels]
        found.append(
            {
                "set": str(path),
                "model": held.measured.model,
                "device": held.measured.device,
                "date": held.measured.date,
                "profiles": len(held.profiles),
                "levels": len(levels),
                "ratio_max": max(level.ratio for level in levels),
                "artefacts": len(held.artefacts),
            }
        )
    return found


def list_table(rows: Iterable[dict[str, Any]]) -> Table:
    """The same for people."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("set", "model", "device", "date", "profiles", "levels", "ratio to"):
        table.add_column(name, overflow="fold")
    for row in rows:
        numbers = (str(row["profiles"]), str(row["levels"]), f"{row['ratio_max']:.1f}")
        table.add_row(row["set"], row["model"], row["device"], row["date"][:10], *numbers)
    return table


def set_table(found: ProfileSet) -> Table:
    """A set for people: a row for every level."""
    measured = found.measured
    table = Table(
        title=f"{measured.model} on {measured.device} ({measured.machine}), {measured.date[:10]}",
        caption=f"Seconds for a GB of exact cache; quality loss in nats, mean and worst of the prompt lengths, "
        f"on {', '.join(measured.texts)}.",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in ("profile", "level", "ratio", "encode", "decode", "loss", "worst", "at"):
        table.add_column(name, justify="left" if name in ("profile", "at") else "right", no_wrap=True)
    for profile in found.profiles:
        for number, level in enumerate(profile.levels):
            losses = {bucket: quality.kl_nats for bucket, quality in level.quality.items()}
            worst = max(losses, key=lambda bucket: losses[bucket])
            table.add_row(
                profile.name if number == 0 else "",
                str(number),
                f"{level.ratio:.2f}",
                f"{profile.encode_s_per_gb:.2f}" if number == 0 else "",
                f"{level.decode_s_per_gb:.2f}",
                f"{sum(losses.values()) / len(losses):.2g}",
                f"{losses[worst]:.2g}",
                worst,
            )
    return table


def read_artefacts(path: Path, found: ProfileSet) -> dict[str, bytes]:
    """The calibration artefacts that a set needs, by digest, from the folder `artefacts` beside its file.

    Raises:
        ConfigError: One of them is not there.
    """
    folder = set_file(path).parent / ARTEFACTS
    held: dict[str, bytes] = {}
    for file in sorted(folder.iterdir()) if found.artefacts and folder.is_dir() else ():
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest in found.artefacts:
            held[digest] = data
    missing = [digest for digest in found.artefacts if digest not in held]
    if missing:
        raise ConfigError(f"{folder} lacks the calibration artefact {missing[0]}, which a profile needs")
    return held


async def push_set(path: Path, *, url: str, namespace: str, token: str | None, timeout_s: float) -> dict[str, Any]:
    """Give a server the profiles of a namespace.

    Raises:
        ConfigError: The set or an artefact is not there.
        KVStoreError: The server does not take them.
    """
    found = read_set(path)
    artefacts = read_artefacts(path, found)
    key = parse_hex(namespace, NAMESPACE_BYTES, "namespace")
    async with Client(url, token=token, timeout_s=timeout_s) as client:
        await client.push_profiles(key, found, artefacts)
    return {"namespace": namespace, "profiles": len(found.profiles), "artefacts": len(artefacts)}
