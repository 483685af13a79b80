import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_on_eight_devices():
    """`eight_devices.py`, in a process whose CPU is divided into as many."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/eight_devices.py"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
