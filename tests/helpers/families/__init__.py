"""Table of tiny random pipelines, one or more for each supported family of models: `FAMILIES`."""

from helpers.families import images, loops, videos
from helpers.families.core import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {**images.FAMILIES, **videos.FAMILIES, **loops.FAMILIES}
