"""orbax's checkpointers, for saves of all processes together and of one alone."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def make_saver(*, alone: bool, before_commit: Callable[[], None]) -> ocp.AsyncCheckpointer:
    """A checkpointer that saves in the background, with a directory for each item of the `save_items`.

    Args:
      alone: whether this process saves without the others.
      before_commit: called when all files are written, before the directory gets its name.
    """
    # Directories made in the background could fail there, and other threads would wait five minutes for them.
    options = ocp.AsyncOptions(post_finalization_callback=before_commit, create_directories_asynchronously=False)
    processes = _this_process() if alone else ocp.options.MultiprocessingOptions()
    types = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _NumpyHandler()), (jax.Array, ocp.type_handlers.get_type_handler(jax.Array))
    )
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=processes, **({"type_handler_registry": types} if alone else {})
    )
    handlers.add("state", ocp.args.PyTreeSave, state)
    handlers.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler(multiprocessing_options=processes))
    handler = ocp.CompositeCheckpointHandler(
        handler_registry=handlers,
        composite_options=ocp.CompositeOptions(multiprocessing_options=processes, async_options=options),
    )
    return ocp.AsyncCheckpointer(handler, async_options=options, multiprocessing_options=processes)


def save_items(arrays: dict[str, Any], meta: dict[str, Any]) -> ocp.args.Composite:
    """What to save: arrays by name, which lie on the host or are global, and JSON."""
    return ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta))


def make_reader() -> ocp.Checkpointer:
    """A checkpointer that restores in this process, without the others."""
    processes = _this_process()
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=processes))
    return ocp.Checkpointer(handler, multiprocessing_options=processes)


def _this_process() -> ocp.options.MultiprocessingOptions:
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
    """Writes numpy arrays in any process; orbax's own handler writes them in process 0 alone, without a word."""

    async def serialize(
        self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        async def write() -> None:
            await asyncio.gather(*map(self._write, values, infos, args or [ocp.SaveArgs()] * len(values)))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="write_arrays")]

    async def _write(self, value: np.ndarray, info: Any, arg: Any) -> None:
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=info.is_ocdbt_checkpoint,
            global_shape=value.shape,
            local_shape=value.shape,
            dtype=value.dtype,
            process_index="0",  # a part of the files' names, which are then those of a run alone
            arg=arg,
        )
        await self._open_and_write(value, spec, info.ts_context)
