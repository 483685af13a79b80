"""The plan of a sweep: which members train together, fixed in the ledger and printed before anything trains."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vmapbn_flax.config import flat, restore_config, resume_changes
from vmapbn_flax.data import Dataset, load_dataset
from vmapbn_flax.defaults import default_config
from vmapbn_flax.errors import RunError, UsageError
from vmapbn_flax.files import in_threads
from vmapbn_flax.runs import console
from vmapbn_flax.runs.loading import load_config
from vmapbn_flax.runs.workdir import Workdir
from vmapbn_flax.sweeps.expand import Member, chunk, program_groups, program_key, read_members
from vmapbn_flax.sweeps.ledger import Ledger
from vmapbn_flax.training import mesh
from vmapbn_flax.training.hyperparameters import steps_in
from vmapbn_flax.training.members import member_bytes
from vmapbn_flax.training.watch import require_watched

_SHOWN = 20  # groups in the table
_MEMORY_SHARE = 0.5  # of the devices' memory, that a group may take by its estimate


class Datasets:
    """The data sets of a sweep; only the last one stays in memory."""

    def __init__(self) -> None:
        self._loaded: dict[tuple, Dataset] = {}

    def load(self, config: ConfigDict) -> Dataset:
        """The data set of a member.

        Raises:
          UsageError: the data set cannot be loaded, or is larger than the memory limit.
        """
        data = config.data
        key = (data.name, data.dir, data.test_fraction, data.validation_size, data.memory_limit, data.threshold)
        if key not in self._loaded:
            self._loaded = {key: load_dataset(data)}
        dataset = self._loaded[key]
        if dataset.streamed:  # each member would need windows in an order of its own
            raise UsageError(
                f"config.data.memory_limit: got {data.memory_limit}, expected at least "
                f"{dataset.gigabytes}, for {data.name}, which the members of a sweep share in memory. "
                f"Raise it with --config.data.memory_limit=..., or train the members one by one."
            )
        return dataset


def make_plan(
    config: ConfigDict,
    workdir: Workdir,
    members: Mapping[str, Member],
    datasets: Datasets,
    batch: Sequence[dict[str, Any]] = (),
) -> Ledger:
    """The ledger, with groups for new members; prints the plan.

    Args:
      batch: the values of the new members, if they were proposed.

    Raises:
      RunError: `workdir` is a run's, or that of a sweep with other members, or its ledger is damaged.
    """
    ledger = Ledger(workdir)
    if workdir.is_run:
        raise RunError(f"{workdir}: got the workdir of a run, expected that of a sweep. Choose another --workdir.")
    if missing := [name for name in ledger.members if name not in members]:
        raise RunError(
            f"{workdir}: got a sweep without its member {missing[0]}, expected all that it has; values may be added "
            f"to a sweep, not taken away. Put them back, or choose another --workdir."
        )
    saved = {member.name: member for member in read_members(workdir)} if workdir.config.exists() else {}
    _require_ledger(workdir, ledger, [*saved, *members])
    for name in ledger.members:
        _require_same(workdir, ledger, members[name], saved.get(name), datasets)
    if ledger.members:
        new = [name for name in members if name not in ledger.members]
        _require_same_rungs(workdir, ledger, new, config.sweep_options)
    _add_members(config, workdir, ledger, members, datasets, batch)
    _say_plan(workdir, ledger, members, datasets)
    return ledger


def extend_plan(
    config: ConfigDict,
    workdir: Workdir,
    ledger: Ledger,
    members: Mapping[str, Member],
    datasets: Datasets,
    batch: Sequence[dict[str, Any]],
) -> None:
    """Adds to a `ledger` that fits the workdir those of `members` that it lacks, whose values are `batch`.

    Raises:
      RunError: one of them has trained, though the ledger lacks it.
    """
    _require_ledger(workdir, ledger, members)
    first = len(ledger.groups)
    _add_members(config, workdir, ledger, members, datasets, batch)
    _say_plan(workdir, ledger, members, datasets, first)


def _add_members(
    config: ConfigDict,
    workdir: Workdir,
    ledger: Ledger,
    members: Mapping[str, Member],
    datasets: Datasets,
    batch: Sequence[dict[str, Any]],
) -> None:
    new = [name for name in members if name not in ledger.members]
    plan = divide([members[name] for name in new], config.sweep_options, datasets)
    # The ledger last: wherever this ends early, its members are in the config and have configs of their own.
    owns = {name: workdir.member(name) for name in members}
    to_write = [name for name, own in owns.items() if name not in ledger.members or not own.config.exists()]
    in_threads(lambda name: owns[name].write(owns[name].config, members[name].config.to_dict()), to_write)
    workdir.write(workdir.config, config.to_dict())
    ledger.add(plan, batch)


def divide(members: Sequence[Member], options: ConfigDict, datasets: Datasets) -> list[list[str]]:
    """The names of `members` in groups, each of which one program trains and memory holds.

    Args:
      options: the section `sweep_options` of the sweep's config.

    Raises:
      UsageError: the data cannot be used, or a layer to watch does not exist.
    """
    groups = []
    for together in program_groups(members):
        most = options.chunk or _most_members(together, datasets)
        dataset = datasets.load(together[0].config)
        require_watched(together[0].config, dataset.num_classes, dataset.train.image_shape)
        groups += [[member.name for member in part] for part in chunk(together, most)]
    return groups


def _require_same_rungs(workdir: Workdir, ledger: Ledger, new: Sequence[str], options: ConfigDict) -> None:
    """Refuses other rungs than those of the sweep, and `new` members before the others are through all rungs."""
    if workdir.config.exists():
        saved = restore_config(default_config(), workdir.read_config(), str(workdir.config))
        resume_changes({"sweep_options": saved.sweep_options.to_dict()}, ConfigDict({"sweep_options": options}))
    if options.halving and new and not all(map(ledger.is_over, ledger.members)):
        raise RunError(
            f"{workdir}: got the new member {new[0]} in a sweep with rungs that is not finished; expected one "
            f"that is, for a rung ranks the members that began together. Finish the sweep with the values that it has, "
            f"or choose another --workdir."
        )


def _require_ledger(workdir: Workdir, ledger: Ledger, names: Iterable[str]) -> None:
    """Refuses a sweep whose ledger is lost, or older than the rest of the workdir."""
    trained = [name for name in names if name not in ledger.members and workdir.member(name).metrics.exists()]
    if trained:
        raise RunError(
            f"{workdir.ledger}: got {'no entry' if workdir.is_sweep else 'no such file, nor an entry'} of the member "
            f"{trained[0]}, which has trained; expected an entry of every member. Put the file back from a copy, or "
            f"choose another --workdir. Without it, the members can only be evaluated, or continued one by one."
        )


def _require_same(workdir: Workdir, ledger: Ledger, member: Member, saved: Member | None, datasets: Datasets) -> None:
    """Refuses a member that differs from what its own config says, or from `saved`, what the sweep's config says."""
    own = workdir.member(member.name)
    before = [saved.config] if saved else []
    if own.config.exists():
        fields = flat(member.config)
        if flat(own.read_config()) == fields and (not saved or flat(saved.config) == fields):
            return  # as in nearly every sweep; what follows takes much longer
        before.append(load_config(own))
        if _is_continued_alone(before[-1], ledger, member, datasets):
            before[-1].train.num_epochs = member.config.train.num_epochs
    elif not saved and ledger.is_over(member.name):
        raise RunError(
            f"{own.config}: got no such file, nor one of the sweep; expected the config that the member was trained "
            f"with. Put one of them back from a copy, or choose another --workdir."
        )
    for config in before:
        changes = resume_changes(config.to_dict(), member.config)
        if any("train.num_epochs" in change for change in changes):
            raise RunError(
                f"{workdir}: got another train.num_epochs, expected that of the sweep. Continue its members one "
                f"by one, or choose another --workdir."
            )


def _is_continued_alone(own: ConfigDict, ledger: Ledger, member: Member, datasets: Datasets) -> bool:
    """Whether `own` is for more epochs than its sweep trained the member."""
    train = member.config.train
    if own.train.num_epochs <= train.num_epochs or not ledger.is_over(member.name):
        return False
    steps = steps_in(train.num_epochs, len(datasets.load(member.config).train) // train.batch_size)
    entry = ledger.members[member.name]
    return entry["step"] == steps or entry["status"] in ("diverged", "stopped")


def _most_members(together: Sequence[Member], datasets: Datasets) -> int:
    """How many members of a group fit in memory at once, by an estimate."""
    config = together[0].config
    devices = mesh.member_mesh(config.mesh, len(together))
    limit, estimate = _MEMORY_SHARE * mesh.memory_bytes(devices), member_bytes(config, datasets.load(config))
    return max(
        (count for count in range(1, len(together) + 1) if estimate.of_group(count, devices) <= limit), default=1
    )


def _say_plan(
    workdir: Workdir, ledger: Ledger, members: Mapping[str, Member], datasets: Datasets, first: int = 0
) -> None:
    """Prints the groups from the number `first` on."""
    groups = f"{len(ledger.groups)} group{'s' * (len(ledger.groups) != 1)}"
    console.say(
        f"{workdir}: {len(ledger.members)} members in {groups}, a program each, on {mesh.device_name(jax.devices())}"
    )
    rows, estimates = [], {}
    unfinished_first = sorted(
        enumerate(ledger.groups[first:], start=first), key=lambda group: all(map(ledger.is_over, group[1]))
    )
    for number, names in unfinished_first[:_SHOWN]:
        config = members[names[0]].config
        if (key := program_key(config)) not in estimates:
            estimates[key] = member_bytes(config, datasets.load(config))
        devices = mesh.member_mesh(config.mesh, len(names))
        megabytes = estimates[key].of_group(len(names), devices) / 1e6
        over = sum(ledger.is_over(name) for name in names)
        rows.append((number, len(names), over, devices.size, f"{megabytes:.0f} MB", names[0]))
    console.table(rows, ("group", "members", "over", "devices", "memory, about", "first member"))
    if len(unfinished_first) > _SHOWN:
        console.say(f"and {len(unfinished_first) - _SHOWN} more groups")
