"""Generating images or videos with any diffusers model, with guidance, files and a record.

`generate` draws what a `Settings` describes; `nudged` draws with embedding nudging.
"""

from .contact_sheet import reference_rows
from .drawing import call_arguments, configuration, draw
from .loading import default_device, load_pipeline
from .media import blurred, encode_video, is_image
from .outcome import told
from .run import GenerationResult, generate
from .run_folder import new_folder, numbered_folder, plain_value, versions
from .settings import (
    APPLICATIONS,
    EMBEDDED,
    RECORD,
    Application,
    ReferenceFile,
    Settings,
    take_guidance,
)

__all__ = [
    "APPLICATIONS",
    "EMBEDDED",
    "RECORD",
    "Application",
    "GenerationResult",
    "ReferenceFile",
    "Settings",
    "blurred",
    "call_arguments",
    "configuration",
    "default_device",
    "draw",
    "encode_video",
    "generate",
    "is_image",
    "load_pipeline",
    "new_folder",
    "numbered_folder",
    "plain_value",
    "reference_rows",
    "take_guidance",
    "told",
    "versions",
]
