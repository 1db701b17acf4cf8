"""Questions asked of a captured model, one per file: where its work goes, and what could be done about it."""

from __future__ import annotations

from ..capturing.records import Capture, info
from ..capturing.tensors import dtype_name
from ..core.collector import no_collection
from ..core.errors import UsageError
from .by_op import by_op
from .critical_path import critical_path
from .devices import DEVICES, DeviceProfile, device_profile
from .hotspots import HOTSPOT_SHARE, hotspots
from .memory import peak_memory
from .receptive_field import receptive_fields
from .records import Analysis
from .roofline import roofline
from .steps import Recording
from .tree import module_tree

__all__ = [
    "DEVICES",
    "HOTSPOT_SHARE",
    "Analysis",
    "DeviceProfile",
    "analyze_capture",
    "device_profile",
    "receptive_fields",
]


def analyze_capture(
    capture: Capture, *, target: str = "", hotspot_share: float = HOTSPOT_SHARE, device: str | DeviceProfile = "cpu"
) -> Analysis:
    """Asks every question of a captured model, which ``target`` names in the report.

    A dense k×k layer is a hotspot from ``hotspot_share`` (0 to 1) of the MACs on; ``device`` is a profile for the
    roofline, or the name of one in `DEVICES`. A `UsageError` says that either makes no sense.
    """
    if not 0.0 <= hotspot_share <= 1.0:
        raise UsageError("the hotspot share is a part of the MACs", expected="0 to 1", got=str(hotspot_share))
    profile = device_profile(device)
    with no_collection():
        infos = {node.name: info(node) for node in capture.graph.nodes}
        facts = infos.values()
        macs = sum(each.cost.macs for each in facts)
        kind = type(capture.model)
        fields, nodes = receptive_fields(capture), [node for node in capture.graph.nodes if node.op != "get_attr"]
        sources = {n.name: [source.name for source in n.all_input_nodes if source.op != "get_attr"] for n in nodes}
        leaves = frozenset(node.name for node in nodes if node.op == "call_module")
        return Analysis(
            target=target or kind.__name__,
            model_class=f"{kind.__module__}.{kind.__qualname__}",
            inputs=tuple(
                {"name": name, "shape": list(x.shape), "dtype": dtype_name(x.dtype)} for name, x in capture.inputs
            ),
            params=capture.params,
            macs=macs,
            weight_bytes=capture.weight_bytes,
            activation_bytes=sum(each.cost.write_bytes for each in facts),
            peak=peak_memory(capture.memory, infos),
            critical_path=critical_path({name: each.cost.macs for name, each in infos.items()}, sources),
            roofline=roofline(facts, profile),
            layers=hotspots(capture, infos, profile, fields, total_macs=macs, hotspot_share=hotspot_share),
            by_op=by_op(facts),
            tree=module_tree(capture.model, facts),
            coverage=capture.coverage,
            notes=capture.notes,
            recording=Recording(infos, leaves, sources, capture.memory, profile),
        )
