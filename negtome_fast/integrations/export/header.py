"""The C header of an exported operator: template.h with its constants and launch functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...kernels import tuning
from .operator import Operator

TEMPLATE = Path(__file__).parent / "template.h"
_CONSTANTS, _WRAPPERS = "/* @constants */", "/* @wrappers */"
_C_TYPES = {"pointer": "negtome_pointer", "int32": "int32_t", "int64": "int64_t"}


def _flags(operator: Operator, description: dict[str, Any]) -> dict[str, object]:
    rows = description["kind"] == "rows"
    return {
        "NEGTOME_HIP": int(operator.target.startswith("gfx")),
        "NEGTOME_TARGET": f'"{operator.target}"',
        "NEGTOME_DTYPE": f'"{operator.dtype}"',
        f"NEGTOME_{operator.dtype.upper()}": 1,
        "NEGTOME_ELEMENT_BYTES": 4 if operator.dtype == "float32" else 2,
        "NEGTOME_CHANNELS": operator.channels,
        "NEGTOME_DIVISOR": operator.divisor,
        "NEGTOME_SCALE_ROOM": tuning.SCALE_BLOCK,
        "NEGTOME_FIRST": int(operator.reference == "first"),
        "NEGTOME_OTHERS": int(operator.reference == "others"),
        "NEGTOME_EXTERNAL": int(operator.reference == "external"),
        "NEGTOME_OFFICIAL": int(operator.matching == "official"),
        "NEGTOME_SUM": int(operator.combine == "sum"),
        "NEGTOME_INPLACE": int(operator.inplace),
        "NEGTOME_REFERENCE_MASK": int(operator.reference_mask),
        "NEGTOME_SOURCE_MASK": int(operator.source_mask),
        "NEGTOME_ROWS": int(rows),
        "NEGTOME_TILES": int(not rows),
        "NEGTOME_RESOLVE": int(operator.resolves),
    }


def _constants(operator: Operator, description: dict[str, Any]) -> str:
    lines = [f"#define {name} {value}" for name, value in _flags(operator, description).items()]
    kernels = description["kernels"]
    lines.append("")
    for kernel in kernels:
        config, prefix = kernel["config"], f"NEGTOME_{kernel['name'].upper()}"
        lines.append(f"#define {prefix}_BLOCK_M {config['BLOCK_M']}")
        if kernel["name"] == "tiles":
            lines.append(f"#define {prefix}_BLOCK_N {config['BLOCK_N']}")
            lines.append(f"#define {prefix}_RESIDENT {config['CTAS_PER_SM']}")
            lines.append(f"#define {prefix}_GROUP {config['GROUP_M']}")
    names = ", ".join(f"NEGTOME_KERNEL_{kernel['name'].upper()}" for kernel in kernels)
    lines += ["", f"enum {{ {names}, NEGTOME_KERNEL_COUNT }};"]
    lines += [
        "typedef struct negtome_kernel {",
        "    const char *file, *symbol;",
        "    unsigned block, shared; /* threads, bytes of dynamic shared memory */",
        "} negtome_kernel;",
        "static const negtome_kernel negtome_kernels[NEGTOME_KERNEL_COUNT] = {",
    ]
    lines += [
        f'    {{"{k["file"]}", "{k["symbol"]}", {k["block"][0]}, {k["shared"]}}},' for k in kernels
    ]
    return "\n".join([*lines, "};"])


def _wrapper(kernel: dict[str, Any]) -> str:
    """C function that launches a kernel, with the kernel's arguments by name.

    It also takes pointers that are compiled in as null and ignores them, so that calls of all
    exports are the same.
    """
    scratch = kernel["arguments"][-2:]
    given = {entry["name"]: _C_TYPES[entry["type"]] for entry in kernel["arguments"][:-2]}
    order = [name for name in kernel["parameters"] if name in given or name.endswith("_ptr")]
    ignored = [name for name in order if name not in given]
    parameters = "".join(f",\n    {given.get(name, 'negtome_pointer')} {name}" for name in order)
    lines = [
        f"static inline negtome_result negtome_launch_{kernel['name']}(",
        "    const negtome_operator *op, int64_t grid_x, int64_t grid_y, "
        f"negtome_stream stream{parameters}) {{",
        *(f"    negtome_pointer {entry['name']} = 0;" for entry in scratch),
        "    void *arguments[] = {",
        *(f"        &{name}," for name in given),
        *(f"        &{entry['name']}," for entry in scratch),
        "    };",
        *(f"    (void){name}; /* not compiled in */" for name in ignored),
        f"    return negtome_launch_kernel(op, NEGTOME_KERNEL_{kernel['name'].upper()}, "
        "grid_x, grid_y,",
        "        stream, arguments);",
        "}",
    ]
    return "\n".join(lines)


def render(operator: Operator, description: dict[str, Any]) -> str:
    """The text of the header."""
    text = TEMPLATE.read_text(encoding="utf-8")
    wrappers = "\n\n".join(_wrapper(kernel) for kernel in description["kernels"])
    for marker, content in (
        (_CONSTANTS, _constants(operator, description)),
        (_WRAPPERS, wrappers),
    ):
        text = text.replace(marker, content)
    return text
