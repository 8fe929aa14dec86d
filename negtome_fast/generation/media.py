"""Images and videos: their frames, and their encodings as PNG, MP4 and GIF."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Sequence
from importlib import util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image


def is_image(item: Any) -> bool:
    from PIL.Image import Image

    return isinstance(item, Image)


def frames(item: Any) -> list[Image]:
    """Return the frames of a video as PIL images; an image is a video of one frame.

    Args:
        item: a PIL image, a sequence of them, or an array or tensor `(F, H, W, 3)` in [0, 1].
    """
    from PIL import Image

    if is_image(item):
        return [item]
    found = []
    for frame in item:
        if not is_image(frame):
            values = torch.as_tensor(frame).float().clamp(0, 1) * 255
            frame = Image.fromarray(values.round().byte().cpu().numpy())
        found.append(frame)
    return found


def still(item: Any) -> Image:
    """Return an image, or the middle frame of a video."""
    shown = frames(item)
    return shown[len(shown) // 2]


def blurred(image: Image, radius: float) -> Image:
    """Blur an image; `radius` is in 64ths of its longer side."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(radius * max(image.size) / 64))


def png(image: Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def encode_video(frames: Sequence[Image], fps: int) -> tuple[str, bytes]:
    """Encode frames as (suffix, content): MP4 if ffmpeg or imageio-ffmpeg is installed, else GIF.

    Raises:
        RuntimeError: ffmpeg failed; holds its message.
    """
    program = shutil.which("ffmpeg")
    if program is None and util.find_spec("imageio_ffmpeg") is not None:
        from imageio_ffmpeg import get_ffmpeg_exe

        program = get_ffmpeg_exe()
    if program is None:
        buffer = io.BytesIO()
        frames[0].save(
            buffer,
            "GIF",
            save_all=True,
            append_images=list(frames[1:]),
            duration=round(1000 / fps),
            loop=0,
        )
        return ".gif", buffer.getvalue()
    width, height = frames[0].size
    command = [program, "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an"]
    # Players want 4:2:0, which needs even sizes; an MP4 in a pipe has to be in fragments.
    command += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"]
    command += ["-movflags", "frag_keyframe+empty_moov", "-f", "mp4", "-"]
    raw = b"".join(frame.convert("RGB").tobytes() for frame in frames)
    done = subprocess.run(command, input=raw, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")
    return ".mp4", done.stdout
