"""The names of forms, export formats and engines, here so that ``--help`` can name them without importing torch."""

FORM_NAMES = ("bottleneck", "reduce", "expand", "spatial", "depthwise", "pair")
"""Every form, by the name of its file in `pwrewrite.forms`, in the order in which they are shown."""

EXPORT_NAMES = ("onnx", "pt2", "openvino", "source")
"""The export formats, each of them `pwrewrite/engines/NAME_format.py`."""

ENGINE_NAMES = ("torch", "frozen", "onnxruntime", "openvino")
"""The engines, each of them `pwrewrite/engines/NAME_engine.py`."""
