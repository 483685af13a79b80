"""What pip is told of the package: its version, its dependencies, its files."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import vmapbn_flax

PACKAGE = Path(vmapbn_flax.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]


def normal(name):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def imports(path):
    """The top-level names of what the module at `path` imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_the_version_is_that_of_the_distribution():
    assert vmapbn_flax.__version__ == version("vmapbn-flax") == PROJECT["version"]


def test_what_is_imported_is_declared():
    extras = PROJECT["optional-dependencies"]
    declared = {normal(name) for names in (PROJECT["dependencies"], *extras.values()) for name in names}
    imported = {name for path in PACKAGE.rglob("*.py") for name in imports(path)}
    distributions = packages_distributions()
    undeclared = {
        name
        for name in imported - sys.stdlib_module_names - {"vmapbn_flax"}
        if not declared & {normal(distribution) for distribution in distributions.get(name, [name])}
    }
    assert undeclared == set()


def test_every_room_says_what_lives_there():
    rooms = {path.parent / "__init__.py" for path in PACKAGE.rglob("*.py")}
    assert [room for room in rooms if not (room.exists() and ast.get_docstring(ast.parse(room.read_text())))] == []


def test_types_are_published():
    assert (PACKAGE / "py.typed").exists()
