"""Files of a workdir, a checkpoint and a prepared data set that are wrong in any way: an error of ours, or success.

Each test draws mutations of a file that was written by the program. `pytest -n0 -m slow tests/test_fuzz.py` draws fifty
times as many.
"""

import contextlib
import hashlib
import json
import shutil
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.helpers.mutations import damaged, json_files, line_files
from tests.helpers.prepare import as_examples, prepare
from vmapbn_flax import default_config
from vmapbn_flax.config import restore_config
from vmapbn_flax.data import Split, prepared
from vmapbn_flax.errors import UserError
from vmapbn_flax.files import read_lines
from vmapbn_flax.runs.checkpoints import Checkpoints, restore
from vmapbn_flax.runs.loading import load_config
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import expand, read_members
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.sweeps.results import read_settings

_LONGEST = 20  # seconds; most cases take a thousandth of it
_FORBIDDEN = {"pickle.find_class", "os.system", "os.exec", "os.fork", "subprocess.Popen", "socket.connect"}
_WRITES = "wax+"

watching: list[tuple[str, str]] | None = None  # what happened that must not; None while nobody watches
allowed = ""  # where files may be written


def _watch(event, arguments):
    if watching is None:
        return
    if event in _FORBIDDEN or (event == "import" and "payload" in str(arguments[0])):
        watching.append((event, str(arguments)))
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set(_WRITES)
    if writes and not str(arguments[0]).startswith(allowed):
        watching.append((event, str(arguments)))


sys.addaudithook(_watch)  # it stays for as long as the process


@contextlib.contextmanager
def watched():
    """Fails if what runs in it executes or imports something, writes outside `allowed`, or takes long."""
    global watching
    started = time.monotonic()
    watching = []
    try:
        yield
    finally:
        seen, watching = watching, None
    assert seen == []
    assert time.monotonic() - started < _LONGEST


def check(path, files, examples, read, prepare=lambda: None):
    """Writes `examples` files to `path`; `read` must succeed or raise a UserError."""
    whole = path.read_bytes()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(files)
    def run(content):
        path.write_bytes(content)
        prepare()
        with watched(), contextlib.suppress(UserError):
            read()

    try:
        read()  # what the program wrote
        run()
    finally:
        path.write_bytes(whole)


def often(few):
    """So many examples; and, in the long run, fifty times as many."""
    return pytest.mark.parametrize("examples", [few, pytest.param(50 * few, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def as_users_have_it(unchecked, tmp_path):
    """Not the errors of the import hook."""
    global allowed
    allowed = str(tmp_path)


# A run and a sweep.

SWEPT = default_config()
SWEPT.data.validation_size = 10
SWEPT.sweep.seed = (0, 1)
SWEPT.sweep.optimizer.learning_rate = (1e-3, 1e-2)
SWEPT = json.loads(json.dumps(SWEPT.to_dict()))
SOLO = json.loads(json.dumps(default_config().to_dict()))
ROWS = [
    {"step": 3, "train_loss": 0.5, "train_accuracy": None, "learning_rate": 1e-3},
    {"step": 6, "validation_accuracy": 0.5, "test_accuracy": 0.25, "test_count": 37},
]


@pytest.fixture
def run(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.write(workdir.config, SOLO)
    workdir.metrics.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return workdir


@pytest.fixture
def sweep(tmp_path):
    workdir = Workdir(tmp_path / "sweep")
    config = default_config()
    restore_config(config, SWEPT, "")
    ledger = Ledger(workdir)
    ledger.add([[member.name for member in expand(config)]])
    ledger.mark(ledger.members, "done", 6)
    workdir.write(workdir.config, SWEPT)
    for name in ledger.members:
        member = workdir.member(name)
        member.write(member.config, SOLO)
        member.metrics.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return workdir


@often(100)
def test_config_of_a_run(run, examples):
    check(run.config, json_files(SOLO), examples, lambda: load_config(run))


@often(100)
def test_config_to_repeat(run, examples):
    check(run.config, json_files(SOLO), examples, lambda: restore_config(default_config(), run.read_config(), "it"))


DRAWN = SWEPT | {
    "sweep": {
        "seed": [0, 1, 2],
        "optimizer": {"learning_rate": ["log_uniform", 1e-3, 1e-2], "adam_b1": ["uniform", 0, 1]},
    },
    "sweep_options": SWEPT["sweep_options"] | {"mode": "random", "size": 4},
}


@often(40)
@pytest.mark.parametrize("content", [SWEPT, DRAWN], ids=["product", "random"])
def test_config_of_a_sweep(sweep, examples, content):
    def read():
        read_settings(sweep)
        expand(restore_config(default_config(), sweep.read_config(), "it"))

    check(sweep.config, json_files(content), examples, read)


@often(60)
def test_ledger(sweep, examples):
    content = json.loads(sweep.ledger.read_text())
    check(sweep.ledger, json_files(content), examples, lambda: read_settings(sweep))


@often(60)
def test_ledger_of_proposals(sweep, examples):
    content = json.loads(sweep.ledger.read_text())
    drawn = [member.values for member in expand(restore_config(default_config(), DRAWN, ""))]
    sweep.write(sweep.config, DRAWN | {"sweep_options": DRAWN["sweep_options"] | {"mode": "optuna"}})
    content["proposals"] = json.loads(json.dumps([drawn[:3], drawn[3:]]))
    sweep.write(sweep.ledger, content)
    assert [member.values for member in read_members(sweep)] == drawn
    check(sweep.ledger, json_files(content), examples, lambda: read_settings(sweep))


@often(100)
def test_rows(run, examples):
    def read():
        for _, row in read_lines(run.metrics):
            assert all(value is None or np.isfinite(float(value)) for value in row.values())

    check(run.metrics, line_files(ROWS), examples, read)


@often(30)
def test_rows_of_a_member(sweep, examples):
    (first, *_) = Ledger(sweep).members
    check(sweep.member(first).metrics, line_files(ROWS), examples, lambda: read_settings(sweep))


# A checkpoint.

STATE = {"kernel": np.ones((4, 5), np.float32), "step": np.int32(3)}


@pytest.fixture
def checkpoint(tmp_path):
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(3, STATE, {"runs": [{"name": "", "config": SOLO, "rows": 2}]})
    saved.close()
    return tmp_path / "checkpoints" / "3"


def resum(checkpoint):
    """Makes the sums those of the files, as someone who means harm would."""
    files = sorted(file for item in ("meta", "state") for file in (checkpoint / item).rglob("*") if file.is_file())
    sums = (f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(checkpoint)}\n" for file in files)
    (checkpoint / "SHA256").write_text("".join(sums))


# Of orbax's own threads, which the command line keeps quiet: see `cli/environment.py`.
quiet = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@quiet
@often(15)
@pytest.mark.parametrize("file", ["meta/metadata", "state/_METADATA", "_CHECKPOINT_METADATA"])
def test_json_of_a_checkpoint(checkpoint, examples, file):
    def read():
        state, meta = restore(checkpoint.parent, 3, STATE)
        assert state["kernel"].shape == (4, 5)
        assert [type(run["config"]) for run in meta["runs"]] == [dict] * len(meta["runs"])

    path = checkpoint / file
    content = json.loads(path.read_text())
    check(path, json_files(content), examples, read, lambda: resum(checkpoint))


@quiet
@often(15)
def test_arrays_of_a_checkpoint(checkpoint, examples):
    """As plain zarr files, which orbax reads too, and whose JSON anyone can write."""
    state = checkpoint / "state"
    for entry in state.iterdir():
        if entry.name != "_METADATA":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    tree = json.loads((state / "_METADATA").read_text())
    (state / "_METADATA").write_text(json.dumps(tree | {"use_ocdbt": False}))
    described = {"zarr_format": 2, "compressor": None, "fill_value": None, "filters": None, "order": "C"}
    contents = {}
    for name, leaf in STATE.items():
        (state / name).mkdir()
        contents[name] = described | {"shape": leaf.shape, "chunks": leaf.shape, "dtype": leaf.dtype.str}
        contents[name] = json.loads(json.dumps(contents[name]))
        (state / name / ".zarray").write_text(json.dumps(contents[name]))
        (state / name / ("0.0" if leaf.shape else "0")).write_bytes(leaf.tobytes())
    resum(checkpoint)

    def read():
        assert restore(checkpoint.parent, 3, STATE)[0]["kernel"].shape == (4, 5)

    check(state / "kernel/.zarray", json_files(contents["kernel"]), examples, read, lambda: resum(checkpoint))


# A prepared data set.


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "tfds" / "cache"))
    three = as_examples(Split(np.zeros((3, 28, 28), np.uint8), np.arange(3, dtype=np.int32)))
    return prepare(tmp_path / "tfds", {"train": three, "test": three})


@often(60)
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_description_of_a_prepared_set(digits, examples, file):
    def read():
        dataset = prepared.load("digits", str(digits), max_bytes=0)  # nothing in a cache
        assert (len(dataset.train), dataset.train.read(np.array([2])).images.shape[0]) == (3, 1)

    path = digits / "digits/1.0.0" / file
    check(path, json_files(json.loads(path.read_text())), examples, read)


@often(40)
@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_of_a_prepared_set(digits, examples, split):
    path = next((digits / "digits/1.0.0").glob(f"digits-{split}.array_record*"))
    check(path, damaged(path.read_bytes()), examples, lambda: prepared.load("digits", str(digits)))
