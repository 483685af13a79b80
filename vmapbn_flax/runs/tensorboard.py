"""TensorBoard's event files, written with parts of tensorboardX.

Its own writer has a thread. When a full disk has ended the thread, the next event waits for ever.
"""

import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.api_pb2 import Status
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary
from tensorboardX.record_writer import masked_crc32c

from vmapbn_flax.files import AppendFile

_DIFFERS = b"\x38\x01"  # `differs = true` of TensorBoard's HParamInfo, a later field than tensorboardX knows


class EventFile(AppendFile):
    """A new event file in `directory`; it voids the events of `first_step` and later in earlier files."""

    def __init__(self, directory: Path, first_step: int):
        now = time.time_ns()  # a unique name; TensorBoard reads the files in this order
        super().__init__(directory / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}")
        self._append(file_version="brain.Event:2")
        self._append(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, scalars: Mapping[str, float | int], step: int | None = None) -> None:
        values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
        self._append(step=step, summary=Summary(value=values))

    def add_histograms(self, percentiles: Mapping[str, np.ndarray], step: int) -> None:
        """Adds a histogram of each, with a hundredth of the values between two percentiles; none with a NaN."""
        values = []
        for tag, limits in percentiles.items():
            if np.isfinite(limits).all():
                middles = (limits[1:] + limits[:-1]) / 2
                histogram = HistogramProto(min=limits[0], max=limits[-1], num=len(middles))
                histogram.sum, histogram.sum_squares = middles.sum(), (middles**2).sum()
                histogram.bucket_limit.extend(map(float, limits))
                histogram.bucket.extend([0.0, *np.ones(len(middles))])
                values.append(Summary.Value(tag=tag, histo=histogram))
        self._append(step=step, summary=Summary(value=values))

    def add_hparams(
        self, hparams: Mapping[str, object], *, swept: Sequence[str], metrics: Sequence[str], failed: bool
    ) -> None:
        """Fills the run's row in the hparams tab: `hparams`, and the last of each of its scalars.

        Of a sweep's member, the columns that come first are the hparams `swept` and the scalars `metrics`. Where there
        are other runs alone, TensorBoard finds out which hparams differ, and lists all scalars.
        """
        # TensorBoard has no lists, and tensorboardX leaves out values of types that it does not know.
        known = {key: value if isinstance(value, int | float) else str(value) for key, value in hparams.items()}
        experiment, start, end = (part.value[0] for part in summary.hparams(known, dict.fromkeys(metrics)))
        content = HParamsPluginData.FromString(experiment.metadata.plugin_data.content)
        for info in content.experiment.hparam_infos:
            if info.name in swept:
                info.MergeFromString(_DIFFERS)
        experiment.metadata.plugin_data.content = content.SerializeToString()
        if failed:  # tensorboardX ends every run in success
            content = HParamsPluginData(session_end_info=SessionEndInfo(status=Status.Value("STATUS_FAILURE")))
            end.metadata.plugin_data.content = content.SerializeToString()
        self._append(summary=Summary(value=[*([experiment] if swept else []), start, end]))

    def _append(self, **content: object) -> None:
        """Writes a TFRecord: the length and the event, each followed by its checksum."""
        event = Event(wall_time=time.time(), **content).SerializeToString()
        parts = (struct.pack("<Q", len(event)), event)
        self.write(b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts))
