"""What a process says to itself, where it is the only one."""

import pytest

from vmapbn_flax.errors import UsageError
from vmapbn_flax.multihost.processes import Processes, SharedError, joined


def test_it_hears_itself():
    processes = Processes()
    assert (processes.index, processes.count, processes.first) == (0, 1, True)
    with processes.together() as agreement:
        agreement.say(step=3)
        agreement.say(names=["a"])
    assert agreement.heard == [{"step": 3, "names": ["a"], "error": None}]
    processes.require_same({"seed": 0})


def test_its_error_is_its_own():
    with pytest.raises(UsageError, match=r"^wrong$") as error, Processes().together():
        raise UsageError("wrong")
    assert not isinstance(error.value, SharedError)


def test_joined_without_a_coordinator():
    with joined("", 1, 0) as processes:
        assert processes.count == 1
    with pytest.raises(ZeroDivisionError), joined("", 1, 0):
        raise ZeroDivisionError
