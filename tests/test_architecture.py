"""What must stay true of the code as a whole."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "kvstore").rglob("*.py"))
HEAVY = {"torch", "numpy", "triton", "transformers", "boto3", "redis", "botorch", "vllm", "lmcache"}


@pytest.mark.parametrize(
    "module", ["kvstore.server", "kvstore.client", "kvstore.cli", "kvstore.tiers", "kvstore.testing"]
)
def test_a_storage_node_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    # The testing package is for tests, whose tools may bring numpy.
    assert not ({"torch"} if module == "kvstore.testing" else HEAVY) & set(loaded)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert max((_lines(function) for function in _functions(text)), default=0) <= 60


def test_the_median_function_is_short() -> None:
    lengths = [_lines(function) for path in MODULES for function in _functions(path.read_text())]
    assert statistics.median(lengths) <= 12


def test_no_module_shadows_the_standard_library() -> None:
    assert not {path.name for path in ROOT.iterdir() if path.is_dir()} & sys.stdlib_module_names


def _functions(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1
