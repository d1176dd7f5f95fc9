"""The repository's own rules: layers, symlinks, sizes, one version, no machine paths."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fuselora
from fuselora import functional

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
ENGINE = sorted((ROOT / "engine").rglob("*.py"))
PUBLIC = sorted((ROOT / "python/fuselora").glob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(source: str) -> Iterator[str]:
    """Absolute names of the modules that ``source`` imports anywhere; relative imports stay inside their layer."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            # "from fuselora import functional" imports fuselora.functional.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "fuselora" else [module]


def offences(layer: str, source: str) -> list[str]:
    """What ``source`` imports that its layer may not: imports point down only."""

    def allowed(name: str) -> bool:
        top, _, rest = name.partition(".")
        if top in ("kernels", "engine", "bench", "tests"):
            return False  # the importable names are fuselora.kernels and fuselora.engine
        if layer == "kernels":
            return top in ("torch", "triton") or top in sys.stdlib_module_names
        if layer == "engine" and top == "fuselora":
            return rest.partition(".")[0] in ("kernels", "engine")
        return True

    return [name for name in imported(source) if not allowed(name)]


def beyond_package(path: Path, source: str) -> list[str]:
    """Relative imports that climb out of the layer's folder."""
    depth = len(path.relative_to(ROOT).parts) - 1
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return [f"{'.' * node.level}{node.module or ''}" for node in nodes if node.level > depth]


@pytest.mark.parametrize("path", KERNELS + ENGINE + PUBLIC, ids=relative)
def test_imports_point_down(path):
    layer = path.relative_to(ROOT).parts[0]
    source = path.read_text()
    assert offences(layer, source) == []
    assert layer == "python" or beyond_package(path, source) == []


@pytest.mark.parametrize(
    "layer, source",
    [
        ("kernels", "import transformers.models"),
        ("kernels", "def f():\n    from peft import LoraConfig"),
        ("kernels", "from fuselora.engine import patch"),
        ("kernels", "import fuselora"),
        ("engine", "from fuselora import functional"),
        ("engine", "import fuselora.cli"),
        ("engine", "from engine import patch"),
        ("python", "from kernels import rms_norm"),
    ],
)
def test_the_layering_check_sees_an_offence(layer, source):
    assert offences(layer, source)


@pytest.mark.parametrize("name", ["kernels", "engine"])
def test_layers_are_symlinked_without_init(name):
    """An __init__.py here would shadow Hugging Face's ``kernels`` package whenever Python starts in the root."""
    link = ROOT / "python/fuselora" / name
    assert link.is_symlink()
    assert link.readlink() == Path("../..") / name
    assert not (ROOT / name / "__init__.py").exists()


def git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


in_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


@in_checkout
def test_symlinks_are_committed_as_such():
    modes = {line.split("\t")[1]: line.split()[0] for line in git("ls-files", "-s", "python/fuselora")}
    assert [modes.get(f"python/fuselora/{name}") for name in ("kernels", "engine")] == ["120000", "120000"]


def sources(*endings: str) -> list[Path]:
    tracked = (ROOT / name for name in git("ls-files") if name.endswith(endings))
    return [path for path in tracked if path.is_file() and not path.is_symlink()]


@in_checkout
def test_files_are_short():
    lengths = {
        relative(path): len(path.read_text().splitlines()) for path in sources(".py", ".cpp", ".cu", ".cuh", ".h")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


@in_checkout
def test_functions_are_short():
    long = {}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{relative(path)}:{node.name}"] = lines
    assert long == {}


# Where someone's machine keeps things; written in parts so that this file passes its own check.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:" + "|".join(("home", "root", "work", "Users", "mnt", "opt")) + r")/[\w.]+"
)


@in_checkout
def test_no_machine_paths():
    found = {}
    for path in sources(".py", ".cpp", ".cu", ".h", ".md", ".yaml", ".toml", ".txt", ".json", "Makefile", "run"):
        hits = MACHINE_PATH.findall(path.read_text(errors="replace"))
        if hits and path.name != "LICENSE":
            found[relative(path)] = hits
    assert found == {}


def test_public_functions_are_annotated():
    public = {name: getattr(fuselora, name) for name in fuselora.__all__} | vars(functional)
    bare = []
    for name, value in public.items():
        if inspect.isfunction(value) and value.__module__.startswith("fuselora."):
            signature = inspect.signature(value)
            annotations = [p.annotation for p in signature.parameters.values()] + [signature.return_annotation]
            bare += [name] if inspect.Signature.empty in annotations else []
    assert bare == []


def test_version_has_one_source():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert "fuselora._version.__version__" in project
    assert not re.search(r"^version\s*=\s*[\"']", project, re.MULTILINE)
    assert importlib.metadata.version("fuselora") == fuselora.__version__


def test_changelog_describes_this_version():
    assert f"## {fuselora.__version__}" in (ROOT / "CHANGELOG.md").read_text()
