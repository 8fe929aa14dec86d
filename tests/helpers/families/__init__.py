"""One tiny random pipeline for each family of models, without downloads: `FAMILIES`."""

from helpers.families import images, loops, videos
from helpers.families.core import Family

FAMILIES: dict[str, Family] = {**images.FAMILIES, **videos.FAMILIES, **loops.FAMILIES}
