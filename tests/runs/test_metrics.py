import json
import logging
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.api_pb2 import DataType, Status
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from vmapbn_flax.errors import RunError
from vmapbn_flax.runs.metric_writer import MetricWriter
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.training.metrics import EvalMetrics, TrainMetrics, compute

HEADER, FOOTER = struct.Struct("<QI"), 4  # TFRecord: length and its checksum; the record's checksum


def events(workdir):
    """Every event in the event files of `workdir`, in the order they were written."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            length, _ = HEADER.unpack_from(content)
            found.append(Event.FromString(content[HEADER.size : HEADER.size + length]))
            content = content[HEADER.size + length + FOOTER :]
    return found


def scalars(workdir):
    """The scalars TensorBoard shows: a session that starts at a step drops what was there from it on."""
    shown = {}
    for event in events(workdir):
        if event.session_log.status == SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            if not value.tag.startswith("_hparams_"):
                shown[value.tag, event.step] = value.simple_value
    return shown


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, resume_step, steps):
    writer = MetricWriter(Workdir(workdir), resume_step)
    for step in steps:
        writer.write_scalars(step, {"train_loss": 1 / step, "learning_rate": 0.5})
    writer.flush()
    return Workdir(workdir).read_rows()


def test_one_object_a_line(tmp_path):
    written = write(tmp_path, 0, (1, 2, 4))
    assert rows(tmp_path) == written == [{"step": n, "train_loss": 1 / n, "learning_rate": 0.5} for n in (1, 2, 4)]
    expected = {(name, n): value for n in (1, 2, 4) for name, value in (("train_loss", 1 / n), ("learning_rate", 0.5))}
    assert scalars(tmp_path) == expected


def test_not_finite_is_null(tmp_path, caplog):
    writer = MetricWriter(Workdir(tmp_path), 0)
    with caplog.at_level(logging.ERROR):
        writer.write_scalars(3, {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "zero": 0.0, "count": 7})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 3, "nan": null, "inf": null, "minus": null, "zero": 0.0, "count": 7}\n'
    shown = scalars(tmp_path)
    assert math.isnan(shown["nan", 3])
    assert shown["inf", 3] == math.inf


@pytest.mark.parametrize("resume_step", [0, 2, 3, 4, 9])
def test_resumed_run_has_one_row_a_step(tmp_path, resume_step):
    write(tmp_path, 0, (2, 4, 6))
    write(tmp_path, resume_step, (7, 8))
    steps = [step for step in (2, 4, 6) if step <= resume_step] + [7, 8]
    assert [row["step"] for row in rows(tmp_path)] == steps
    assert [step for name, step in scalars(tmp_path) if name == "train_loss"] == steps


def test_resumed_writer_knows_its_rows(tmp_path):
    first = write(tmp_path, 0, (2, 4))
    assert write(tmp_path, 2, ()) == first[:1]


@pytest.mark.parametrize("torn", ['{"step": 6, "train_lo', '{"step": 6}', '{"step"', "\0\0\0"])
def test_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path, 0, (2, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path, 9, (10,))
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 10]


def test_damage_elsewhere_is_an_error(tmp_path):
    write(tmp_path, 0, (2, 4, 6))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 4', '"step" 4'))
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: got a damaged row"):
        MetricWriter(Workdir(tmp_path), 6)
    assert path.read_bytes() == before


HPARAMS = {"seed": 3, "model.norm": "vmap", "model.hidden": (100, 100), "flag": True}


def write_hparams(workdir, swept=(), failed=False):
    writer = MetricWriter(Workdir(workdir), 0)
    writer.write_scalars(5, {"test_accuracy": 0.5})
    writer.write_hparams(HPARAMS, swept=swept, metrics=["test_accuracy"], failed=failed)
    return hparams_of(workdir)


def hparams_of(workdir):
    """What TensorBoard's hparams tab reads of a run, by the parts of its plugin."""
    return {
        value.tag.removeprefix("_hparams_/"): HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events(workdir)
        for value in event.summary.value
        if value.tag.startswith("_hparams_")
    }


def test_hparams(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        plugin = write_hparams(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_dir()] == []  # a directory is a run to TensorBoard
    start = plugin["session_start_info"].session_start_info.hparams
    assert start["seed"].number_value == 3
    assert start["model.norm"].string_value == "vmap"
    assert start["model.hidden"].string_value == "(100, 100)"
    assert start["flag"].bool_value is True
    assert plugin["session_end_info"].session_end_info.status == Status.STATUS_SUCCESS
    # Without an experiment TensorBoard looks which hparams differ.
    assert "experiment" not in plugin
    # No scalars of their own, whose cards TensorBoard would open on.
    assert scalars(tmp_path) == {("test_accuracy", 5): 0.5}


def test_hparams_of_a_member(tmp_path):
    """All that a run has, of which those that are swept differ; its metrics are scalars that are there."""
    experiment = write_hparams(tmp_path, ["model.norm"])["experiment"].experiment
    differs = {info.name: info.SerializeToString().endswith(b"\x38\x01") for info in experiment.hparam_infos}
    assert differs == {"seed": False, "model.norm": True, "model.hidden": False, "flag": False}
    assert DataType.DATA_TYPE_UNSET not in {info.type for info in experiment.hparam_infos}
    assert [info.name.tag for info in experiment.metric_infos] == ["test_accuracy"]
    assert scalars(tmp_path) == {("test_accuracy", 5): 0.5}


def test_hparams_of_a_failed_run(tmp_path):
    end = write_hparams(tmp_path, failed=True)["session_end_info"].session_end_info
    assert end.status == Status.STATUS_FAILURE


# Collections.


def measure(collection, labels, mask=None):
    logits = jnp.eye(3)[jnp.array([0, 1, 2, 0])]
    mask = None if mask is None else jnp.array(mask)
    return collection.single_from_model_output(
        loss=jnp.array([1.0, 2.0, 3.0, 10.0]), logits=logits, labels=jnp.array(labels), mask=mask
    )


@pytest.mark.parametrize("collection", [TrainMetrics, EvalMetrics])
def test_sums_over_counts(collection):
    first = measure(collection, [0, 1, 1, 1])  # 2 of 4
    second = measure(collection, [0, 0, 2, 2], mask=[True, True, False, False])  # 1 of 2
    assert compute(first) == {"loss": 4.0, "accuracy": 0.5}
    assert compute(second) == {"loss": 1.5, "accuracy": 0.5}
    assert compute(first.merge(second)) == {"loss": np.float32(19 / 6), "accuracy": 0.5}
    assert compute(collection.empty().merge(second)) == compute(second)


def test_nothing_counted_is_nan():
    assert all(map(math.isnan, compute(EvalMetrics.empty()).values()))


def test_histograms_of_percentiles(tmp_path):
    """A hundredth of the values between two percentiles; a NaN has no histogram; a resume voids later ones."""
    writer = MetricWriter(Workdir(tmp_path), 0)
    percentiles = np.linspace(-1, 3, 101)
    for step in (1, 2):
        writer.write_histograms(step, {"dense_0": percentiles, "dense_1": np.full(101, np.nan)})
    writer.flush()
    first, second = (event for event in events(tmp_path) if event.summary.value)
    (value,) = first.summary.value
    assert (value.tag, first.step, second.step) == ("dense_0", 1, 2)
    histogram = value.histo
    assert (histogram.min, histogram.max, histogram.num) == (-1, 3, 100)
    np.testing.assert_allclose(histogram.bucket_limit, percentiles)
    assert list(histogram.bucket) == [0] + [1] * 100
    np.testing.assert_allclose(histogram.sum, 100)  # a mean of 1
