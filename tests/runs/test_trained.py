"""A trained run, loaded: its predictions are those that the run was evaluated with, and its network is plain Flax."""

import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small
from tests.helpers.trained import NAMES, conv, dataset, in_colour, write
from tests.runs.test_untrusted import resum
from tests.training import test_own_network as own
from vmapbn_flax import load_run
from vmapbn_flax.cli import evaluate as evaluate_module
from vmapbn_flax.data.binary import binarised
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.runs.trained import _BATCH, TrainedRun
from vmapbn_flax.runs.workdir import Workdir

KINDS = {
    "mlp": (small.config, {}, {}),
    "batched": (lambda: small.config(model__norm="batched"), {}, {}),
    "without a norm": (lambda: small.config(model__norm="none"), {}, {}),
    "bfloat16": (lambda: small.config(model__dtype="bfloat16"), {}, {}),
    "convolutions": (conv, {}, {}),
    "convolutions in colour": (lambda: conv(model__dtype="bfloat16"), {"colour": True}, {}),
    "a network of one's own": (own.config, {}, {"network": own.NAME}),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """A loaded run, and the test images that it was evaluated on."""
    make, data, arguments = KINDS[request.param]
    data = dataset(**data)
    return load_run(write(tmp_path_factory.mktemp("run") / "run", make(), data), **arguments), data.test


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The workdir of a run with checkpoints of three steps."""
    return write(tmp_path_factory.mktemp("run") / "run", small.config(), dataset(), steps=(1, 2, 3))


@pytest.fixture(scope="module")
def run(path):
    return load_run(path, 2)


@pytest.fixture
def copy_of_run(path, tmp_path):
    """The same run in a workdir that may be changed; it has the checkpoint of step 3 alone."""
    shutil.copytree(path, tmp_path / "run")
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    return tmp_path / "run"


def test_accuracy_is_that_of_the_evaluation(kind):
    run, test = kind
    probabilities = run.predict(test.images)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (37, 4))
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
    right = probabilities.argmax(-1) == test.labels
    assert np.float32(right.mean()) == np.float32(run.figures["test_accuracy"])
    loss = -np.log(probabilities[np.arange(37), test.labels]).mean()
    tolerance = 1e-5 if run.config.model.dtype == "float32" else 1e-3  # XLA rounds to bfloat16 where each program needs
    np.testing.assert_allclose(loss, run.figures["test_loss"], rtol=tolerance)


@pytest.mark.parametrize("norm", ["renorm", "batched_renorm"])
def test_a_run_with_renorm(norm, tmp_path):
    """Its statistics have a count. It evaluates in either form, and folds as batch norm does."""
    data = dataset()
    run = load_run(write(tmp_path / "run", small.config(model__norm=norm), data))
    assert run.variables["batch_stats"]["norm_0"]["count"].dtype == np.int32
    probabilities = run.predict(data.test.images)
    assert np.float32((probabilities.argmax(-1) == data.test.labels).mean()) == np.float32(run.figures["test_accuracy"])
    np.testing.assert_allclose(run.fold().predict(data.test.images), probabilities, rtol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "load_dataset", lambda *arguments: data)
        for form in ("vmap", "batched"):
            programs, _, state = evaluate_module.load(tmp_path / "run", None, form, None)
            assert programs.evaluate(state)["test_accuracy"] == run.figures["test_accuracy"]


def test_the_network_is_plain_flax(kind):
    """On the variables as they are; those of a run in bfloat16 are not rounded."""
    run, test = kind
    image = test.images[0].astype(np.float32) / 255
    image = image.reshape(-1) if run.config.model.name == "mlp" else image.reshape(3, 4, -1)
    probabilities = jax.nn.softmax(run.network.apply(run.variables, jnp.asarray(image), train=False))
    exact = run.config.model.dtype == "float32"
    np.testing.assert_allclose(probabilities, run.predict(test.images[0]), rtol=1e-6, atol=0 if exact else 0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.variables)} == {np.dtype(np.float32)}


def test_what_it_says_of_itself(kind, run):
    colour = kind[1].images.ndim == 4
    assert (kind[0].class_names, kind[0].image_shape) == (NAMES, (3, 4, 3) if colour else (3, 4))
    assert run.step == 2
    assert run.figures.keys() == {"test_loss", "test_accuracy", "test_count"}
    assert 0.4 < run.border < 0.7
    assert len(str(run)) < 600  # without its arrays


# Which checkpoint.


def test_best_and_latest(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    accuracy = {row["step"]: row["test_accuracy"] for row in rows if "test_accuracy" in row}
    best = max(accuracy, key=lambda step: (accuracy[step], step))
    assert best != 3  # which the latest is
    for step, expected in {None: best, "best": best, "latest": 3, 1: 1}.items():
        found = load_run(str(path), step)
        assert (found.step, found.figures["test_accuracy"]) == (expected, accuracy[expected])


def test_validation_images_choose(copy_of_run):
    write(copy_of_run, small.config(data__validation_size=20), dataset(validation_size=20), steps=(1, 2, 3))
    rows = [
        {"step": step, "validation_accuracy": best, "test_accuracy": 1 - best} for step, best in enumerate((0, 1, 0), 1)
    ]
    (copy_of_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_run(copy_of_run).figures == {"validation_accuracy": 1, "test_accuracy": 0}
    (copy_of_run / "metrics.jsonl").unlink()
    assert load_run(copy_of_run).step == 3
    assert load_run(copy_of_run).figures == {}


@pytest.mark.parametrize(
    ("step", "match"),
    [(7, r"checkpoints: got steps \[1, 2, 3\], expected step 7"), ("last", "step: got 'last'; expected the number")],
)
def test_no_such_step(path, step, match):
    with pytest.raises((RunError, UsageError), match=match):
        load_run(path, step)


# Images.


def test_every_form_of_an_image(run):
    images = small.dataset().test.images
    expected = run.predict(images)
    for form in (
        images[..., None],
        images.reshape(37, 12),
        images / 255,
        (images / 255).astype(np.float32)[..., None],
        jnp.asarray(images),
        list(images),
    ):
        np.testing.assert_array_equal(run.predict(form), expected)
    for one in (images[5], images[5][..., None], images[5].reshape(-1), images[5].tolist() / np.float64(255)):
        np.testing.assert_array_equal(run.predict(one), expected[5])
    np.testing.assert_allclose(run.predict((images / 255).astype(jnp.bfloat16)), expected, atol=0.01)


def test_colour(tmp_path):
    run = load_run(write(tmp_path / "run", conv(), dataset(colour=True)))
    images = in_colour(small.dataset().test).images
    np.testing.assert_array_equal(run.predict(images.reshape(37, 36)), run.predict(images))
    with pytest.raises(ValueError, match=r"got an array of shape \(37, 3, 4\); expected \(3, 4, 3\) or \(36,\)"):
        run.predict(images[..., 0])


def test_one_program_serves_every_number_of_images(run, monkeypatch):
    traced = []
    original = TrainedRun.probabilities
    monkeypatch.setattr(TrainedRun, "probabilities", lambda *arguments: traced.append(1) or original(*arguments))
    run = load_run(run.path, 1)
    images = np.tile(small.dataset().test.images, (3, 1, 1))
    expected = run.predict(images)
    for count in (0, 1, 5, _BATCH - 1, _BATCH, _BATCH + 1, len(images)):
        np.testing.assert_array_equal(run.predict(images[:count]), expected[:count])
    np.testing.assert_array_equal(run.predict(images[7] / 255), expected[7])
    assert traced == [1]


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (
            np.zeros((4, 3), np.uint8),
            r"shape \(4, 3\); expected \(3, 4, 1\) or \(3, 4\) or \(12,\) for one image",
        ),
        (np.zeros((2, 3, 4, 3), np.uint8), r"got an array of shape \(2, 3, 4, 3\)"),
        (np.zeros((1, 2, 3, 4), np.uint8), r"got an array of shape \(1, 2, 3, 4\)"),
        (np.zeros((3, 4), int), "got int64; expected uint8 from 0 to 255, or floats from 0 to 1"),
        (np.zeros((3, 4), bool), "got bool; expected uint8"),
        (np.zeros((3, 4), complex), "got complex128; expected uint8"),
        (
            np.full((3, 4), 255.0),
            "got floats from 255.0 to 255.0; expected 0 to 1. Divide what is from 0 to",
        ),
        (np.full((3, 4), -1e-3), "got floats from -0.001 to -0.001; expected 0 to 1"),
        (np.full((3, 4), np.nan), "got floats from nan to nan; expected 0 to 1"),
        (np.full((2, 3, 4), np.inf, np.float16), "got floats from inf to inf; expected 0 to 1"),
        ([[1, 2], [3]], "images: got what is no array of numbers; expected"),
        (None, r"images: got an array of shape \(\)"),
        ("cat.png", r"images: got an array of shape \(\)"),
        ([b"x"] * 12, r"got \|S1; expected uint8"),
    ],
)
def test_other_images_are_refused(run, images, match):
    with pytest.raises(ValueError, match=match) as error:
        run.predict(images)
    assert "\n" not in str(error.value)


# A network of one's own.


@pytest.fixture(scope="module")
def of_ones_own(tmp_path_factory):
    return write(tmp_path_factory.mktemp("own") / "run", own.config(), dataset())


def test_its_class_can_be_given(of_ones_own):
    images = small.dataset().test.images
    by_class, by_name = load_run(of_ones_own, network=own.Net), load_run(of_ones_own, network=own.NAME)
    assert (type(by_class.network), by_class.network.width) == (own.Net, 3)
    np.testing.assert_array_equal(by_class.predict(images), by_name.predict(images))


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (None, f"got '{own.NAME}' from a workdir, which must not name code to run.*network='{own.NAME}' for load_run"),
        ("tests.helpers.payload:Boom", "got a run of the network tests.training.test_own_network:Net; expected that"),
        (int, "which is no flax.linen.Module"),
    ],
)
def test_another_is_refused(of_ones_own, unchecked, network, match):
    with pytest.raises(UsageError, match=match):
        load_run(of_ones_own, network=network)


def test_a_class_of_other_attributes(of_ones_own):
    class Other(own.Net):
        def __init__(self, num_classes, norm):
            pass

    with pytest.raises(UsageError, match=r"config.model: got attributes that the network does not take"):
        load_run(of_ones_own, network=Other)


def test_a_network_of_this_package_needs_no_class(path):
    with pytest.raises(UsageError, match="network=Net: got a run of the network mlp; expected none"):
        load_run(path, network=own.Net)


# Workdirs that are not a run's, or damaged.


def test_a_sweep_names_a_member(tmp_path):
    workdir = Workdir(tmp_path / "sweep")
    workdir.write(workdir.config, {})
    workdir.write(workdir.ledger, {})
    with pytest.raises(RunError, match=r"sweep: got the workdir of a sweep.*Choose one of its 0 members\. `vm"):
        load_run(workdir.path)
    for name, metric in (("a", 0.5), ("b", 0.75), ("c", None), ("d", "x")):
        member = workdir.member(name)
        member.write(member.config, {})
        if metric is not None:
            member.write(member.summary, {"best_metric": metric})
    with pytest.raises(RunError, match=r"Choose one of its 4 members, such as .*sweep/b, the best so far"):
        load_run(workdir.path)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"image_shape": [3]},
        {"image_shape": [3, 4, 1, 1]},
        {"image_shape": [3, -4]},
        {"image_shape": [3, 4.0]},
        {"image_shape": [3, True]},
        {"image_shape": [10**5, 10**5]},
        {"image_shape": 12},
        {"class_names": []},
        {"class_names": [0, 1, 2, 3]},
        {"class_names": ["\ud800", "b", "c", "d"]},
        {"class_names": 4},
        {"border": "x"},
        {"border": None},
    ],
)
def test_what_a_checkpoint_says_of_its_data(copy_of_run, data):
    checkpoint = copy_of_run / "checkpoints" / "3"
    file = checkpoint / "meta" / "metadata"
    meta = json.loads(file.read_text())
    meta["data"] = {**meta["data"], **data} if data else data
    file.write_text(json.dumps(meta))
    resum(checkpoint)
    with pytest.raises(RunError, match="checkpoints: got a checkpoint that does not say the shape of its images"):
        load_run(copy_of_run)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": {"hidden": [5]}}, r"3: batch_stats/norm_0/mean: got float32\[6\], expected float32\[5\]: a check"),
        ({"model": {"hidden": [6, 6]}}, r"3: batch_stats/norm_1/mean: got nothing, expected float32\[6\]"),
        ({"model": {"norm": "none"}}, "3: params/dense_0/bias: got nothing, expected"),
        ({"model": {"hidden": "wide"}}, "config.json: got a config that does not fit"),
        ({"sweep": {"seed": [0, 1]}}, "config.json: got a config that does not fit .*expected none for a single run"),
    ],
)
def test_a_config_of_another_network(copy_of_run, change, match):
    config = json.loads((copy_of_run / "config.json").read_text())
    for section, fields in change.items():
        config.setdefault(section, {}).update(fields)
    (copy_of_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=match):
        load_run(copy_of_run)


def test_images_too_small_for_the_network(copy_of_run):
    workdir = Workdir(copy_of_run)
    config = workdir.read_config()
    config["model"] = {**conv().model.to_dict(), "features": [3, 3, 3]}
    workdir.write(workdir.config, config)
    with pytest.raises(UsageError, match=r"config.model: ConvNet: got images of 3x4, which 3 blocks halve to nothing"):
        load_run(copy_of_run)


def test_errors_of_ones_own_network_are_its_own(of_ones_own):
    """Not taken for damage of the checkpoint."""

    class Other(own.Net):
        def __call__(self, x, *, train, mask=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load_run(of_ones_own, network=Other)


def test_damage(copy_of_run):
    (copy_of_run / "checkpoints" / "3" / "state" / "manifest.ocdbt").write_bytes(b"x")
    with pytest.raises(RunError, match=r"3: got a damaged checkpoint .*manifest.ocdbt is not what was saved"):
        load_run(copy_of_run)
    with pytest.raises(RunError, match=r"none/config.json: got No such file or directory; expected the workdir of a"):
        load_run(copy_of_run / "none")
    (copy_of_run / "checkpoints").rename(copy_of_run / "gone")
    with pytest.raises(RunError, match=r"checkpoints: got steps \[\], expected a checkpoint; train the run"):
        load_run(copy_of_run)


def test_the_optimizer_is_not_read(copy_of_run):
    """Nor need it be known: a run may have been trained with any."""
    config = json.loads((copy_of_run / "config.json").read_text())
    config["optimizer"]["name"] = "sgd"  # without Adam's second moment
    (copy_of_run / "config.json").write_text(json.dumps(config))
    assert load_run(copy_of_run).variables.keys() == {"params", "batch_stats"}


def test_imports_are_few():
    """Of those that take long, none but JAX, Flax and orbax."""
    code = "import sys, vmapbn_flax; vmapbn_flax.load_run; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"matplotlib", "tensorflow_datasets", "tensorboardX", "tensorflow", "clu", "PIL"}.isdisjoint(modules)


UNCACHED = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
IMPORTS = "import jax, flax, orbax.checkpoint"
PREDICTS = "import sys, numpy, vmapbn_flax; vmapbn_flax.load_run(sys.argv[1]).predict(numpy.zeros((3, 4), 'uint8'))"


@pytest.mark.slow
def test_the_first_prediction_takes_little_longer_than_the_imports(path):
    """In processor time, of processes that take turns: less than 1.5 times that of importing JAX, Flax and orbax."""

    def seconds(code):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, path], check=True, env=UNCACHED)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    pairs = [(seconds(IMPORTS), seconds(PREDICTS)) for _ in range(11)]
    imports, predicts = map(statistics.median, zip(*pairs, strict=True))
    assert predicts < 1.5 * imports


@pytest.mark.parametrize("threshold", [0.5, 100 / 255])
def test_images_become_black_and_white_as_in_training(tmp_path, threshold):
    """Integers and floats alike; the exported program is made of the same function."""
    data = dataset()
    run = load_run(write(tmp_path / "run", small.config(data__threshold=threshold), data))
    grey = data.test.images
    got = run.predict(grey)
    np.testing.assert_array_equal(got, run.predict(binarised(data.test, threshold).images))
    np.testing.assert_array_equal(got, run.predict(grey.astype(np.float32) / 255))
    plain = run.config.copy_and_resolve_references()
    plain.data.threshold = 0.0
    assert np.abs(got - dataclasses.replace(run, config=plain).predict(grey)).max() > 1e-3
