"""What TensorBoard's HPARAMS tab shows of a folder, and the records that it reads."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

NUMBER = api_pb2.DATA_TYPE_FLOAT64
TEXT = api_pb2.DATA_TYPE_STRING


def hparams_tab(folder: Path) -> tuple[dict[str, int], list[str], dict[str, dict[str, Any]]]:
    """Return the types of the fields, the metrics, and the rows: all values by the row's name."""
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(folder))))
    experiment = get_experiment.Handler(
        RequestContext(), context, "", api_pb2.GetExperimentRequest()
    ).run()
    request = api_pb2.ListSessionGroupsRequest(allowed_statuses=[0, 1, 2, 3], slice_size=1000)
    found = list_session_groups.Handler(RequestContext(), context, "", request).run()
    rows = {
        group.name: {
            **{name: getattr(v, v.WhichOneof("kind")) for name, v in group.hparams.items()},
            **{metric.name.tag: metric.value for metric in group.metric_values},
        }
        for group in found.session_groups
    }
    assert len(rows) == len(found.session_groups)
    types = {info.name: info.type for info in experiment.hparam_infos}
    return types, [info.name.tag for info in experiment.metric_infos], rows


def record_tags(run: Path) -> list[str]:
    """Return the tags of all that a run's TensorBoard files have, in the order of writing."""
    tags = []
    for file in sorted((run / "tensorboard").iterdir()):
        for raw in RawEventFileLoader(str(file)).Load():
            tags += [value.tag for value in Event.FromString(raw).summary.value]
    return tags
