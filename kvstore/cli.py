"""The `kvstore` command."""

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import kvstore
from kvstore.config import load_config, parse_size
from kvstore.errors import ConfigError, KVStoreError


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
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="TCP port, 0 for a free one (8420)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="directory of the disk tier (kvstore-data)")
    parser.add_argument("--memory", type=_size, metavar="SIZE", help="budget of the memory tier (2GiB)")
    parser.add_argument("--disk", type=_size, metavar="SIZE", help="budget of the disk tier, 0 for none (20GiB)")
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


def _serve(args: argparse.Namespace) -> int:
    from kvstore.server import serve

    flags = {
        "host": args.host,
        "port": args.port,
        "data_dir": args.data_dir,
        "memory_bytes": args.memory,
        "disk_bytes": args.disk,
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


def _size(text: str) -> int:
    try:
        return parse_size(int(text) if text.isdigit() else text)
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
