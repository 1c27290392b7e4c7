"""The `kvstore` command."""

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import kvstore
from kvstore.config import load_config, parse_size
from kvstore.errors import ConfigError, KVStoreError

if TYPE_CHECKING:
    from rich.console import RenderableType

_POLICIES = "recorded, expected, model, best-static, or static:ARM; may be given more than once (the first four)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit status: 0, or 2 where the settings cannot be used.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return int(args.run(args))
    except ConfigError as exc:
        print(f"kvstore: {exc}", file=sys.stderr)
        return 2
    except KVStoreError as exc:
        print(f"kvstore: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvstore", description="An adaptive storage tier for the KV caches of large language models."
    )
    parser.add_argument("--version", action="version", version=f"kvstore {kvstore.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="run a server"))
    _add_demo(commands.add_parser("demo", help="store, fetch and reuse a real model's KV cache"))
    _add_calibrate(commands.add_parser("calibrate", help="measure a model on text, for the pipelines that need it"))
    _add_profile(commands.add_parser("profile", help="find the compression profiles of a model, from text"))
    _add_profiles(commands.add_parser("profiles", help="list, show and push sets of profiles"))
    _add_decisions(commands.add_parser("decisions", help="explain and replay what a server has planned"))
    _add_inspect(commands.add_parser("inspect", help="show and verify a frame or a calibration artefact"))
    _add_fsck(commands.add_parser("fsck", help="verify the disk tier of a server that does not run, and mend it"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="TCP port, 0 for a free one (8420)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="directory of the disk tier (kvstore-data)")
    parser.add_argument("--memory", type=_size, metavar="SIZE", help="budget of the memory tier (2GiB)")
    parser.add_argument("--disk", type=_size, metavar="SIZE", help="budget of the disk tier, 0 for none (20GiB)")
    parser.add_argument("--gpu", type=_size, metavar="SIZE", help="budget of the GPU tier (0, none)")
    parser.add_argument("--s3-bucket", metavar="NAME", help="bucket of the S3 tier (none)")
    parser.add_argument("--s3-endpoint", metavar="URL", help="URL of the S3 service (Amazon's)")
    parser.add_argument("--token", help="bearer token that every data request must carry")
    parser.add_argument("--insecure", action="store_true", default=None, help="listen on any address without a token")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with these and further settings")
    parser.add_argument("--json", action="store_true", help="announce the URL as JSON")
    parser.set_defaults(run=_serve)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="PATH", help="folder of a Hugging Face causal LM")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text whose beginning is the shared prompt")
    parser.add_argument("--tokens", type=int, default=1800, help="length of the shared prompt (%(default)s)")
    parser.add_argument("--continuation", type=int, default=64, help="tokens behind it (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed repetitions (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=_demo)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="PATH", required=True, help="folder of a Hugging Face causal LM")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", action="append", required=True, help="text of the kind that will be served"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="where to write the artefact")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--prompts", type=int, metavar="N", help="number of prompts (64)")
    parser.add_argument(
        "--prefix-tokens", type=int, metavar="N", nargs="+", help="lengths that prompts take turns in (256 512 1024)"
    )
    parser.add_argument("--group-layers", type=int, metavar="N", help="layers that a basis spans (1)")
    parser.add_argument("--span", choices=("heads", "head"), help="a basis over all heads, or one for each (heads)")
    parser.add_argument("--joint", action=argparse.BooleanOptionalAction, help="one basis for K and V (yes)")
    parser.add_argument("--window", type=int, metavar="N", help="tokens that predict K and V, 0 for none (2)")
    parser.add_argument("--metric", choices=("fisher", "power", "none"), help="what an error costs (fisher)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of all that is drawn (0)")
    parser.add_argument("--json", action="store_true", help="print the artefact's card as JSON")
    parser.set_defaults(run=_calibrate)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="PATH", required=True, help="folder of a Hugging Face causal LM")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        action="append",
        required=True,
        help="text of the kind that will be served; parts of it calibrate, are searched on and measure",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (profiles-MODEL)")
    parser.add_argument("--budget", type=int, metavar="N", help="configurations to measure with the model (32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to compute and to time on (cpu)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (one a core, or one on a GPU)")
    parser.add_argument("--buckets", type=int, metavar="N", nargs="+", help="prompt lengths, tokens (256 512 1536)")
    parser.add_argument("--prompts", type=int, metavar="N", help="prompts of each length to search on (10)")
    parser.add_argument("--final-prompts", type=int, metavar="N", help="and to measure the profiles on (64)")
    parser.add_argument("--pool", type=int, metavar="N", help="candidates to try without the model (256)")
    parser.add_argument("--profiles", type=int, metavar="N", help="profiles to keep at most (10)")
    parser.add_argument("--loss-max", type=float, metavar="NATS", help="largest quality loss of interest (0.3)")
    parser.add_argument(
        "--no-calibrated", dest="calibrated", action="store_false", help="only strategies that need no calibration"
    )
    parser.add_argument(
        "--no-token-ids", dest="token_ids", action="store_false", help="readers will not know the token ids"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of all that is drawn (0)")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.set_defaults(run=_profile)


def _add_profiles(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    listing = verbs.add_parser("list", help="say in a line each what sets there are")
    listing.add_argument("sets", type=Path, metavar="SET", nargs="*", help="files or folders (all that are here)")
    listing.set_defaults(run=_list_profiles)
    showing = verbs.add_parser("show", help="show the profiles of a set")
    showing.add_argument("set", type=Path, metavar="SET", help="a file, the folder of a run, or 'default'")
    showing.set_defaults(run=_show_profiles)
    pushing = verbs.add_parser("push", help="give a server the profiles of a namespace")
    pushing.add_argument("set", type=Path, metavar="SET", help="a file, the folder of a run, or 'default'")
    pushing.add_argument("--url", default="http://127.0.0.1:8420", help="the server (%(default)s)")
    pushing.add_argument("--namespace", metavar="HEX", required=True, help="32 digits, as 'kvstore inspect' shows them")
    pushing.add_argument("--token", help="bearer token (KVSTORE_TOKEN)")
    pushing.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for each file (%(default)s)")
    pushing.set_defaults(run=_push_profiles)
    for verb in (listing, showing, pushing):
        verb.add_argument("--json", action="store_true", help="print JSON")


def _add_decisions(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    explaining = verbs.add_parser("explain", help="say what a plan was chosen from, and why")
    explaining.add_argument("id", metavar="ID", help="16 digits, as the plan names them")
    default = os.environ.get("KVSTORE_DECISION_LOG")
    explaining.add_argument(
        "--log", type=Path, required=default is None, default=default, help="the server's decision_log"
    )
    explaining.set_defaults(run=_explain_decision)
    replaying = verbs.add_parser("replay", help="say what other policies would have lost on the same plans")
    replaying.add_argument("log", type=Path, metavar="LOG", help="the server's decision_log")
    replaying.add_argument("--policy", action="append", metavar="NAME", help=_POLICIES, dest="policies")
    replaying.set_defaults(run=_replay_decisions)
    for verb in (explaining, replaying):
        verb.add_argument("--json", action="store_true", help="print JSON")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a frame, or an artefact of 'kvstore calibrate'")
    parser.add_argument("--segments", action="store_true", help="list the segments of a frame too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _add_fsck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="data directory of the server (kvstore-data)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the settings of the server")
    parser.add_argument("--dry-run", action="store_true", help="change nothing; exit status 1 where damage was found")
    parser.add_argument(
        "--s3", action="store_true", help="read and verify the bucket too; a server may use it meanwhile"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_fsck)


def _serve(args: argparse.Namespace) -> int:
    from kvstore.server import serve

    flags = {
        "host": args.host,
        "port": args.port,
        "data_dir": args.data_dir,
        "memory_bytes": args.memory,
        "disk_bytes": args.disk,
        "gpu_bytes": args.gpu,
        "s3_bucket": args.s3_bucket,
        "s3_endpoint": args.s3_endpoint,
        "token": args.token,
        "insecure": args.insecure,
    }
    config = load_config(flags, os.environ, args.config)

    def announce(url: str) -> None:
        print(json.dumps({"listening": url}) if args.json else f"listening on {url}", flush=True)

    asyncio.run(serve(config, announce))
    return 0


def _demo(args: argparse.Namespace) -> int:
    try:
        from kvstore.demo import run_demo
    except ImportError as exc:
        raise ConfigError(f"the demo needs torch and transformers: pip install 'kvstore[demo]' ({exc})") from exc
    status: int = run_demo(
        model=args.model,
        text=args.text,
        prompt_tokens=args.tokens,
        continuation_tokens=args.continuation,
        repeats=args.repeats,
        as_json=args.json,
    )
    return status


def _calibrate(args: argparse.Namespace) -> int:
    try:
        from kvstore.calibration.command import run_calibration
        from kvstore.calibration.settings import Settings
        from kvstore.inspection import artefact_table
    except ImportError as exc:
        extra = "pip install 'kvstore[calibrate]'"
        raise ConfigError(f"calibration needs torch and transformers: {extra} ({exc})") from exc
    # A basis for each head can span neither K and V together nor several layers.
    chosen = {
        "joint": args.span != "head" if args.joint is None else args.joint,
        "window": 2,
        **{name: value for name in _CALIBRATION if (value := getattr(args, name)) is not None},
    }
    if args.prefix_tokens is not None:
        chosen["prefix_tokens"] = tuple(args.prefix_tokens)
    settings = Settings(**chosen)
    report = run_calibration(model=args.model, texts=args.text, out=args.out, settings=settings, force=args.force)
    _show(args, report, lambda: [artefact_table(report)])
    return 0


_CALIBRATION = ("prompts", "group_layers", "span", "window", "metric", "seed")


def _profile(args: argparse.Namespace) -> int:
    try:
        from kvstore.profile_sets import set_table
        from kvstore.profiler.command import run_profile, summary
        from kvstore.profiler.options import Options
    except ImportError as exc:
        extra = "pip install 'kvstore[profiler]'"
        raise ConfigError(f"profiling needs torch, transformers, botorch and matplotlib: {extra} ({exc})") from exc
    chosen = {name: value for name in _PROFILE if (value := getattr(args, name)) is not None}
    if args.buckets is not None:
        chosen["buckets"] = tuple(args.buckets)
    out = args.out or Path(f"profiles-{args.model.resolve().name}")
    options = Options(model=args.model, texts=tuple(args.calibration), out=out, **chosen)
    try:
        finished = run_profile(options)
    except KeyboardInterrupt:
        print(f"kvstore: interrupted; what was measured is kept, go on with --resume --out {out}", file=sys.stderr)
        return 130
    report = summary(finished, options)
    where = f"profiles: {report['profiles']}\nreport:   {report['report']}"
    _show(args, report, lambda: [set_table(finished.profiles), where])
    return 0


_PROFILE = (
    "budget",
    "device",
    "resume",
    "jobs",
    "prompts",
    "final_prompts",
    "pool",
    "profiles",
    "loss_max",
    "calibrated",
    "token_ids",
    "seed",
)


def _list_profiles(args: argparse.Namespace) -> int:
    from kvstore.profile_sets import list_sets, list_table

    rows = list_sets(args.sets)
    _show(args, rows, lambda: [list_table(rows)])
    return 0


def _show_profiles(args: argparse.Namespace) -> int:
    from kvstore.profile import profiles_json
    from kvstore.profile_sets import read_set, set_table

    found = read_set(args.set)
    _show(args, profiles_json(found), lambda: [set_table(found)])
    return 0


def _push_profiles(args: argparse.Namespace) -> int:
    from kvstore.profile_sets import push_set

    token = args.token or os.environ.get("KVSTORE_TOKEN")
    report = asyncio.run(
        push_set(args.set, url=args.url, namespace=args.namespace, token=token, timeout_s=args.timeout)
    )
    said = f"{report['profiles']} profiles and {report['artefacts']} artefacts pushed for {report['namespace']}"
    _show(args, report, lambda: [said])
    return 0


def _explain_decision(args: argparse.Namespace) -> int:
    from kvstore.hindsight import explain, explain_table

    found = explain(args.log, args.id)
    _show(args, found, lambda: [explain_table(found)])
    return 0


def _replay_decisions(args: argparse.Namespace) -> int:
    from kvstore.hindsight import replay_all, replay_table

    found = replay_all(args.log, args.policies or ())
    _show(args, found, lambda: [replay_table(found)])
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from kvstore.inspection import inspect_file, tables

    report = inspect_file(args.file, segments=args.segments)
    _show(args, report, lambda: tables(report))
    return 0


def _fsck(args: argparse.Namespace) -> int:
    from kvstore.fsck import exit_status, run_fsck, run_s3_fsck, tables

    config = load_config({"data_dir": args.data_dir}, os.environ, args.config)
    if args.s3 and args.dry_run:
        raise ConfigError("--s3 cannot be a dry run: the tier puts damage into quarantine as it reads it")
    reports = [run_fsck(config.data_dir, dry_run=args.dry_run)]
    if args.s3:
        reports.append(asyncio.run(run_s3_fsck(config)))
    found = reports[0] | ({"s3": reports[1]} if args.s3 else {})
    _show(args, found, lambda: [table for report in reports for table in tables(report)])
    return exit_status(*reports)


def _show(args: argparse.Namespace, found: object, shown: Callable[[], Iterable["RenderableType"]]) -> None:
    """Print what was found: as JSON where that is asked for, else as people read it."""
    if args.json:
        print(json.dumps(found))
        return
    from rich.console import Console

    console = Console()
    for one in shown():
        if isinstance(one, str):
            # Not by the console, which would break a path at the end of a line.
            print(one)
        else:
            console.print(one)


def _size(text: str) -> int:
    try:
        return parse_size(int(text) if text.isdigit() else text)
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
