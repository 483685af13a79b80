"""The rules of the house: which room imports which, what an import changes, who knows the names of files."""

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vmapbn_flax
from tests.conftest import LONGEST

PACKAGE = Path(vmapbn_flax.__file__).parent
NAME = PACKAGE.name
ROOMS = ("cli", "sweeps", "runs", "multihost", "training", "data", "nn")  # each imports from those after it
GROUND = {"config", "defaults", "errors", "fields", "files", "networks", "signals"}  # modules, which every room may use
FILES = {"config.json", "metrics.jsonl", "summary.json", "accuracy.png", "sweep.json", "sweep.png", "refresh.json"}
FILES |= {"figure.png", "optuna.db"}


def dotted(path):
    """The name of the module at `path`."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


TREES = {dotted(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(nodes):
    """The names of what `nodes` import; of a module, where it is one of the package's, not of what is in it."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in TREES else node.module for name in inner)


# All imports of one another, those in functions too.
ARROWS = {
    module: {name for name in imports(ast.walk(tree)) if name.partition(".")[0] == NAME} - {module}
    for module, tree in TREES.items()
}


def room(module):
    """The room that a module is in, or the module itself where it is in none."""
    return module.split(".")[1] if "." in module else ""


def test_every_module_is_in_a_room():
    assert {room(module) for module in TREES} == {"", "__main__", *ROOMS, *GROUND}
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", *(f"{g}.py" for g in GROUND)}


def test_the_longest_tests_are_there():
    assert [name for name in LONGEST if not (Path(__file__).parent / name).exists()] == []


@pytest.mark.parametrize("name", ROOMS)
def test_imports_point_one_way(name):
    below = {name, *ROOMS[ROOMS.index(name) + 1 :], *GROUND}
    upwards = [
        f"{module} imports {other}"
        for module, others in ARROWS.items()
        for other in others
        if room(module) == name and room(other) not in below
    ]
    assert upwards == []


def test_the_ground_imports_no_room():
    found = {room(other) for module, others in ARROWS.items() if room(module) in GROUND for other in others}
    assert found <= GROUND


def test_no_modules_import_one_another():
    # But for the package itself, which has what people import.
    arrows = {module: others - {NAME} for module, others in ARROWS.items() if module != NAME}
    assert list(graphlib.TopologicalSorter(arrows).static_order())  # CycleError names them


def python(script, *arguments):
    """What a script prints, as JSON, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=100)
    return json.loads(done.stdout)


LOADED = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
names = ("vmapbn_flax", "jax", "flax", "numpy", "orbax", "matplotlib")
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in names]))
"""


LATER = (f"{NAME}.nn.convert", f"{NAME}.nn.nnx")  # imported by their names; flax.nnx takes a while to load


def test_the_layers_come_alone():
    modules = python(LOADED, f"{NAME}.nn")
    assert "flax.nnx" not in modules
    loaded = {name for name in modules if name.partition(".")[0] == NAME}
    later = {module for module in TREES if module.startswith(LATER)}
    assert loaded == {NAME} | {module for module in TREES if room(module) == "nn"} - later
    assert set().union(*(ARROWS[module] for module in later)) <= loaded | later


def test_the_package_is_light_until_it_is_used():
    assert python(LOADED, NAME) == [NAME]


def test_a_run_starts_without_what_it_needs_later():
    """A new run imports these while the device takes the first steps."""
    assert [name for name in python(LOADED, f"{NAME}.runs.train") if name in ("orbax", "matplotlib")] == []


CHANGED = """
import importlib, json, logging, os, signal, sys, warnings

def state():
    loggers = [logging.root, *map(logging.getLogger, ("absl", "asyncio"))]
    return {
        "environment": dict(os.environ),
        "directory": (os.getcwd(), list(sys.path)),
        "hooks": (sys.unraisablehook, sys.excepthook, warnings.showwarning),
        "warnings": list(warnings.filters),
        "logging": [(list(logger.filters), list(logger.handlers), logger.level) for logger in loggers],
        "signals": [signal.getsignal(signum) for signum in signal.valid_signals()],
        "kept out": [name for name, module in list(sys.modules.items()) if module is None],
    }

outside, modules = map(json.loads, sys.argv[1:])
for name in outside:  # what these change is theirs
    importlib.import_module(name)
before, changed = state(), []
for module in modules:
    importlib.import_module(module)
    after = state()
    changed += [f"{what} by {module}" for what in before if after[what] != before[what]]
    before = after
print(json.dumps(changed))
"""


def test_nothing_happens_at_import():
    outside = {name for tree in TREES.values() for name in imports(tree.body) if name.partition(".")[0] != NAME}
    modules = [NAME, *(module for module in TREES if module not in (NAME, f"{NAME}.__main__"))]
    assert python(CHANGED, json.dumps(sorted(outside)), json.dumps(modules)) == []


# Names of files.


def literals(tree):
    """The strings in a module, parts of f-strings too, but for docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_only_the_workdir_knows_its_files():
    spelled = [
        f"{module}: {text!r}"
        for module, tree in TREES.items()
        for text in literals(tree)
        if module != f"{NAME}.runs.workdir" and any(name in text for name in FILES)
    ]
    assert spelled == []
    assert set(literals(TREES[f"{NAME}.runs.workdir"])) >= FILES
