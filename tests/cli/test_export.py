"""`export` and `fold`: files that predict what the run does, also where nothing of this project is installed."""

import importlib.util
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from configs import tiny
from tests.helpers import small, trained
from tests.helpers.runs import command
from tests.runs.test_export import mnist, read_onnx, read_stablehlo, read_torch
from tests.test_docs import BLOCK, ROOT
from vmapbn_flax import MLP, load_run
from vmapbn_flax.cli import export
from vmapbn_flax.cli.main import main

close = np.testing.assert_allclose


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on MNIST, with two checkpoints."""
    return trained.write(tmp_path_factory.mktemp("runs") / "tiny", tiny.get_config(), small.mnist(), steps=(1, 2))


@pytest.mark.parametrize("suffix", [".stablehlo", ".onnx", ".pt"])
@pytest.mark.parametrize("name", ["export", "fold"])
def test_files_predict_what_the_run_does(name, suffix, workdir, tmp_path, capsys):
    pytest.importorskip({".onnx": "onnx", ".pt": "torch"}.get(suffix, "flatbuffers"))
    path, images = tmp_path / f"file{suffix}", mnist()
    capsys.readouterr()
    assert main([name, str(workdir), "-o", str(path)]) == 0
    first, *code = capsys.readouterr().out.splitlines()
    assert first == str(path)
    if suffix == ".pt":
        found = read_torch(path, images, "\n".join(code))
    else:
        found = (read_onnx if suffix == ".onnx" else read_stablehlo)(path, images)
    close(found, load_run(workdir).predict(images), rtol=0, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_fold_writes_the_network_without_norms(workdir, tmp_path, capsys):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    assert command(capsys, "fold", workdir, "-o", tmp_path / "file.safetensors") == (0, [])
    variables = unflatten_dict(load_file(tmp_path / "file.safetensors"), sep="/")
    small.assert_same_bits(variables, load_run(workdir).fold().variables)
    image = mnist(1)[0]
    pixels = jnp.float32(image.ravel()) / 255
    logits = MLP(hidden=(16, 16), num_classes=10, norm=None).apply(variables, pixels, train=False)
    close(np.exp(logits) / np.exp(logits).sum(), load_run(workdir).predict(image), rtol=0, atol=1e-5)


def test_the_step_can_be_chosen_and_a_file_is_replaced(workdir, tmp_path, capsys):
    safe_open = pytest.importorskip("safetensors").safe_open
    path = tmp_path / "file.safetensors"
    path.write_text("old")
    for step in ("1", "best", "latest"):
        assert command(capsys, "export", workdir, f"--step={step}", "-o", path) == (0, [])
        with safe_open(path, "np") as file:
            assert file.metadata()["step"] == str(load_run(workdir, int(step) if step == "1" else step).step)


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vmapbn_flax", "flax", "optax", "orbax", "ml_collections"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
"""


def test_the_lines_of_the_docs_need_nothing_of_this_project(workdir, tmp_path, capsys):
    pytest.importorskip("flatbuffers")
    assert command(capsys, "export", workdir, "-o", tmp_path / "vmap_bn.stablehlo") == (0, [])
    image = mnist(1)[0]
    np.save(tmp_path / "image.npy", image)
    (lines,) = (block for block in BLOCK.findall((ROOT / "docs/using.md").read_text()) if "jax.export" in block)
    assert len([line for line in lines.splitlines() if line]) == 5
    script = f"{ALONE}\nimport numpy\nimage = numpy.load('image.npy')\n{lines}\nnumpy.save('found.npy', found)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    expected = load_run(workdir).predict(np.stack([image, 255 - image]))
    close(np.load(tmp_path / "found.npy"), expected, rtol=0, atol=1e-5)


BAD = {
    "an unknown suffix": ("{run}", "{here}/file.h5", 2, r"got a name that ends in '\.h5', expected one of \.stablehlo"),
    "no suffix": ("{run}", "{here}/file", 2, r"got a name that ends in '', expected one of \.stablehlo, \.safe"),
    "no directory": ("{run}", "{here}/none/file.onnx", 2, "got no directory .*none, expected one to write the file to"),
    "a directory": ("{run}", "{here}/folder.onnx", 2, "got a directory, expected the name of a file"),
    "no run": ("{here}/none", "{here}/file.safetensors", 1, "config.json: got No such file or directory; expected the"),
    "no checkpoints": ("{here}/empty", "{here}/file.safetensors", 1, r"got steps \[\], expected a checkpoint"),
    "a sweep": ("{here}/sweep", "{here}/file.safetensors", 1, "got the workdir of a sweep, expected that of a run"),
}


@pytest.mark.parametrize("name", ["export", "fold"])
@pytest.mark.parametrize(("run", "output", "status", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(name, run, output, status, message, workdir, tmp_path, capsys):
    for folder in ("empty", "folder.onnx", "sweep"):
        (tmp_path / folder).mkdir()
    (tmp_path / "empty" / "config.json").write_text((workdir / "config.json").read_text())
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    run, output = (text.format(run=workdir, here=tmp_path) for text in (run, output))
    found, lines = command(capsys, name, run, "-o", output)
    assert (found, len(lines)) == (status, 1), lines
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("suffix", "missing", "install"),
    [
        (".stablehlo", "flatbuffers", "'vmapbn-flax[export]'"),
        (".safetensors", "safetensors", "'vmapbn-flax[export]'"),
        (".onnx", "onnx", "'vmapbn-flax[export]'"),
        (".pt", "torch", "torch"),
    ],
)
def test_a_missing_library_is_one_line(suffix, missing, install, workdir, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    path = tmp_path / f"file{suffix}"
    assert command(capsys, "export", workdir, "-o", path) == (
        2,
        [f"error: {path}: got no library {missing}, which such a file needs. Install it: pip install {install}"],
    )


def test_output_is_checked_before_the_run_is_loaded(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "load_run", None)
    assert command(capsys, "export", workdir, "-o", tmp_path / "file.h5")[0] == 2
