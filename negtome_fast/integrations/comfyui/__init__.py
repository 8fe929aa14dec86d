"""A ComfyUI node pack: copy or link this folder into ComfyUI/custom_nodes.

It needs negtome_fast in the Python environment that runs ComfyUI. ComfyUI finds the nodes in
NODE_CLASS_MAPPINGS or, in the V3 schema, through comfy_entrypoint.
"""

try:
    from negtome_fast.guidance import Guidance as _Guidance  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the NegToMe nodes need the package negtome_fast in the Python environment that runs "
        "ComfyUI: with that Python, run `python -m pip install PATH`, where PATH is a checkout of "
        f"negtome-fast, and start ComfyUI again ({error})"
    ) from error

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, comfy_entrypoint

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "comfy_entrypoint"]
