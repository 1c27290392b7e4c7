"""Calibration: what an artefact holds, what frames are worth with it, and what the command refuses."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM as AutoModel
from transformers import DynamicCache, GPT2Config, MistralConfig, Phi3Config, PreTrainedConfig, T5Config

from kvstore.backends.host import HostBackend
from kvstore.calibration.calibrate import calibrate
from kvstore.calibration.fit import klt, metric_root
from kvstore.calibration.model import Model, planes_of
from kvstore.calibration.settings import Settings
from kvstore.cli import main
from kvstore.codecs import CALIBRATED, Planes, named_pipeline
from kvstore.codecs.artefact import artefact_digest, load_artefact
from kvstore.codecs.ref.nested import sigma_units
from kvstore.errors import ConfigError, PipelineError
from kvstore.inspection import artefact_report
from kvstore.layout import Layout
from kvstore.prefix import Prefix, get_prefix, put_prefix

DEMO = Path(__file__).parent.parent / "kvstore" / "demo"
FOLDER, TEXT = DEMO / "shakespeare-llama", (DEMO / "prompt.txt").read_text()
SMALL = Settings(prompts=2, prefix_tokens=(48,), continuation_tokens=8, repeats=1, token_dims=4, probes=8)
GOOD = Settings(prompts=12, prefix_tokens=(192,), continuation_tokens=48, repeats=2, joint=True, token_dims=48)
KINDS = {
    "plain": GOOD,
    "tokens": replace(GOOD, window=2),
    "groups": replace(SMALL, group_layers=3),
    "head": replace(SMALL, span="head", metric="power"),
    "none": replace(SMALL, metric="none"),
}


class Trial(NamedTuple):
    """A prompt that nothing was calibrated on: its cache, and what the model makes of it."""

    layout: Layout
    token_ids: list[int]
    tail_ids: list[int]
    planes: dict[str, torch.Tensor]
    exact: torch.Tensor


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The model is so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded() -> Model:
    return Model(FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT[:40_000])
    return path


@pytest.fixture(scope="module")
def artefacts(loaded: Model, text: Path) -> Mapping[str, bytes]:
    return {name: calibrate(loaded, [text], settings) for name, settings in KINDS.items()}


@pytest.fixture(scope="module")
def trial(loaded: Model) -> Trial:
    ids = loaded.tokenize(TEXT[40_000:])[: 256 + 64]
    cache = DynamicCache()
    loaded.forward(ids[:256], cache)
    planes = {name: x.clone() for name, x in planes_of(cache).items()}
    with torch.no_grad():
        exact = loaded.log_probabilities(planes, ids[256:])
    return Trial(loaded.layout(cache, 128), ids[:256], ids[256:], planes, exact)


def kl_nats(loaded: Model, trial: Trial, planes: Planes) -> float:
    with torch.no_grad():
        found = loaded.log_probabilities(planes, trial.tail_ids)
    return float((trial.exact.exp() * (trial.exact - found)).sum(-1).mean())


async def stored(trial: Trial, pipeline: str, artefact: bytes | None = None) -> list[Prefix]:
    """What comes back of a stored prompt, at every level."""
    known = {} if artefact is None else {artefact_digest(artefact): artefact}
    backend = HostBackend(1 << 24)
    made = named_pipeline(pipeline, known or None)
    await put_prefix(backend, trial.layout, trial.token_ids, trial.planes, made)
    found = [await get_prefix(backend, trial.layout, trial.token_ids, level=n, artefacts=known) for n in range(3)]
    assert all(prefix.tokens == 256 for prefix in found)
    return found


def relative_error(trial: Trial, prefix: Prefix) -> float:
    lost = sum(float((prefix.planes[name] - x).square().sum()) for name, x in trial.planes.items())
    return lost / sum(float(x.square().sum()) for x in trial.planes.values())


# What an artefact holds.


def test_the_same_seed_gives_the_same_artefact_but_its_date(loaded: Model, text: Path) -> None:
    settings = replace(SMALL, window=1, joint=True)
    first, again, other = (load_artefact(calibrate(loaded, [text], replace(settings, seed=seed))) for seed in (3, 3, 4))
    assert {**first.card, "date": 0} == {**again.card, "date": 0}
    assert first.tensors.keys() == again.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(x, again.tensors[name]) for name, x in first.tensors.items())
    assert not torch.equal(first.tensors["probes"], other.tensors["probes"])


def test_the_card_says_what_was_done(artefacts: Mapping[str, bytes], trial: Trial) -> None:
    card = load_artefact(artefacts["plain"]).card
    assert (card["model"], card["revision"]) == (trial.layout.model, trial.layout.revision)
    assert (card["texts"], card["prompts"], card["tokens"]) == (["calibration.txt"], 12, 12 * (192 + 48))
    assert (card["joint"], card["span"], card["window"], card["metric"], card["group_layers"]) == (
        *(True, "heads", 0, "fisher"),
        1,
    )
    assert {"date", "kvstore", "seed", "prefix_tokens", "continuation_tokens", "version"} <= card.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_inverse_to_each_other_and_sigmas_fall(kind: str, artefacts: Mapping[str, bytes]) -> None:
    tensors = load_artefact(artefacts[kind]).tensors
    names = [name for name in tensors if ".forward." in name]
    assert names
    for name in names:
        inverse, sigma = (tensors[name.replace("forward", what)] for what in ("inverse", "sigma"))
        product = tensors[name].double() @ inverse.double()
        assert torch.allclose(product, torch.eye(product.shape[-1]).double().expand_as(product), atol=2e-3)
        assert sigma.dtype == torch.int16
        assert (sigma[..., 1:] <= sigma[..., :-1]).all()


def test_shapes_follow_the_settings(artefacts: Mapping[str, bytes]) -> None:
    def shapes(kind: str) -> dict[str, list[int]]:
        return {name: list(x.shape) for name, x in load_artefact(artefacts[kind]).tensors.items()}

    assert shapes("plain")["kv.forward.3"] == [1, 256, 256]
    assert shapes("tokens")["v.predict.3"] == [2 * 48 + 1, 128]
    assert shapes("tokens")["tokens"] == [1024, 48]
    assert shapes("head")["k.inverse.2"] == [2, 64, 64]
    groups = shapes("groups")
    assert (groups["k.sigma.0"], groups["k.sigma.3"], "k.sigma.1" in groups) == ([1, 384], [1, 128], False)
    assert (groups["k.mean"], groups["v.spread"], groups["probes"]) == ([4, 2, 64], [4, 2], [4, 4, 8, 64])


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_finite_and_costs_something(kind: str, artefacts: Mapping[str, bytes]) -> None:
    tensors = load_artefact(artefacts[kind]).tensors
    assert all(bool(torch.isfinite(x.float()).all()) for x in tensors.values())
    assert all(bool((tensors[f"{name}.weight"] > 0).all()) for name in ("k", "v"))


def test_a_basis_decorrelates_in_its_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(5000, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double()
    covariance = mixed.T @ mixed / len(mixed)
    metric = torch.diag(torch.arange(1.0, 7.0).double())
    root = metric_root(metric, ridge=0.0)
    basis = klt(covariance, root)
    found = basis.forward.T @ covariance @ basis.forward
    assert torch.allclose(found, torch.diag(basis.sigma.square()), atol=1e-9)
    assert torch.allclose(basis.inverse @ metric @ basis.inverse.T, torch.eye(6).double(), atol=1e-9)
    assert torch.equal(sigma_units(torch.tensor([1.0, 3.0, 1 / 9])), torch.tensor([0, 80, -160], dtype=torch.int16))


# What frames are worth with it.


@pytest.mark.parametrize(("pipeline", "kind"), [("ladder-klt", "plain"), ("ladder-tokens", "tokens")])
async def test_a_calibrated_basis_is_far_better_than_none_at_fewer_bytes(
    pipeline: str, kind: str, loaded: Model, trial: Trial, artefacts: Mapping[str, bytes]
) -> None:
    plain = (await stored(trial, "ladder"))[0]
    levels = await stored(trial, pipeline, artefacts[kind])
    assert levels[1].size_bytes < 0.5 * plain.size_bytes
    assert kl_nats(loaded, trial, levels[1].planes) < 0.7 * kl_nats(loaded, trial, plain.planes)
    errors = [relative_error(trial, prefix) for prefix in levels]
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]
    assert [prefix.size_bytes for prefix in levels] == sorted(prefix.size_bytes for prefix in levels)


async def test_predicting_from_tokens_saves_bytes_at_the_same_step(
    loaded: Model, trial: Trial, artefacts: Mapping[str, bytes]
) -> None:
    plain = (await stored(trial, "ladder-klt", artefacts["plain"]))[2]
    predicted = (await stored(trial, "ladder-tokens", artefacts["tokens"]))[2]
    assert predicted.size_bytes < 0.85 * plain.size_bytes
    assert kl_nats(loaded, trial, predicted.planes) < 2 * kl_nats(loaded, trial, plain.planes)


@pytest.mark.parametrize("kind", KINDS)
async def test_every_pipeline_that_the_card_names_stores_and_fetches(
    kind: str, trial: Trial, artefacts: Mapping[str, bytes]
) -> None:
    names = artefact_report(memoryview(artefacts[kind]))["pipelines"]
    assert names
    for name in names:
        levels = await stored(trial, name, artefacts[kind])
        # A step for a metric of one's own is not that of the others.
        assert relative_error(trial, levels[2]) < 0.5, name


def test_every_calibrated_pipeline_has_an_artefact_that_names_it(artefacts: Mapping[str, bytes]) -> None:
    named = {name for data in artefacts.values() for name in artefact_report(memoryview(data))["pipelines"]}
    assert named == CALIBRATED.keys()


async def test_without_its_artefact_nothing_is_decoded(trial: Trial, artefacts: Mapping[str, bytes]) -> None:
    data = artefacts["plain"]
    backend = HostBackend(1 << 24)
    pipeline = named_pipeline("ladder-klt", {artefact_digest(data): data})
    await put_prefix(backend, trial.layout, trial.token_ids, trial.planes, pipeline)
    with pytest.raises(PipelineError, match=artefact_digest(data)):
        await get_prefix(backend, trial.layout, trial.token_ids)
    with pytest.raises(PipelineError, match="have the digest"):
        await get_prefix(backend, trial.layout, trial.token_ids, artefacts={artefact_digest(data): artefacts["tokens"]})


def test_the_python_example_of_the_page_runs(
    artefacts: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "calibration.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    Path("llama.safetensors").write_bytes(artefacts["tokens"])
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["pipeline"].artefacts == (artefact_digest(artefacts["tokens"]),)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_on_the_page_with_its_dtype(kind: str, artefacts: Mapping[str, bytes]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "codecs.md").read_text()
    for name, x in load_artefact(artefacts[kind]).tensors.items():
        row = "k" + re.sub(r"\.\d+$", ".LAYER", name).removeprefix("kv").lstrip("kv") if "." in name else name
        assert re.search(rf"\| `{re.escape(row)}` \| `\[.*\]` {str(x.dtype).removeprefix('torch.')} \|", page), row
    assert all(f"`{field}`" in page for field in load_artefact(artefacts[kind]).card)


# What cannot be.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": 0}, "at least one prompt"),
        ({"prefix_tokens": (64, 0)}, "at least one prompt"),
        ({"group_layers": 0}, "at least one prompt"),
        ({"probes": 0}, "at least one prompt"),
        ({"span": "head", "joint": True}, "span 'heads'"),
        ({"span": "head", "group_layers": 2}, "span 'heads'"),
        ({"window": 5}, "0 to 4 tokens"),
        ({"window": -1}, "0 to 4 tokens"),
        ({"prefix_tokens": (2048,)}, "context of 2048"),
        ({"prefix_tokens": (2000,)}, "give more text"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    changed: dict[str, Any], message: str, loaded: Model, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:2000])
    with pytest.raises(ConfigError, match=message):
        calibrate(loaded, [path], replace(SMALL, **changed))


def test_an_attention_without_output_projection_needs_another_metric(
    loaded: Model, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "attentions", [torch.nn.Identity()])
    with pytest.raises(ConfigError, match=r"Identity has no o_proj.*'fisher' or 'none'"):
        calibrate(loaded, [text], replace(SMALL, metric="power"))


def test_an_attention_that_is_elsewhere_is_named(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "_model", torch.nn.Identity())
    with pytest.raises(ConfigError, match=r"Identity is not in model\.layers"):
        _ = loaded.attentions


_TINY: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
_TINY |= {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 128, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(vocab_size=1024, n_embd=32, n_layer=1, n_head=2, n_positions=128), "no single rotary embedding"),
        (Phi3Config(**_TINY), "has no q_proj"),
        (T5Config(), "cannot load the model"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else "",
)
def test_a_model_of_another_kind_is_refused_by_name(
    config: PreTrainedConfig, message: str, text: Path, tmp_path: Path
) -> None:
    if isinstance(config, T5Config):
        config.save_pretrained(tmp_path)
    else:
        AutoModel.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    with pytest.raises(ConfigError, match=message) as found:
        calibrate(Model(tmp_path, dtype="float32"), [text], SMALL)
    assert len(str(found.value)) < 600


def test_a_sliding_window_is_no_obstacle_where_the_cache_keeps_every_token(text: Path, tmp_path: Path) -> None:
    config = MistralConfig(**_TINY, sliding_window=16)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    found = Model(tmp_path, dtype="float32")
    assert len(load_artefact(calibrate(found, [text], SMALL)).tensors) > 0
    cache = DynamicCache(config=found.config)
    found.forward(list(range(48)), cache)
    with pytest.raises(ConfigError, match="sliding windows"):
        planes_of(cache)


# The command.


@pytest.fixture
def flags(tmp_path: Path, text: Path) -> list[str]:
    out = ["--out", str(tmp_path / "out.safetensors")]
    return [*out, "--model", str(FOLDER), "--text", str(text), "--prompts", "1", "--prefix-tokens", "32"]


def test_the_command_writes_an_artefact_and_prints_its_card(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.safetensors"
    assert main(["calibrate", *flags, "--metric", "none", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["digest"] == artefact_digest(path.read_bytes())
    assert (report["path"], report["size_bytes"]) == (str(path), path.stat().st_size)
    assert report["pipelines"] == ["ladder-weighted", "ladder-tokens"]
    card = report["card"]
    assert (card["joint"], card["window"], card["group_layers"], card["prefix_tokens"]) == (True, 2, 1, [32])
    assert list(tmp_path.iterdir()) == [path], "no scratch file stays"
    assert main(["calibrate", *flags]) == 2, "what is there is not replaced"
    assert "--force" in capsys.readouterr().err
    options = ["--span", "head", "--window", "0", "--metric", "none", "--seed", "5", "--force"]
    assert main(["calibrate", *flags, *options]) == 0
    shown = capsys.readouterr().out
    for word in (artefact_digest(path.read_bytes()), "shakespeare-llama", "calibration.txt", "ladder-klt, kvtc"):
        assert word in shown, word
    assert main(["inspect", str(path)]) == 0
    assert "k.forward.LAYER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no-such-folder"], "no model folder"),
        (["--text", "no-such-text"], "cannot read no-such-text"),
        (["--text", str(FOLDER / "model.safetensors")], "cannot read"),
        (["--prompts", "0"], "at least one prompt"),
        (["--group-layers", "0"], "at least one prompt"),
        (["--prefix-tokens", "4000"], "context of 2048"),
        (["--window", "9"], "0 to 4"),
        (["--span", "head", "--joint"], "span 'heads'"),
        (["--span", "head", "--group-layers", "2"], "span 'heads'"),
        (["--out", "no-such-folder/x"], "no-such-folder is no directory"),
        (["--out", "."], "is a directory"),
    ],
)
def test_what_the_command_cannot_use_is_named(
    options: list[str], message: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *flags, *options]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True), err


@pytest.mark.parametrize("options", [["--metric", "other"], ["--prompts", "many"], ["--span", "layer"]])
def test_words_that_are_no_options_end_the_command(options: list[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["calibrate", *flags, *options])


def test_a_damaged_model_is_named(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    assert main(["calibrate", *flags, "--model", str(folder)]) == 2
    assert "cannot load the model" in capsys.readouterr().err


def test_nothing_is_left_where_writing_fails(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert main(["calibrate", *flags, "--metric", "none", "--window", "0"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_extras_are_named(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kvstore.calibration.command", None)
    assert main(["calibrate", *flags]) == 2
    assert "pip install 'kvstore[calibrate]'" in capsys.readouterr().err
