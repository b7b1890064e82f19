"""A tiny image segmenter for MediaPipe, built from flatbuffers: the redder a pixel, the more it is clothes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

CLASSES = ("background", "hair", "body-skin", "face-skin", "clothes", "others")


def write_segmenter(path: Path, side: int = 32) -> Path:
    """One 1 x 1 convolution of float32 (1, side, side, 3) in [0, 1] to six logits: clothes 20 red - 10, others 0."""
    import flatbuffers

    for name in ("cc", "cc.metadata", "cc.metadata.python"):  # its writer imports what its wheel lacks
        sys.modules.setdefault(f"mediapipe.tasks.{name}", ModuleType(name))
    version = SimpleNamespace(GetMinimumMetadataParserVersion=lambda metadata: "1.0.0")
    sys.modules["mediapipe.tasks.cc.metadata.python"]._pywrap_metadata_version = version  # type: ignore[attr-defined]
    from mediapipe.tasks.metadata import schema_py_generated as fb
    from mediapipe.tasks.python.metadata.metadata_writers import image_segmenter, metadata_writer

    weights = np.zeros((len(CLASSES), 1, 1, 3), np.float32)
    weights[4, 0, 0] = (20, 0, 0)
    bias = np.zeros(len(CLASSES), np.float32)
    bias[1:] = (-20, -20, -20, -10, -20)
    shapes = {"image": (1, side, side, 3), "weights": weights.shape, "bias": bias.shape}
    shapes["shares"] = (1, side, side, len(CLASSES))
    contents = [b"", weights.tobytes(), bias.tobytes(), b""]
    graph = fb.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs = [], [0], [3]
    for number, (name, shape) in enumerate(shapes.items()):
        tensor = fb.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), fb.TensorType.FLOAT32, number + 1
        graph.tensors.append(tensor)
    options = fb.Conv2DOptionsT()
    options.strideH = options.strideW = options.dilationHFactor = options.dilationWFactor = 1
    operator = fb.OperatorT()
    operator.inputs, operator.outputs = [0, 1, 2], [3]
    operator.builtinOptionsType, operator.builtinOptions = fb.BuiltinOptions.Conv2DOptions, options
    graph.operators = [operator]
    code = fb.OperatorCodeT()
    code.builtinCode, code.version = fb.BuiltinOperator.CONV_2D, 1
    code.deprecatedBuiltinCode = fb.BuiltinOperator.CONV_2D
    model = fb.ModelT()
    model.version, model.subgraphs, model.operatorCodes, model.buffers = 3, [graph], [code], []
    for content in (b"", *contents):
        buffer = fb.BufferT()
        buffer.data = list(content) if content else None
        model.buffers.append(buffer)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    writer = image_segmenter.MetadataWriter.create(
        bytearray(builder.Output()), [0.0], [255.0], metadata_writer.Labels().add(list(CLASSES)),
        image_segmenter.Activation.SOFTMAX,
    )  # fmt: skip
    path.write_bytes(writer.populate()[0])
    return path
