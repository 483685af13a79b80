"""Networks by name: built in, or a module of one's own; and what a workdir may name."""

import json
import sys

import pytest

from configs import own_network
from tests.helpers import small
from tests.helpers.runs import command
from vmapbn_flax import MLP, default_config
from vmapbn_flax.cli.flags import parse_config
from vmapbn_flax.config import restore_config, validate
from vmapbn_flax.errors import UsageError
from vmapbn_flax.networks import BUILT_IN, attributes, choose_network, import_network, untrusted
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import expand, read_members
from vmapbn_flax.training.programs import Programs

OWN = "configs.own_network:Net"

NETWORKS = """
from collections.abc import Callable
from pathlib import Path
from flax import linen as nn

Path("imported").touch()

class Net(nn.Module):
    num_classes: int
    norm: Callable | None
    width: int
    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        return nn.Dense(self.num_classes)(nn.Dense(self.width)(x.reshape(-1)))

class NoNorm(nn.Module):
    num_classes: int

class NoModule:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory to stand in, with a module `mine` that leaves a file when it is imported."""
    (tmp_path / "mine.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_defaults_are_attributes_of_the_class(name):
    config = default_config(name)
    validate(config)
    network = import_network(name)(num_classes=3, norm=None, **attributes(config.model))
    for attribute, value in BUILT_IN[name].defaults.items():
        assert getattr(network, attribute) == value
    assert import_network(name, batched=True).__name__ == f"Batched{BUILT_IN[name].class_name}"


def test_plain_attributes_of_a_class_of_ones_own_are_fields(own):
    model = default_config("mine:Net").model
    assert attributes(model) == {"width": None, "rate": 0.1, "names": ("a", "b")}


def test_another_network_brings_its_own_attributes():
    config = default_config()
    choose_network(config, OWN)
    assert attributes(config.model) == {"width": 16}
    config.model.width = 3
    choose_network(config, OWN)  # it is chosen already
    assert attributes(config.model) == {"width": 3}
    choose_network(config, "mlp")
    assert config == default_config()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cnn", r"got 'cnn', expected one of mlp.*, or package\.module:Class"),
        ("MLP", r"got 'MLP', expected one of mlp"),
        ("mine:", "got 'mine:', expected one of mlp"),
        ("nowhere:Net", r"whose module cannot be imported \(No module named 'nowhere'\)"),
        ("mine:Nett", r"got 'mine:Nett', but mine has no Nett; .* Did you mean Net\?"),
        ("mine:NoModule", r"which is no flax\.linen\.Module"),
        ("mine:Path", r"which is no flax\.linen\.Module"),
        ("mine:NoNorm", "which has no attribute norm; expected both"),
    ],
)
def test_what_is_no_network(own, name, line):
    with pytest.raises(UsageError, match=rf"^config\.model\.name: .*{line}"):
        default_config(name)


def test_attributes_are_checked_before_data_loads(own):
    config = default_config("mine:Net")
    with pytest.raises(UsageError, match=r"^config\.model\.width: got no value, expected one: the network mine:Net"):
        validate(config)
    config.model.width = 4
    validate(config)
    with config.unlocked():
        config.model.widht = 4
    with pytest.raises(UsageError, match=r"^config\.model\.widht: .* network mine:Net does not have; did you mean wid"):
        validate(config)


def test_the_twin_of_a_network_of_ones_own(own):
    with pytest.raises(UsageError, match=r"got a batched norm for 'mine:Net', but mine has no BatchedNet; expected it"):
        import_network("mine:Net", batched=True)
    source = (own / "mine.py").read_text()
    (own / "mine.py").write_text(source + "\nclass BatchedNet(Net):\n    pass\n")
    del sys.modules["mine"]
    assert import_network("mine:Net", batched=True).__name__ == "BatchedNet"


def test_the_command_line_chooses_a_network_and_its_attributes():
    config, _ = parse_config(
        ["--config=configs/tiny.py", "--config.model.width=5", f"--config.model.name={OWN}", "--config.seed=7"]
    )
    assert (config.model.name, attributes(config.model), config.seed) == (OWN, {"width": 5}, 7)
    config, _ = parse_config(["--config=configs/own_network.py", "--config.model.name", "mlp"])
    assert attributes(config.model) == BUILT_IN["mlp"].defaults
    with pytest.raises(UsageError, match="got an unknown field"):
        parse_config(["--config=configs/tiny.py", f"--config.model.name={OWN}", "--config.model.hidden=(3,)"])


def test_a_sweep_over_networks():
    config = default_config()
    config.data.validation_size = 10
    config.sweep.model.name = ("mlp", OWN)
    found = {member.name: attributes(member.config.model) for member in expand(config)}
    assert found == {"name=mlp": BUILT_IN["mlp"].defaults, "name=configs.own_network_Net": {"width": 16}}


class WrongLogits(own_network.Net):
    def __call__(self, x, *, train, mask=None):
        return x


def test_logits_of_another_shape(unchecked):
    config = small.config()
    choose_network(config, f"{__name__}:WrongLogits")
    with pytest.raises(UsageError, match=r"got logits of shape \(3, 4, 1\) for one image from .*, expected \(4,\)"):
        Programs([config], small.dataset()).template()


# A workdir may come from anywhere.


def foreign(own):
    """The workdir of a run of `mine:Net`, without checkpoints."""
    config = default_config("mine:Net")
    config.model.width = 4
    workdir = own / "runs" / "foreign"
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (own / "imported").unlink()
    del sys.modules["mine"]
    return workdir


def test_a_workdir_names_no_code_to_run(own, capsys):
    workdir = foreign(own)
    saved = own / "saved.py"
    saved.write_text(
        "from configs.saved import get_config\n"  # a copy: one that is found from here
    )
    for argv in (["evaluate", workdir], ["refresh", workdir], ["train", f"--config=saved.py:{workdir}"]):
        status, lines = command(capsys, *argv)
        assert (status, len(lines)) == (2, 1), lines
        assert "config.model.name: got 'mine:Net' from a workdir, which must not name code to run" in lines[0]
    status, lines = command(capsys, "evaluate", workdir, "--network=mine:Other")
    assert (status, len(lines)) == (2, 1)
    assert "got a run of the network mine:Net; expected that name or none" in lines[0]
    assert not (own / "imported").exists()


def test_who_trusts_the_code_says_its_name(own, capsys):
    workdir = foreign(own)
    status, lines = command(capsys, "evaluate", workdir, "--network=mine:Net")
    assert status == 1, lines
    assert "checkpoints: got steps [], expected a checkpoint" in lines[-1]
    assert (own / "imported").exists()


def test_a_restored_config_keeps_the_attributes():
    config = own_network.get_config()
    config.model.width = 5
    restored = restore_config(default_config(), json.loads(json.dumps(config.to_dict())), "config.json")
    assert restored.model.name == untrusted(OWN) != OWN
    choose_network(restored, OWN)
    assert restored == config


def test_a_report_imports_nothing(own):
    config = default_config()
    config.data.validation_size = 10
    config.sweep.model.name = ("mlp", "mine:Net")
    for network in ("mlp", "mine:Net"):
        choose_network(config, network)  # of the base of the sweep
        if network != "mlp":
            config.model.width = 4
        workdir = Workdir(own / "runs" / network[:4])
        workdir.write(workdir.config, config.to_dict())
        (own / "imported").unlink(missing_ok=True)
        sys.modules.pop("mine", None)
        assert [member.values["model.name"] for member in read_members(workdir)] == ["mlp", "mine:Net"]
        assert not (own / "imported").exists()


def test_mlp_is_named_by_default():
    assert import_network(default_config().model.name) is MLP
