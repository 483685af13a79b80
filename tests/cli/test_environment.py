"""The process of a command: the cache of compiled programs, no home directory, other operating systems."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from vmapbn_flax.cli import environment
from vmapbn_flax.cli.main import main

ROOT = Path(__file__).parents[2]


def python(script, *arguments, **changes):
    """Runs a script in a process of its own, with `changes` of the environment; None removes a variable."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **changes}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=100,
    )


COMPILE = """
from vmapbn_flax.cli import environment
environment.prepare()
import jax
print(jax.jit(lambda x: x + 1)(1.0))
"""


def test_imports_are_not_searched_for_garbage():
    """A search of all there is happens twice otherwise, and again while the step is traced."""
    script = "import gc; from vmapbn_flax.cli import environment; environment.prepare(); import vmapbn_flax.runs.train"
    process = python(f"{script}; print(gc.get_stats()[2]['collections'])")
    assert (process.returncode, process.stdout) == (0, "0\n"), process.stderr


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_damaged_entries_of_the_cache(tmp_path, own):
    """One that only this program writes is replaced; elsewhere nothing is removed. Other entries stay, everywhere."""
    if own:
        directory = tmp_path / "vmapbn_flax"
        places = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": None}
    else:
        directory = tmp_path / "shared"
        places = {"JAX_COMPILATION_CACHE_DIR": str(directory)}
    places["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    assert python(COMPILE, **places).stderr == ""
    (entry,) = directory.glob("jit*lambda*-cache")
    whole, torn = entry.read_bytes(), entry.read_bytes()[:100]
    program, _, key = entry.name.rpartition("-cache")[0].rpartition("-")
    other = directory / f"{program}-{key[::-1]}-cache"  # of another program with a function of the same name
    other.write_bytes(b"another project's")
    entry.write_bytes(torn)

    done = python(COMPILE, **places)
    assert (done.returncode, done.stdout) == (0, "2.0\n")
    assert other.read_bytes() == b"another project's"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: {entry}: reading the compiled program {program!r} failed (")
    remedy = "again" if own else "at every start until you remove that file"
    assert line.endswith(f"; it is compiled {remedy}")
    assert len(entry.read_bytes()) == len(whole if own else torn)


TEMPORARIES = """
import resource, sys
from vmapbn_flax.cli import environment
if sys.argv[1] == "kept":
    environment.keep_freed_memory()
import jax, jax.numpy as jnp
function = jax.jit(lambda x, w: jnp.tanh(x @ w) @ w[:, 0])  # a temporary value of 51 MB
x, w = jnp.ones((100_000, 128)), jnp.ones((128, 128))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    function(x, w).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc returns large blocks to the system")
def test_memory_for_temporary_values_is_kept():
    """Or each call would have its page faults, 10,000 in a training step of a ConvNet.

    A few calls have them all the same: what another thread allocated meanwhile lies behind the block that was freed.
    """
    faults = {name: int(python(TEMPORARIES, name).stdout) for name in ("kept", "returned")}
    assert faults["returned"] > 40 * 10_000
    assert faults["kept"] < faults["returned"] / 2


@pytest.mark.parametrize(("config", "called"), [("configs/conv.py", True), ("configs/vmap_bn.py", False)])
def test_memory_is_kept_for_networks_with_convolutions(monkeypatch, tmp_path, config, called):
    """Not for MLPs, whose ten epochs took 1.2 times as long with an empty cache of compiled programs."""
    calls = []
    monkeypatch.setattr(environment, "keep_freed_memory", lambda: calls.append(config))
    assert main(["train", f"--config={config}", f"--workdir={tmp_path}", "--config.data.dir=/nowhere"]) == 2
    assert bool(calls) == called


BARE = """
import os, pwd, sys
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
for name in ("sched_getaffinity", "pidfd_open", "eventfd", "memfd_create", "posix_fallocate"):
    delattr(os, name)
os.process_cpu_count = os.cpu_count  # as where there are no affinities
from vmapbn_flax.cli.main import main
short = ["--config.train.num_epochs=0.01", "--config.optimizer.warmup_epochs=0.0", "--config.train.eval_every=1.0"]
for name, config in (
    ("run", ["--config=configs/tiny.py"]),
    ("sweep", ["--config=configs/sweep_seeds.py", "--config.sweep.seed=(0,1)", "--config.model.hidden=(8,)"]),
):
    assert main(["train", *config, *short, f"--workdir={sys.argv[1]}/{name}"]) == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="takes from Linux what macOS lacks")
def test_no_home_and_none_of_linux_s_own_functions(tmp_path):
    """As a user without an entry in the password file, and without what `os` has on Linux and lacks on macOS."""
    homes = {name: None for name in os.environ if name == "HOME" or name.startswith(("XDG_", "JAX_", "MPL"))}
    done = python(BARE, tmp_path, **homes)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "warning:" in line.lower()] == []
    assert (tmp_path / "run" / "accuracy.png").exists()
    assert (tmp_path / "sweep" / "sweep.png").exists()


WINDOWS = """
import sys
sys.modules["fcntl"] = None
sys.platform = "win32"
from vmapbn_flax.cli.main import main
sys.exit(main(["train", "--config=configs/tiny.py"]))
"""


def test_windows():
    done = python(WINDOWS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: got Windows, expected Linux or macOS. Use the Windows Subsystem for Linux (WSL).\n"
