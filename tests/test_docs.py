"""The documentation is true: everything public is on its page, links lead somewhere, examples run."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvstore.answers import error_classes
from kvstore.backend import Outcome, Reason
from kvstore.backends.host import HostBackend
from kvstore.cli import main
from kvstore.client import Client
from kvstore.codecs import CALIBRATED, NAMED, Context
from kvstore.codecs.context import known_planes, written_planes
from kvstore.codecs.registry import STAGES
from kvstore.config import ServerConfig
from kvstore.layout import Rope, attention_layout
from kvstore.metrics import Metrics
from kvstore.server import create_app, running_server
from kvstore.tiers import TieredBackend

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def test_every_setting_is_documented() -> None:
    rows = page("configuration")
    for field in dataclasses.fields(ServerConfig):
        name = {"memory_bytes": "memory", "disk_bytes": "disk", "gpu_bytes": "gpu"}.get(field.name, field.name)
        assert f"| `{name}` |" in rows, name
        if name != "tenants":
            assert f"`KVSTORE_{name.upper()}`" in rows


def test_every_flag_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    flags = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out)) - {"--help", "--json", "--config"}
    assert all(f"`{flag}`" in page("configuration") for flag in flags)


def test_every_route_is_documented() -> None:
    async def backend() -> TieredBackend:
        return TieredBackend([HostBackend(1 << 20)])

    app = create_app(backend, ServerConfig(), Metrics())
    for route in app.router.routes():
        assert route.resource is not None
        assert route.resource.canonical in page("http"), route


def test_every_error_code_reason_and_outcome_is_documented() -> None:
    words = [*error_classes(), *(reason.value for reason in Reason), *(outcome.value for outcome in Outcome)]
    missing = [word for word in words if f"`{word}`" not in page("http") and word != Outcome.FAILED.value]
    assert missing == []


def test_every_metric_is_documented() -> None:
    for family in Metrics().registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name}`" in page("metrics")


@pytest.mark.parametrize(
    ("command", "name"), [("inspect", "format"), ("calibrate", "calibration"), ("profile", "profiler"), ("demo", None)]
)
def test_every_flag_of_a_command_is_documented(
    command: str, name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    flags = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out)) - {"--help"}
    text = page(name) if name else (ROOT / "README.md").read_text()
    missing = [flag for flag in flags if not re.search(rf"`[^`]*{flag}\b[^`]*`", text)]
    assert missing == []


def test_every_stage_and_pipeline_is_documented() -> None:
    assert all(f"| `{name}` |" in page("codecs") for name in (*STAGES, *NAMED, *CALIBRATED))


def test_every_option_of_a_stage_is_in_its_row_with_its_default() -> None:
    rows = page("codecs").splitlines()
    for name, stage in STAGES.items():
        [row, *_] = [line.split("|")[2] for line in rows if line.startswith(f"| `{name}` |")]
        for option in dataclasses.fields(stage):
            words = {"data": "", "artefact": "`artefact`", "planes": "`planes` (all"}
            default = json.dumps(list(option.default) if option.default == () else option.default, default=str)
            assert words.get(option.name, f"`{option.name}` ({default}") in row, (name, option.name, default)


def test_the_stages_of_a_named_pipeline_are_in_its_row() -> None:
    rows = page("codecs").splitlines()
    made = {name: make("0" * 64) for name, make in CALIBRATED.items()}
    for name, spec in {**NAMED, **made}.items():
        [row] = [line for line in rows if line.startswith(f"| `{name}` |") and "`raw`" in line.split("|")[2]]
        assert all(f"`{stage['stage']}`" in row for stage in spec), name


def test_every_context_plane_is_documented() -> None:
    layout = attention_layout("m", "r", layers=1, kv_heads=1, head_dim=8, chunk_tokens=4, rope=Rope(10000.0, 8))
    context = Context(importance=torch.ones(1, 4), token_ids=[1, 2, 3, 4])
    for name in (*known_planes(layout, 0, context.token_ids), *written_planes(context)):
        assert f"`{name}`" in page("codecs"), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


async def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    async with running_server(ServerConfig(port=0, data_dir=tmp_path)) as url:
        code = code.replace("http://127.0.0.1:8420", url)
        import asyncio

        done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "1024 tokens" in done.stdout
        async with Client(url) as client:
            assert (await client.match([])).miss is None


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme
