"""What is in the files of trackers, by their own readers."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass
class Found:
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    pictures: list[tuple[int, int]] = field(default_factory=list)

    def curve(self, name: str) -> list[tuple[int, float]]:
        return self.points.get(name, [])


def read_tensorboard(folder: Path, sweep: str) -> dict[str, Found]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = {}
    for place in sorted((folder / sweep).iterdir()):
        events = EventAccumulator(str(place), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
        events.Reload()
        one = found[place.name] = Found()
        for tag in events.Tags()["scalars"]:
            series = [(event.step, event.value) for event in events.Scalars(tag)]
            if tag.startswith("final/"):
                one.final[tag.removeprefix("final/")] = series[-1][1]
            else:
                one.points[tag] = series
        for tag in events.Tags()["images"]:
            for picture in events.Images(tag):
                size = Image.open(io.BytesIO(picture.encoded_image_string)).size
                assert size == (picture.width, picture.height)
                one.pictures.append(size)
        data = HParamsPluginData.FromString(
            events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        )
        for name, value in data.session_start_info.hparams.items():
            one.settings[name] = getattr(value, value.WhichOneof("kind"))
        if "final/text_summary" in events.Tags()["tensors"]:
            text = events.Tensors("final/text_summary")[-1].tensor_proto.string_val[0].decode()
            cells = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
            one.words = {name: value for name, value in cells}
    return found


def read_mlflow(folder: Path, sweep: str) -> dict[str, Found]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(sweep)
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        assert run.data.tags["ddsweep.trial_id"] not in found
        one = found[run.data.tags["ddsweep.trial_id"]] = Found(settings=dict(run.data.params))
        assert run.info.run_name.startswith(run.data.tags["ddsweep.trial_id"])
        for name, value in run.data.metrics.items():
            if name.startswith("final/"):
                one.final[name.removeprefix("final/")] = value
            else:
                history = client.get_metric_history(run.info.run_id, name)
                one.points[name] = sorted((metric.step, metric.value) for metric in history)
        one.words = {name.removeprefix("ddsweep."): value for name, value in run.data.tags.items()}
        assert (run.info.status == "FINISHED") == bool(one.final)
        for file in client.list_artifacts(run.info.run_id):
            picture = Path(client.download_artifacts(run.info.run_id, file.path)).read_bytes()
            one.pictures.append(Image.open(io.BytesIO(picture)).size)
    return dict(sorted(found.items()))


def read_wandb(folder: Path, sweep: str) -> dict[str, Found]:
    """The sessions of a run one after the other, as `wandb sync --append` joins them."""
    found: dict[str, Found] = {}
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for place in sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime_ns):
        (file,) = place.glob("*.wandb")
        for record in _wandb_records(file):
            if record.HasField("run"):
                run_id = record.run.run_id
                assert record.run.project == sweep
                one = found.setdefault(run_id, Found())
                for item in record.run.config.update:
                    one.settings[item.key] = json.loads(item.value_json)
            elif record.HasField("history"):
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.setdefault(run_id, {}).setdefault(int(values["_step"]), {}).update(values)
            elif record.HasField("summary"):
                for item in record.summary.update:
                    name = item.key or "/".join(item.nested_key)
                    value = json.loads(item.value_json)
                    if name.startswith("final/"):
                        into = one.words if isinstance(value, str) else one.final
                        into[name.removeprefix("final/")] = value
    for run_id, steps in rows.items():
        for step, values in sorted(steps.items()):
            for name, value in values.items():
                if name == "distilled images/path":
                    (place,) = (folder / "wandb").glob(f"offline-run-*-{run_id}/files/{value}")
                    found[run_id].pictures.append(Image.open(io.BytesIO(place.read_bytes())).size)
                elif not name.startswith("distilled images"):
                    found[run_id].points.setdefault(name, []).append((step, value))
    return dict(sorted(found.items()))


def _wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline file: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes, with
    a check sum for each piece."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        check, length, kind = struct.unpack("<IHB", content[at : at + 7])
        piece = content[at + 7 : at + 7 + length]
        assert len(piece) == length and zlib.crc32(bytes([kind]) + piece) == check, f"{path}: torn"
        parts += piece
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            yield Record.FromString(parts)
            parts = b""
