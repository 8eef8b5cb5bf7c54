"""TensorBoard: a folder of event files for each trial, written in TensorBoard's own format."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from ddsweep.trackers.contract import Final, Point, Told

__all__ = ["TensorBoard"]


class TensorBoard:
    """Runs are ``<folder>/<sweep>/<trial id>``."""

    live = True

    def __init__(self, folder: Path, sweep: str) -> None:
        self._folder = folder / sweep

    def open(self, told: Told, sent: int) -> _Run:
        return _Run(self._folder / told.trial_id, told, sent)


class _Run:
    def __init__(self, folder: Path, told: Told, sent: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = len(list(folder.glob("events.out.tfevents.*")))
        # Readers take the files in the order of their names. TensorBoard's own names have seconds, the name
        # of the host and a process id, which give no order within a second.
        self._file = (folder / f"events.out.tfevents.{earlier:010d}").open("xb")
        self._writer = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        # Readers drop what earlier files of the run have from this step on.
        self._add(Event(step=sent + 1, session_log=SessionLog(status=SessionLog.START)))
        if not earlier or not sent:
            settings = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in told.settings.items()
                if value is not None
            }
            start = SessionStartInfo(group_name=told.trial_id, start_time_secs=time.time())
            for name, value in settings.items():
                kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
                setattr(start.hparams[name], kind, value)
            self._hparams(hparams.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start), 0)
            self._words("trial", {"trial": told.name, **settings}, 0)

    def points(self, points: Sequence[Point]) -> None:
        for point in points:
            self._scalars(point.values, point.step)

    def picture(self, path: Path, step: int) -> None:
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # the header of a PNG
        image = Summary.Image(encoded_image_string=content, width=width, height=height, colorspace=3)
        self._summary(Summary(value=[Summary.Value(tag="distilled images", image=image)]), step)

    def final(self, final: Final) -> None:
        self._scalars({f"final/{name}": value for name, value in final.values.items()}, final.step)
        self._words("final", final.words, final.step)
        end = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time())
        self._hparams(hparams.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end), final.step)

    def flush(self) -> None:
        self._writer.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, values: Any, step: int) -> None:
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._summary(Summary(value=found), step)

    def _words(self, tag: str, words: Any, step: int) -> None:
        text = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in words.items())])
        value = Summary.Value(
            tag=f"{tag}/text_summary",
            metadata=create_summary_metadata(display_name=tag, description=""),
            tensor=make_tensor_proto([text.encode()], dtype="string"),
        )
        self._summary(Summary(value=[value]), step)

    def _hparams(self, tag: str, data: HParamsPluginData, step: int) -> None:
        about = hparams.create_summary_metadata(data)
        self._summary(
            Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=hparams.NULL_TENSOR)]), step
        )

    def _summary(self, summary: Summary, step: int) -> None:
        self._add(Event(step=step, summary=summary))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
