"""What two processes, of two devices each, read of one state that lies on the devices of both."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.helpers import small
from tests.training.test_members import alone, configs, trained
from vmapbn_flax.training import mesh
from vmapbn_flax.training.programs import Programs

ROOT = Path(__file__).parents[2]


def work(process, port, count, output):
    """What one of the processes does, for three members or for one run."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    members = configs()[: int(count)]
    programs = Programs(members, small.dataset(), mesh.member_mesh(members[0].mesh, 4))
    state = trained(programs)
    saved = programs.snapshot(state)
    state = programs.advance(state, 5, 1)  # uses the state up, and not what was read of it
    found = {
        "shapes": [leaf.shape for leaf in jax.tree.leaves(saved)],
        "split": jax.tree.leaves(programs.split(saved)),
        "measured": jax.tree.leaves(programs.measure(saved)),
        "rates": programs.learning_rates(4),
    }
    again = programs.place(programs._members.stack(programs.split(saved)))
    found["placed"] = jax.tree.leaves(programs.split(programs.advance(again, 5, 1)))
    found["advanced"] = jax.tree.leaves(programs.split(state))
    Path(output).write_bytes(pickle.dumps(found))
    jax.distributed.shutdown()


@pytest.fixture(scope="module", params=[3, pytest.param(1, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """How many members there are, and what each process found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outputs = [tmp_path_factory.mktemp("found") / str(process) for process in range(2)]
    command = (
        "import sys; from tests.training.test_two_processes import work; work(*map(int, sys.argv[1:4]), sys.argv[4])"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(process), str(port), str(request.param), str(output)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )
        for process, output in enumerate(outputs)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return request.param, [pickle.loads(output.read_bytes()) for output in outputs]


def test_all_processes_read_the_same(found):
    count, (first, second) = found
    for name in ("split", "measured", "rates", "placed", "advanced"):
        small.assert_same_bits(first[name], second[name])
    small.assert_same_bits(first["placed"], first["advanced"])
    assert len(first["rates"]) == count


def test_numbers_are_those_of_one_process(found):
    count, each = found
    programs = Programs(configs()[:count], small.dataset(), mesh.member_mesh(configs()[0].mesh, count))
    small.assert_close(each[0]["split"], jax.tree.leaves(programs.split(trained(programs))))


def test_a_snapshot_is_padded(found):
    count, each = found
    shapes = [leaf.shape for leaf in jax.tree.leaves(alone(0).template())]
    for process in each:
        assert process["shapes"] == (shapes if count == 1 else [(4, *shape) for shape in shapes])
