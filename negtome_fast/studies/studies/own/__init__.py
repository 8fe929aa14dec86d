"""`negtome-fast eval own`: the effect of the guidance on your model with your prompts.

Every group of images is drawn in all conditions from the same seeds: without guidance and with
every requested combination of settings, at every guidance scale. A negative prompt doubles the
conditions: each is drawn without and with it.
"""

from .request import NAME, OwnCondition, Request, request
from .results import PURPOSE, figures, table
from .run import perform

__all__ = ["NAME", "PURPOSE", "OwnCondition", "Request", "figures", "perform", "request", "table"]
