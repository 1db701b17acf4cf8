"""The names of forms, export formats and engines, here so that ``--help`` can name them without importing torch."""

FORM_NAMES = ("bottleneck", "reduce", "expand", "spatial", "depthwise", "pair")
"""Every form, by the name of its file in `pwrewrite.forms`, in the order in which they are shown."""

JOINT_FORM_NAMES = ("narrow", "substitute", "share-reduction")
"""What a budget may do to several layers at once, by the actions of `pwrewrite.planning.joint`."""

EXPORT_NAMES = ("onnx", "pt2", "openvino", "source")
"""The export formats, each of them `pwrewrite/engines/NAME_format.py`."""

ENGINE_NAMES = ("torch", "frozen", "onnxruntime", "openvino")
"""The engines, each of them `pwrewrite/engines/NAME_engine.py`."""
