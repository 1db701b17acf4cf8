"""The model that a workflow works on: one at hand, or one that a target led to, whose origin the plan then records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from ..capturing.inputs import Inputs, split_inputs, tensors_for
from ..capturing.lazy import materialized
from ..core.errors import InputError, RefusedError
from ..core.plan import Plan
from ..core.subjects import check_model
from ..edit.swap import copy_of
from ..report.records import Report
from ..targets import LoadedModel, class_name

Subject = nn.Module | LoadedModel
"""A model, or a model with its inputs as `pwrewrite.load_target` gives them."""


_OPERATOR = type(torch.ops.aten.relu.default)
"""What an exported program calls, where a module's own graph calls functions and modules."""


def loaded_of(model: Subject, example_inputs: Inputs | None) -> LoadedModel:
    """A model with its example inputs (None: those it came with); a copy, run once on them, where it has lazy modules.

    An `InputError` says that it is no model, or that there are no inputs.
    """
    if not isinstance(model, LoadedModel):
        if isinstance(model, torch.export.ExportedProgram):
            hint = "rewrite the module before torch.export; analyze takes the program's .module()"
            raise InputError("this is not a model", expected="a torch.nn.Module", got=type(model).__name__, hint=hint)
        check_model(model)
        if example_inputs is None:
            raise InputError("there are no example inputs", expected="a tensor, a tuple of inputs or a dict of them")
        model = LoadedModel(model, (), "")
    inputs = model.example_inputs if example_inputs is None else tensors_for(example_inputs)
    prepared = out_of_inference_mode(materialized(model.model, *split_inputs(inputs)))
    parts = compiled_parts(model.model).items()
    notes = (f"{path} is {kind}: nothing in it is rewritten" for path, kind in parts if path)
    return replace(model, model=prepared, example_inputs=inputs, notes=(*model.notes, *notes))


def compiled_parts(model: nn.Module) -> dict[str, str]:
    """Parts of a model that are graphs without layers to replace: their paths, and what each is."""
    parts: dict[str, str] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}." if outer else "") for outer in parts):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            parts[path] = "a TorchScript module"
        elif isinstance(module, fx.GraphModule) and any(isinstance(n.target, _OPERATOR) for n in module.graph.nodes):
            parts[path] = "an exported program"
    return parts


def check_editable(model: nn.Module) -> None:
    """Raises `RefusedError` for a model that is a graph without layers as a whole."""
    kind = compiled_parts(model).get("")
    if kind is not None:
        raise RefusedError(
            f"the model is {kind}: a graph without layers that could be replaced",
            expected="the module that it was made from",
            hint="rewrite or fuse that module first, and export, script or trace the result",
        )


def out_of_inference_mode(model: nn.Module) -> nn.Module:
    """The model itself, or a copy whose tensors can be trained where it was built under ``torch.inference_mode()``."""
    if not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        return model
    with torch.inference_mode(False):
        return copy_of(model)


def origin_of(loaded: LoadedModel) -> dict[str, object]:
    """What a plan records about where the original comes from; nothing for a model at hand."""
    if not loaded.origin:
        return {}
    facts: dict[str, object] = {"target": loaded.origin}
    if loaded.plan is None:
        facts["class"] = class_name(loaded.model)
    if loaded.args and _recordable(loaded.args):
        facts["args"] = dict(loaded.args)
    return facts


def plan_from_original(loaded: LoadedModel, plan: Plan) -> Plan:
    """A plan from the original model, over an earlier rewrite where the target is a saved folder."""
    if loaded.plan is None:
        return replace(plan, model={**plan.model, **origin_of(loaded)})
    original = {key: loaded.plan.model[key] for key in ("class", "params") if key in loaded.plan.model}
    return replace(loaded.plan + plan, model={**plan.model, **origin_of(loaded), **original})


def with_notes_of(loaded: LoadedModel, report: Report) -> Report:
    """A report with the notes of loading before its own."""
    return replace(report, notes=tuple(dict.fromkeys((*loaded.notes, *report.notes))))


def _recordable(args: Mapping[str, object]) -> bool:
    try:
        json.dumps(args)
    except (TypeError, ValueError):
        return False
    return True
