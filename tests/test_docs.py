"""The Python of README.md and docs/ runs as it stands there and prints what it says; every page is linked.

The commands are in `test_commands.py`.
"""

import doctest
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from configs import sweep_lr, vmap_bn
from tests.helpers import quick, small
from vmapbn_flax.cli.main import main
from vmapbn_flax.data import bundled
from vmapbn_flax.runs.train import train
from vmapbn_flax.sweeps.train import train_sweep

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
EXPORT = re.compile(r"^python -m vmapbn_flax ((?:export|fold) .*?)(?: +#.*)?$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
RUN = [
    "README.md",
    *(f"docs/{name}.md" for name in ("batch-norm", "data", "equinox", "story", "using", "your-network")),
]
PROSE = [f"docs/{name}.md" for name in ("architecture", "changelog", "exactness", "gpu", "reference", "speed")]
OPTIONAL = ("onnxruntime", "pandas", "torch")  # what needs one of these runs where it is installed


def installed(code):
    return all(find_spec(name) for name in OPTIONAL if f"import {name}" in code)


def train_run(workdir, text):
    """The run of configs/vmap_bn.py, for half an epoch, and the files that the commands in `text` make of it."""
    config = vmap_bn.get_config()
    config.optimizer.warmup_epochs, config.train.num_epochs = 0.1, 0.5
    train(config, workdir)
    for command in EXPORT.findall(text):
        if find_spec("torch") or not command.endswith(".pt"):
            assert main(shlex.split(command)) == 0


def small_sweep():
    """configs/sweep_lr.py with a narrow network, for two steps."""
    config = sweep_lr.get_config()
    config.model.hidden = (8,)
    config.optimizer.warmup_epochs, config.train.num_epochs = 0.0, 0.005
    return config


def test_every_page_has_code_that_runs_or_is_listed():
    fences = {page: re.findall("^ *```(.*)", (ROOT / page).read_text(), re.MULTILINE)[::2] for page in PAGES}
    assert {kind for kinds in fences.values() for kind in kinds} == {"python", "bash", "text"}
    assert [page for page in PAGES if "python" in fences[page]] == RUN
    assert [page for page in PAGES if not {"python", "bash"} & set(fences[page])] == PROSE


SLOW = ("docs/batch-norm.md", "docs/equinox.md", "docs/story.md")


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in RUN])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace a page and an empty directory; a block that starts with >>> is a doctest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    path = ROOT / page
    text, namespace = path.read_text(), {"__name__": "__main__"}
    mnist = small.mnist()
    monkeypatch.setattr(bundled, "read_mnist", lambda directory: mnist)  # decoded once
    if page == "docs/using.md":  # which starts from a finished run, and from a sweep
        with quick.programs():
            train_run(Path("runs/vmap_bn"), text)
            train_sweep(small_sweep(), Path("runs/sweep_lr"))
    for block in BLOCK.finditer(text):
        code, line = block[1], text.count("\n", 0, block.start(1))
        if code.startswith(">>>"):
            example = doctest.DocTestParser().get_doctest(code, namespace, path.name, str(path), line)
            report = []
            result = doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
            assert result.failed == 0, "".join(report)
            namespace = example.globs
        elif installed(code):
            exec(compile("\n" * line + code, path, "exec"), namespace)


@pytest.mark.slow
def test_the_story_as_a_notebook(tmp_path, monkeypatch):
    """It starts with its only line of installation, and its cells run one after another."""
    pytest.importorskip("jupytext")
    made = subprocess.run([sys.executable, ROOT / "docs/notebook.py"], capture_output=True, text=True, check=True)
    cells = [cell for cell in json.loads(made.stdout)["cells"] if cell["cell_type"] == "code"]
    code = ["".join(cell["source"]) for cell in cells]
    assert [line for cell in code for line in cell.splitlines() if line.startswith("%")] == ["%pip install vmapbn-flax"]
    assert not any(line.startswith((">>>", "...")) for cell in code for line in cell.splitlines())
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in code[1:-1]:  # the last one shows the picture, which takes IPython
        exec(cell, namespace)
    (shown,) = re.findall(r'"(.+\.png)"', code[-1])
    assert (tmp_path / shown).exists()


def links(page):
    """The files that `page` links to, relative to the root."""
    directory = (ROOT / page).parent
    found = LINK.findall(CODE.sub("", (ROOT / page).read_text()))
    return {(directory / link).resolve().relative_to(ROOT).as_posix() for link in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    assert [link for link in links(page) if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("start", ["README.md", "docs/index.md"])
def test_every_page_is_linked(start):
    assert [page for page in PAGES[1:] if page not in links(start) | {"docs/index.md"}] == []


def test_every_page_is_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES[1:] if f"- {Path(page).name}\n" not in nav] == []


def test_the_layer_in_flax_s_place_is_the_one_that_flax_s_tests_get():
    page, plugin = (ROOT / "docs/batch-norm.md").read_text(), (ROOT / "tests/helpers/as_flax.py").read_text()
    [code] = [code for code in BLOCK.findall(page) if code.startswith("class FlaxBatchNorm")]
    assert code.strip() in plugin


def test_the_network_of_ones_own_is_the_file():
    page = (ROOT / "docs/your-network.md").read_text()
    code = (ROOT / "configs/own_network.py").read_text()
    assert BLOCK.search(page)[1].strip() == code[code.index("from collections") :].strip()
