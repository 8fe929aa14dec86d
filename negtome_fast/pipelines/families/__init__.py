"""The model classes that are known, one module per kind of architecture."""

from ..layouts import Layout, register_layout
from . import cross_attention, flux, mmdit, single_stream, unet, video

FAMILIES: dict[str, Layout] = {
    **unet.LAYOUTS,
    **cross_attention.LAYOUTS,
    **mmdit.LAYOUTS,
    **flux.LAYOUTS,
    **single_stream.LAYOUTS,
    **video.LAYOUTS,
}
"""Class name of the denoiser -> its layout."""

for _name, _layout in FAMILIES.items():
    register_layout(_name, _layout)
