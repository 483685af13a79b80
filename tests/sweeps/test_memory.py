"""What a sweep takes of memory, measured, beside the estimate that its groups are made by."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import small
from tests.helpers.program import ROOT
from vmapbn_flax.training import mesh
from vmapbn_flax.training.members import member_bytes

WIDTH = 700
CONFIG = f"""
from configs import tiny

def get_config():
    config = tiny.get_config()
    config.model.hidden = ({WIDTH}, {WIDTH}, {WIDTH})
    config.train.num_epochs, config.optimizer.warmup_epochs = 0.01, 0.0
    config.data.validation_size = 5000
    config.sweep.seed = tuple(range(MEMBERS))
    return config
"""
PROGRAM = """
import sys
from pathlib import Path
from vmapbn_flax.cli.main import main
status = main(sys.argv[1:])
print(Path("/proc/self/status").read_text())
sys.exit(status)
"""


def peak_bytes(directory, members):
    """The most memory that a sweep of so many seeds has held, from the command to its end."""
    config = directory / f"{members}.py"
    config.write_text(CONFIG.replace("MEMBERS", str(members)))
    command = [sys.executable, "-c", PROGRAM, "train", f"--config={config}", f"--workdir={directory}/{members}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_the_estimate_is_what_a_member_takes(tmp_path):
    """Of the whole sweep, its checkpoints included; in differences, which leave out libraries and the data set."""
    few, many = 4, 12
    config = small.config(model__hidden=(WIDTH,) * 3, train__batch_size=128)
    estimate, devices = member_bytes(config, small.mnist()), mesh.member_mesh(config.mesh, few)
    estimated = estimate.of_group(many, devices) - estimate.of_group(few, devices)
    measured = peak_bytes(tmp_path, many) - peak_bytes(tmp_path, few)
    print(f"{estimated / (many - few) / 1e6:.1f} MB a member, measured {measured / (many - few) / 1e6:.1f} MB")
    assert 0.6 < estimated / measured < 1.5
