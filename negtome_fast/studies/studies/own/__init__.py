"""`negtome-fast eval own`: what guidance does to a model of yours, on prompts of yours.

Every group of images is drawn in all conditions from the same seeds: without guidance, with every
combination of settings that is asked for, at every guidance scale, and each with a negative prompt
if there is one.
"""

from .request import NAME, Condition, Request, request
from .results import PURPOSE, figures, table
from .run import perform

__all__ = ["NAME", "PURPOSE", "Condition", "Request", "figures", "perform", "request", "table"]
