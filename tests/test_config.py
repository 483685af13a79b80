import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import default, saved, tiny, vmap_bn
from vmapbn_flax import default_config
from vmapbn_flax.cli.flags import parse_config
from vmapbn_flax.config import flat, is_sweep, restore_config, resume_changes, validate, validate_sizes
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.fields import FIELDS, NETWORK_FIELDS
from vmapbn_flax.networks import BUILT_IN
from vmapbn_flax.sweeps.expand import expand

NAN, INF = float("nan"), float("inf")


def changed(**changes):
    config = default_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def saved_as_json(config):
    return json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 2**32 - 1},
        {"model__norm": "none", "train__batch_size": 1},
        {"model__batch_norm_momentum": 0.0},
        {"model__ghost_batch_size": 32},
        {"model__hidden": (1,)},
        {"model__hidden": (2**16,)},
        {"optimizer__warmup_epochs": 20.0},
        {"optimizer__warmup_epochs": 0.0},
        {"train__num_epochs": 0.01, "optimizer__warmup_epochs": 0.0},
    ],
)
def test_valid(changes):
    validate(changed(**changes))


INVALID = [
    ("seed", -1),
    ("seed", 2**32),
    ("data.name", ""),
    ("data.test_fraction", 1.0),
    ("data.test_fraction", -0.1),
    ("data.test_fraction", NAN),
    ("data.validation_size", -1),
    ("data.augment", ("rotate",)),
    ("data.augment", ("shift",)),
    ("data.augment", ("flip:2",)),
    ("data.augment", ("cutout:0",)),
    ("data.augment", (2,)),
    ("data.threshold", -0.1),
    ("data.threshold", 1.5),
    ("data.threshold", NAN),
    ("data.memory_limit", 0.0),
    ("data.memory_limit", INF),
    ("model.name", "cnn"),
    ("model.name", ""),
    ("model.norm", "layer"),
    ("model.dtype", "float16"),
    ("model.hidden", ()),
    ("model.hidden", (100, 0)),
    ("model.hidden", (100, 1.5)),
    ("model.hidden", (100, 2**16 + 1)),
    ("model.kernel_std", -0.1),
    ("model.kernel_std", INF),
    ("model.features", ()),
    ("model.blocks", (3, 0)),
    ("model.width", 0),
    ("model.bottleneck", 1),
    ("model.imagenet", "yes"),
    ("model.zero_scale", "no"),
    ("model.batch_norm_momentum", 1.0),
    ("model.batch_norm_momentum", -0.1),
    ("model.batch_norm_momentum", NAN),
    ("model.batch_norm_epsilon", 0.0),
    ("model.batch_norm_epsilon", INF),
    ("model.renorm_r_max", 0.9),
    ("model.renorm_r_max", INF),
    ("model.renorm_d_max", -0.1),
    ("model.renorm_d_max", NAN),
    ("model.renorm_warmup_epochs", -1.0),
    ("model.renorm_full_epochs", INF),
    ("model.freeze_norm_after", -1.0),
    ("model.freeze_norm_after", 20.0),
    ("model.freeze_norm_after", NAN),
    ("model.ghost_batch_size", 1),
    ("model.ghost_batch_size", 48),
    ("model.ghost_batch_size", -2),
    ("optimizer.name", "lion"),
    ("optimizer.learning_rate", 0.0),
    ("optimizer.learning_rate", -1e-3),
    ("optimizer.learning_rate", NAN),
    ("optimizer.learning_rate", INF),
    ("optimizer.schedule", "linear"),
    ("optimizer.warmup_epochs", -1.0),
    ("optimizer.warmup_epochs", 20.5),
    ("optimizer.weight_decay", -0.1),
    ("optimizer.weight_decay", NAN),
    ("optimizer.adam_b1", 1.0),
    ("optimizer.adam_b2", 1.0),
    ("optimizer.sgd_momentum", 1.0),
    ("train.batch_size", 1),
    ("train.batch_size", -5),
    ("train.num_epochs", 0.0),
    ("train.num_epochs", INF),
    ("train.num_epochs", NAN),
    ("train.label_smoothing", 1.0),
    ("train.label_smoothing", -0.1),
    ("train.log_every", 0),
    ("train.eval_every", 0.0),
    ("train.eval_every", NAN),
    ("train.eval_batch_size", 0),
    ("train.watch", ("",)),
    ("train.watch", ("dense_0[-1]",)),
    ("train.watch", ("dense_0[]",)),
    ("train.watch", (1,)),
    ("train.max_skipped_steps", 0),
    ("mesh.data", -1),
    ("mesh.member", -1),
    ("mesh.cpu_devices", -1),
    ("mesh.replicate_limit", -1),
    ("distributed.coordinator", "host"),
    ("distributed.num_processes", 0),
    ("distributed.num_processes", 2),
    ("distributed.process_id", 1),
    ("distributed.process_id", -1),
    ("sweep_options.mode", "grid"),
    ("sweep_options.size", 0),
    ("sweep_options.batch", 0),
    ("sweep_options.seed", -1),
    ("sweep_options.chunk", -1),
    ("sweep_options.on_failure", "retry"),
    ("sweep_options.halving", 1),
    ("sweep_options.halving", -3),
    ("sweep_options.first_rung", 0.0),
    ("sweep_options.first_rung", INF),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_invalid_value_is_named(name, value):
    config = default_config(next((network for network, fields in NETWORK_FIELDS.items() if name in fields), "mlp"))
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(UsageError) as error:
        validate(config)
    message = str(error.value)
    assert error.value.exit_status == 2
    assert message.startswith(f"config.{name}: got {value!r}, expected")
    assert f"--config.{name}=" in message
    assert "\n" not in message


def test_every_number_and_choice_has_an_invalid_value():
    free = {"data.dir", "train.profile"}
    assert {name for name, _ in INVALID} | free == set(FIELDS).union(*NETWORK_FIELDS.values())


def test_the_table_has_every_field_of_the_defaults_and_no_other():
    assert set(NETWORK_FIELDS) == set(BUILT_IN)
    for name, fields in NETWORK_FIELDS.items():
        assert set(FIELDS | fields) == set(flat(default_config(name)))


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(name):
    config = default_config().unlock()
    *sections, leaf = name.split(".")
    del (config[sections[0]] if sections else config)[leaf]
    message = rf"^config\.{name}: got a config without this field, expected every field of vmapbn_flax\.default_config"
    with pytest.raises(UsageError, match=message):
        validate(config)


def test_a_value_of_another_type_is_named():
    config = default_config()
    with config.ignore_type():
        config.train.batch_size = "many"
    with pytest.raises(UsageError, match=r"^config\.train\.batch_size: got 'many', expected 2 or more examples"):
        validate(config)


def test_a_misspelt_field_raises():
    config = default_config()
    with pytest.raises(AttributeError, match='Did you mean "num_epochs"'):
        config.train.num_epoch = 3.0
    config.sweep.optimizer.learning_rate = (0.1, 0.2)  # what is swept is new there


def test_each_default_config_is_its_own():
    default_config().model.norm = "none"
    assert default_config().model.norm == "vmap"


def test_checks_do_without_jax():
    """So that the command line answers at once."""
    code = (
        "import sys; from vmapbn_flax import default_config; from vmapbn_flax.config import validate\n"
        "from vmapbn_flax.sweeps.expand import expand; validate(default_config()); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_profile_is_a_boolean():
    config = default_config()
    with config.ignore_type():
        config.train.profile = 2
    with pytest.raises(UsageError, match=r"config\.train\.profile: got 2, expected True or False"):
        validate(config)


def test_ghost_batches_need_a_norm():
    with pytest.raises(UsageError, match=r"config\.model\.ghost_batch_size: got 32, expected 0, or with a norm"):
        validate(changed(model__norm="none", model__ghost_batch_size=32))


def test_freezing_needs_a_norm():
    with pytest.raises(UsageError, match=r"config\.model\.freeze_norm_after: got 3\.0, expected 0, or with a norm"):
        validate(changed(model__norm="none", model__freeze_norm_after=3.0))


def test_freezing_before_the_first_step():
    validate_sizes(changed(train__batch_size=10, model__freeze_norm_after=0.1), 100)
    with pytest.raises(UsageError, match=r"config\.model\.freeze_norm_after: got 0\.01, which is before the first"):
        validate_sizes(changed(train__batch_size=10, model__freeze_norm_after=0.01), 100)


def test_sizes():
    config = changed(train__batch_size=100)
    validate_sizes(config, 100)
    with pytest.raises(UsageError, match=r"config\.train\.batch_size: got 100, expected at most the 99 training"):
        validate_sizes(config, 99)


@pytest.mark.parametrize(("epochs", "valid"), [(0.05, False), (0.1, True), (2e8, True), (3e8, False), (1e308, False)])
def test_number_of_steps(epochs, valid):
    config = changed(train__batch_size=10, train__num_epochs=epochs)
    if valid:
        validate_sizes(config, 100)
    else:
        with pytest.raises(UsageError, match=r"config\.train\.num_epochs: got .*at least one step, 0\.1 epochs here"):
            validate_sizes(config, 100)


# Resuming.


def test_same_config_resumes_without_a_word():
    assert resume_changes(saved_as_json(default_config()), default_config()) == []


def test_lists_are_tuples():
    assert saved_as_json(default_config())["model"]["hidden"] == [100, 100, 100]
    fields = flat(restore_config(default_config(), saved_as_json(tiny.get_config()), "here"))
    assert fields["model.hidden"] == (16, 16)
    assert flat(changed(model__hidden=(3,))) == flat(default_config()) | {"model.hidden": (3,)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.num_epochs", 40.0),
        ("data.dir", "elsewhere"),
        ("data.memory_limit", 0.5),
        ("train.log_every", 1),
        ("train.eval_every", 2.0),
        ("train.eval_batch_size", 7),
        ("train.max_skipped_steps", 3),
        ("train.profile", True),
    ],
)
def test_may_change(name, value):
    old = default_config()
    was = flat(old)[name]
    changes = resume_changes(saved_as_json(old), changed(**{name.replace(".", "__"): value}))
    assert changes == [f"config.{name}: {was!r} -> {value!r}"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.num_epochs", 10.0),
        ("seed", 1),
        ("data.name", "fashion_mnist"),
        ("data.test_fraction", 0.1),
        ("data.validation_size", 10),
        ("model.norm", "batched"),
        ("model.hidden", (100, 100)),
        ("optimizer.learning_rate", 1e-3),
        ("optimizer.warmup_epochs", 2.0),
        ("train.batch_size", 64),
        ("train.label_smoothing", 0.1),
    ],
)
def test_may_not_change(name, value):
    old = default_config()
    was = flat(old)[name]
    with pytest.raises(RunError) as error:
        resume_changes(saved_as_json(old), changed(**{name.replace(".", "__"): value, "train__log_every": 1}))
    message = str(error.value)
    assert f"(config.{name}: {was!r} -> {value!r})" in message  # and not the change that is allowed
    assert "another --workdir" in message


def test_every_refused_change_is_listed():
    with pytest.raises(RunError, match=r"config\.model\.norm: 'vmap' -> 'none'; config\.seed: 0 -> 1"):
        resume_changes(saved_as_json(default_config()), changed(seed=1, model__norm="none"))


def test_fields_that_one_side_lacks():
    old = saved_as_json(default_config())
    with pytest.raises(RunError, match=r"config\.train\.num_epochs: None -> 20\.0"):
        resume_changes({}, default_config())
    with pytest.raises(RunError, match=r"config\.dropout: 0\.5 -> None"):
        resume_changes(old | {"dropout": 0.5}, default_config())


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid(path):
    if path.stem == "saved":
        return
    config, _ = parse_config([f"--config={path}"])
    assert expand(config) if is_sweep(config) else validate(config) is None


# Saved configs.


def test_saved_config_comes_back(tmp_path):
    config = changed(seed=7, model__hidden=(3, 4), optimizer__learning_rate=1.0, data__dir="there")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert flat(saved.get_config(str(tmp_path))) == flat(config)
    assert flat(vmap_bn.get_config()) == flat(default.get_config()) == flat(default_config())


@pytest.mark.parametrize(
    "content",
    [
        {"dropout": 0.5},
        {"model": {"width": 3}},
        {"model": 3},
        {"seed": "zero"},
        {"seed": 1.5},
        {"seed": None},
        {"model": {"hidden": "wide"}},
        [1, 2],
        None,
    ],
)
def test_what_no_run_saved_is_refused(content):
    with pytest.raises(RunError, match=r"^there/config\.json: got a config that does not fit \(.+\); expected one"):
        restore_config(default_config(), content, "there/config.json")


def test_integers_are_numbers():
    config = restore_config(default_config(), {"train": {"num_epochs": 3}}, "here")
    assert (config.train.num_epochs, type(config.train.num_epochs)) == (3.0, float)


def test_a_zero_scale_needs_a_norm():
    config = default_config("resnet")
    config.model.zero_scale = True
    validate(config)
    config.model.norm = "none"
    with pytest.raises(UsageError, match=r"config\.model\.zero_scale: got True, expected .* with model\.norm=none F"):
        validate(config)
