"""The batch norm tests of flax.linen and Equinox on this package's layer.

They are read from the directories `flax-<version>` and `equinox-<version>` in $VMAPBN_PEER_TESTS, which
docs/contributing.md says how to fetch, and skipped without it.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_VALUE = "got a training batch of one value per feature"

FLAX = {
    "tests/linen/linen_test.py": [
        "test_batch_norm0",
        "test_batch_norm1",
        "test_batch_norm_complex0",
        "test_batch_norm_complex1",
        "test_batch_norm_multi_init",
    ],
    "tests/linen/linen_transforms_test.py": ["test_vmap_batchnorm"],
}
# The statement at which a test fails for the reason `ONE_VALUE`; None of one that passes.
EQUINOX = {
    "test_batch_norm[batch]": "f(jrandom.normal(getkey(), (1, 5)))",  # its last line
    "test_batch_norm[ema]": "f(jrandom.normal(getkey(), (1, 5)))",
    "test_batch_norm_zero_training_steps": None,
    "test_nested_sequential[False-False]": None,  # has no batch norm
    "test_nested_sequential[False-True]": "out, state = jax.vmap(",
    "test_nested_sequential[True-False]": "out, state = jax.vmap(",
    "test_nested_sequential[True-True]": "out, state = jax.vmap(",
    "test_sequential": "output, state = batch_seq(x, state)",
}


def run(library, plugin, file, select, tmp_path):
    """The failure of each test of `file`, None of one that passed, with `plugin` of tests/helpers loaded first."""
    if "VMAPBN_PEER_TESTS" not in os.environ:
        pytest.skip("VMAPBN_PEER_TESTS names no directory")
    directory = Path(os.environ["VMAPBN_PEER_TESTS"]).resolve() / f"{library}-{importlib.metadata.version(library)}"
    assert (directory / file).exists(), f"{directory / file} is missing; expected the tests of the installed release"
    report = tmp_path / "report.xml"
    arguments = ["-p", plugin, "-c", os.devnull, f"--rootdir={directory}", "-k", select, f"--junitxml={report}"]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'tests' / 'helpers'}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, file]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=500)
    assert report.exists(), done.stdout + done.stderr
    cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    return {case.get("name"): getattr(case.find("failure"), "text", None) for case in cases}


@pytest.mark.parametrize("file", FLAX)
def test_flax_s(file, tmp_path):
    assert run("flax", "as_flax", file, "batch_norm or batchnorm", tmp_path) == dict.fromkeys(FLAX[file])


def test_equinox_s(tmp_path):
    found = run("equinox", "as_equinox", "tests/test_nn.py", "test_batch_norm or sequential", tmp_path)
    assert {name: text and re.search(r"^> +(.*)$", text, re.MULTILINE)[1] for name, text in found.items()} == EQUINOX
    assert all(ONE_VALUE in text for text in found.values() if text)
