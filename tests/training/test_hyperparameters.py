import numpy as np
import pytest

from tests.helpers import small
from vmapbn_flax import default_config
from vmapbn_flax.config import resume_changes, validate
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.fields import FIELDS, Field
from vmapbn_flax.sweeps.expand import program_key
from vmapbn_flax.training.hyperparameters import make_hyperparameters, steps_in


def test_steps_in_fractions_of_epochs():
    assert [steps_in(epochs, 468) for epochs in (0.0, 0.1, 1.0, 2.5, 1 / 468)] == [0, 47, 468, 1170, 1]


def test_hyperparameters_are_the_config_s_numbers():
    config = small.config(seed=2**32 - 1, optimizer__warmup_epochs=0.5, optimizer__weight_decay=0.1)
    hyper = make_hyperparameters(config, small.STEPS_PER_EPOCH)
    assert hyper["seed"] == 2**32 - 1
    assert (hyper["optimizer.warmup_steps"], hyper["train.num_steps"]) == (3, 4 * small.STEPS_PER_EPOCH)
    assert hyper["optimizer.weight_decay"] == np.float32(0.1)
    assert hyper["model.batch_norm_epsilon"] == np.float32(1e-5)
    dtypes = {name: value.dtype.name for name, value in hyper.items()}
    assert dtypes.pop("seed") == "uint32"
    assert dtypes.pop("optimizer.warmup_steps") == dtypes.pop("train.num_steps") == "int32"
    assert dtypes.pop("model.renorm_warmup_steps") == dtypes.pop("model.renorm_full_steps") == "int32"
    assert len(dtypes) == 10
    assert set(dtypes.values()) == {"float32"}


def test_more_steps_than_an_int32_holds():
    hyper = make_hyperparameters(small.config(model__renorm_full_epochs=1e300), small.STEPS_PER_EPOCH)
    assert hyper["model.renorm_full_steps"] == 2**31 - 1


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.traced])
def test_every_traced_field_arrives(name):
    config = default_config()
    before = make_hyperparameters(config, steps_per_epoch=10)
    config.update_from_flattened_dict({name: 1 if name == "seed" else 0.25})
    after = make_hyperparameters(config, steps_per_epoch=10)
    changed = [key for key in before if before[key] != after[key]]
    assert changed == [name.replace("_epochs", "_steps")]


def test_a_new_number_is_a_line_in_the_table(monkeypatch):
    """Checked, kept by a resume, an argument of the program: a default and a line in the table are all it takes."""
    field = Field("0 or more", lambda value, config: value >= 0, traced=np.float32)
    monkeypatch.setitem(FIELDS, "optimizer.clip", field)
    config, other = default_config().unlock(), default_config().unlock()
    with pytest.raises(UsageError, match=r"config\.optimizer\.clip: got a config without this field"):
        validate(config)
    config.optimizer.clip, other.optimizer.clip = 0.5, -1.0
    validate(config)
    with pytest.raises(UsageError, match=r"config\.optimizer\.clip: got -1\.0, expected 0 or more"):
        validate(other)
    hyper = make_hyperparameters(config, small.STEPS_PER_EPOCH)
    assert (hyper["optimizer.clip"], hyper["optimizer.clip"].dtype) == (0.5, np.float32)
    assert program_key(config) == program_key(other)
    with pytest.raises(RunError, match=r"config\.optimizer\.clip: 0\.5 -> -1\.0"):
        resume_changes(config.to_dict(), other)
