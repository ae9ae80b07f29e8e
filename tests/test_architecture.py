"""The floors: a file imports from its own floor or below, never in circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "influence"
FLOORS = [
    "types",
    "fold",
    "linalg",
    "model",
    "curvature",
    "attribution",
    "truth",
    "interpret",
    "runtime",
]
OUTSIDE = {"datasets", "faiss", "logging", "orbax", "pathlib", "random", "time"}
"""What only `runtime` may import: files, clocks, logs, stores."""

FILES = sorted(ROOT.rglob("*.py"))


def name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(x) for x in FILES}


def floor(module):
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 else len(FLOORS)


def imports(path):
    """Returns the modules a file imports; those of the package as modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {x if x in MODULES else node.module for x in whole}
    return found


GRAPH = {name(path): imports(path) for path in FILES}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_down(module):
    own = {x for x in GRAPH[module] if x.split(".")[0] == "influence"}
    if module != "influence":
        assert "influence" not in own, "imports the root from inside"
    assert all(floor(x) <= floor(module) for x in own), own


def test_there_are_no_circles():
    left = {k: {x for x in v if x in GRAPH} - {k} for k, v in GRAPH.items()}
    while leaves := [k for k, v in left.items() if not v & left.keys()]:
        for k in leaves:
            del left[k]
    assert not left


@pytest.mark.parametrize("module", [x for x in GRAPH if ".runtime" not in x])
def test_only_the_runtime_knows_files_clocks_and_logs(module):
    assert not {x.split(".")[0] for x in GRAPH[module]} & OUTSIDE


@pytest.mark.parametrize("module", [x for x in GRAPH if ".runtime" in x])
def test_the_runtime_has_no_mathematics(module):
    source = (ROOT.parent / (module.replace(".", "/") + ".py")).with_suffix("")
    path = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    assert "einsum" not in text
    assert "jax.grad" not in text


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_unpickled(path):
    text = path.read_text(encoding="utf-8")
    assert not {"pickle", "dill", "joblib", "torch"} & imports(path)
    assert "allow_pickle=True" not in text


def test_public_names_are_few():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    names = [
        x for node in tree.body if isinstance(node, ast.ImportFrom) for x in node.names
    ]
    assert len(names) <= 20
    assert all(x.asname == x.name for x in names)
