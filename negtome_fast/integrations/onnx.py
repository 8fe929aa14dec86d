"""Export of `negtome_fast.negtome` to ONNX, as standard operators.

`translation_table` translates the operator's nodes of a torch program, so any model with `NegToMe`
layers can be exported; `export_onnx` does it in one call. A loop takes one block of reference
tokens at a time, so memory grows with N + M, not with N * M.

    y_i = x_i + alpha * (x_i - r_j)  where  j = argmax_j cos(x_i, r_j)  and  cos > threshold
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: The operator set that the translation is written in.
OPSET = 18


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for `torch.onnx.export(..., dynamo=True, custom_translation_table=...)`.

    Raises:
        ImportError: onnx or onnxscript is missing; names the extra.
    """
    try:
        from . import _onnx_functions as functions
    except ModuleNotFoundError as error:
        raise ImportError(
            f"exporting to ONNX needs {error.name}: pip install 'negtome-fast[onnx]'"
        ) from error
    return {
        torch.ops.negtome_fast.guide.default: functions.guide,
        torch.ops.negtome_fast.match.default: functions.match,
    }


def export_onnx(
    module: nn.Module,
    arguments: Sequence[Any],
    path: Path | str | None = None,
    *,
    keywords: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int = OPSET,
) -> torch.onnx.ONNXProgram:
    """Export a module that has `NegToMe` layers or calls `negtome` as an ONNX model.

    Args:
        module: in eval mode. `alpha` and `threshold` of layers become constants; pass tensors to
            `negtome` to make them inputs.
        arguments, keywords: example arguments of its forward.
        path: file of the model; None (default) writes no file.
        dynamic_shapes: as in `torch.export.export`, such as `({0: items, 1: tokens},)`.
        input_names, output_names: names in the ONNX model; default: those of torch.
        opset_version: version of the standard operators, at least 18 (default).

    Returns:
        The program: `program.model_proto` is the model, `program(x)` runs it by onnxruntime.

    Raises:
        ImportError: a package of the extra `onnx` is missing.
        ValueError: opset_version is too old, or the operator is used in place.
        RuntimeError: torch returned no program.
    """
    if opset_version < OPSET:
        raise ValueError(f"opset_version must be at least {OPSET}, got {opset_version}")
    table = translation_table()
    try:
        program = torch.onnx.export(
            module,
            tuple(arguments),
            kwargs=dict(keywords or {}),
            dynamo=True,
            custom_translation_table=table,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset_version,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        if "negtome_fast.guide_" not in str(error):
            raise
        raise ValueError("ONNX has no in-place operators; use inplace=False") from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    if path is not None:
        program.save(str(path))
    return program
