"""Names of mapped axes."""

from jax import lax

AxisName = str | tuple[str, ...]


def as_axes(axis_name: AxisName | None) -> tuple[str, ...]:
    """No name, one or several, as a tuple."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def is_mapped(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def missing_axis(name: str, axis_name: AxisName | None, replica_axis_name: AxisName) -> str:
    """What is said of a layer that trains where its axis `name` is not mapped."""
    mapped = as_axes(replica_axis_name) + as_axes(axis_name)
    line = f"VmapBatch(module, axis_name={mapped[0] if len(mapped) == 1 else mapped!r})"
    return (
        f"got train=True where no axis is named {name!r}; expected the axes of the layer's axis_name={axis_name!r} "
        f"and replica_axis_name={replica_axis_name!r} to be mapped around it. Supply them with {line}, the outermost "
        f"axis first. Evaluation (train=False) needs no axis."
    )
