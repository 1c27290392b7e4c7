"""Prints the versions of packages in the environment that runs it, as a row of the matrix in docs/engines.md."""

import importlib.metadata
import platform
import sys


def main(names: list[str]) -> None:
    found = [f"{name.replace('_', '-')} {importlib.metadata.version(name)}" for name in names]
    print("| " + " | ".join([f"Python {platform.python_version()}", *found]) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
