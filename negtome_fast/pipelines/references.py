"""References from outside of the batch: load, encode, noise, and the arguments of their forward.

Record and apply: on a guided step the model first sees the references' latents at this timestep
in the conditioning of the first item of each guidance group; its attention outputs are kept, and
the real forward is pushed away from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..guidance import PerThread, ReferenceSettings, ThreadState
from .layouts import ImageTokens, Layout

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Picture: TypeAlias = Image | np.ndarray[Any, Any] | str | Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")

_WITHOUT_BATCH = {"img_ids": 2, "txt_ids": 2}
"""Arguments that have no items where they have this many dimensions."""
_NEVER_BATCHED = (
    "image_rotary_emb",
    "rope_interpolation_scale",
    "visual_rope_pos",
    "text_rope_pos",
    "indices_*",
)
"""Places of tokens, of which there may be as many as items by chance."""
_BATCH_AXIS = {"encoder_hidden_states_llama3": 1}
"""HiDream has the states of several layers of its text encoder, (layers, B, tokens, channels)."""
_CACHES = ("kv_cache", "past_key_values")


@dataclass(frozen=True)
class Reference:
    """An image or a video that a run is pushed away from, or pulled toward.

    ```python
    apply_negtome(pipe, reference=Reference("character.png", mask="region.png", alpha=1.5))
    ```

    Attributes:
        image: a PIL image; an array (H, W, 3) uint8; the path of an image, an animated image or a
            folder of frames; a sequence of such images or an array (F, H, W, 3), a video; or a
            tensor, clean latents on the denoiser's scale, (C, h, w), (1, C, h, w), with frames, or
            as the denoiser takes them. Pictures are stretched to the size of the run, so crop
            them first where the proportions matter. A video is sampled evenly at the frames of the
            run; an image stands still.
        mask: where the reference may be matched: a picture as above (white may, black may not)
            or a bool array or tensor (H, W) or (F, H, W). It covers the reference from edge to
            edge, whatever its size.
        alpha: positive pushes away, negative pulls toward; None takes the configuration's.
        threshold: cosine similarity that a match must exceed; None takes the configuration's.
        noise: the latents are noised to the timestep of the step, by the pipeline's scheduler and
            with random numbers drawn once a run from a copy of the caller's generator, so that its
            own stay as they are. False gives the model clean latents, as the authors' default.
    """

    image: Picture | Tensor | Sequence[Picture]
    mask: Picture | Tensor | Sequence[Picture] | None = None
    alpha: float | None = None
    threshold: float | None = None
    noise: bool = True

    def load(self) -> LoadedReference:
        """Reads and checks the files; raises `ValueError` or `TypeError` that names what is wrong.

        Raises:
            FileNotFoundError: a path does not exist.
        """
        latents = self.image if isinstance(self.image, Tensor) else None
        if latents is not None and not latents.is_floating_point():
            raise TypeError(
                f"a reference that is a tensor is latents, floating point, not {latents.dtype}; "
                "give pixels as a numpy array (H, W, 3) or a PIL image"
            )
        frames = None if latents is not None else _frames(self.image, "reference image")
        mask = None if self.mask is None else _mask(self.mask)
        return LoadedReference(
            ReferenceSettings(self.alpha, self.threshold, mask), frames, latents, bool(self.noise)
        )


@dataclass(frozen=True)
class LoadedReference:
    """A checked `Reference`: either frames or latents."""

    settings: ReferenceSettings
    frames: tuple[Image, ...] | None
    latents: Tensor | None
    noise: bool

    def pixels(self, size: tuple[int, int, int]) -> Tensor:
        """(F, 3, H, W) in [-1, 1] at the (frames, height, width) of a run."""
        import numpy as np
        from PIL import Image

        assert self.frames is not None
        count, height, width = size
        last = len(self.frames) - 1
        chosen = [self.frames[round(i * last / max(count - 1, 1))] for i in range(count)]
        resized = [f.resize((width, height), Image.Resampling.LANCZOS) for f in chosen]
        pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in resized]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class References:
    """The references of one guided model, and what is known of them in this run."""

    # Of the run: clean latents and noise, each (1, ...) in fp32 or fp64, for runs of this key.
    _key = PerThread[tuple[Any, ...] | None](None)
    _clean = PerThread[Sequence[Tensor]](())
    _noise = PerThread[Sequence[Tensor]](())

    def __init__(self, references: Sequence[LoadedReference], layout: Layout, model: str) -> None:
        self._references = tuple(references)
        self._layout = layout
        self._model = model
        self._here = ThreadState()

    @property
    def settings(self) -> tuple[ReferenceSettings, ...]:
        return tuple(reference.settings for reference in self._references)

    def __len__(self) -> int:
        return len(self._references)

    def check(self, pipe: Any) -> None:
        """Refuses pictures that this pipeline, or bare model (None), cannot encode."""
        if all(reference.frames is None for reference in self._references):
            return
        if pipe is None:
            reason = "a bare model has no VAE; pass its pipeline"
        elif getattr(pipe, "vae", None) is None:
            reason = f"{type(pipe).__name__} has no VAE; load one"
        elif self._layout.encode is None:
            reason = f"it is not known how {self._model} is given pictures"
        else:
            return
        raise ValueError(f"reference images cannot be encoded: {reason}, or give them as latents")

    def begin_run(self) -> None:
        """Has the noise drawn anew; pictures that were encoded at this size are kept."""
        self._noise = ()

    @torch.no_grad()
    def latents(
        self,
        pipe: Any,
        latents: Tensor,
        tokens: ImageTokens | None,
        channels: int | None,
        scheduler: tuple[Any, Tensor] | None,
        generator: torch.Generator | None,
    ) -> list[Tensor]:
        """What the model is to be given of each reference at this step: (1, ...), as `latents`.

        Args:
            latents: of the run, items first.
            tokens: the image tokens, where known.
            channels: the model's `out_channels`, where its inputs have more.
            scheduler: its copy at this step, and the timestep (1,); None where not known.
            generator: the caller's.
        """
        place = (tokens.generated, tokens.grid, tokens.frames) if tokens else None
        key = (tuple(latents.shape[1:]), place, latents.device)
        if key != self._key:
            self._clean = [
                self._encode(number, reference, pipe, latents, tokens, channels)
                for number, reference in enumerate(self._references)
            ]
            self._key, self._noise = key, ()
        if not self._noise:
            self._noise = draw_noise(self._clean, generator)
        return [
            at_timestep(clean, noise if reference.noise else None, scheduler).to(latents.dtype)
            for reference, clean, noise in zip(
                self._references, self._clean, self._noise, strict=True
            )
        ]

    def _encode(
        self,
        number: int,
        reference: LoadedReference,
        pipe: Any,
        latents: Tensor,
        tokens: ImageTokens | None,
        channels: int | None,
    ) -> Tensor:
        encode = self._layout.encode
        candidates = []
        if reference.latents is None:
            assert encode is not None
            grid, frames = (tokens.grid, tokens.frames) if tokens else (None, 1)
            size = encode.size(pipe, latents, grid, frames)
            if len(reference.frames or ()) > 1 and size[0] == 1:
                raise ValueError(
                    f"reference {number} is a video, and {self._model} makes images; give one frame"
                )
            candidates.append(encode(pipe, reference.pixels(size)))
        else:
            given = reference.latents.detach()
            given = given.to(torch.promote_types(given.dtype, torch.float32))
            candidates += [given, given[None]]
            if encode is not None and latents.ndim == 3:
                candidates += [encode.pack(c) for c in candidates if c.ndim in (4, 5)]
        for candidate in candidates:
            if _fits(candidate, latents, tokens, channels):
                return candidate.to(latents.device)
        shape = tuple((candidates[0] if reference.latents is None else reference.latents).shape)
        raise ValueError(
            f"reference {number} has latents of the shape {shape}, which do not fit those of this "
            f"run, {tuple(latents.shape)}; generate in their size, or give the reference as an "
            "image, which is resized"
        )


def _fits(
    candidate: Tensor, latents: Tensor, tokens: ImageTokens | None, channels: int | None
) -> bool:
    """Whether these are latents (1, ...) of the run, or of the part of them that is generated.

    Edit pipelines add the tokens or channels of their conditions.
    """
    if candidate.ndim != latents.ndim or candidate.shape[0] != 1:
        return False
    for axis in range(1, latents.ndim):
        own, run = candidate.shape[axis], latents.shape[axis]
        generated = latents.ndim == 3 and axis == 1 and tokens and own == tokens.generated
        if own != run and not generated and not (own == channels and own < run):
            return False
    return True


def draw_noise(clean: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Standard normal noise for each; the generator (None: torch's own) stays as it is.

    Drawn on the CPU, so that a seed gives the same noise on every device, and from numbers of
    its own, so that it is not the noise that the scheduler adds next.
    """
    state = torch.random.default_generator if generator is None else generator
    copied = torch.Generator(state.device)
    copied.set_state(state.get_state())
    seed = torch.randint(2**62, (1,), generator=copied, device=copied.device).item()
    own = torch.Generator().manual_seed(int(seed))
    options: dict[str, Any] = {"generator": own, "dtype": torch.float32, "device": "cpu"}
    return [torch.randn(c.shape, **options).to(c) for c in clean]


def at_timestep(
    clean: Tensor, noise: Tensor | None, scheduler: tuple[Any, Tensor] | None
) -> Tensor:
    """The model's input for clean latents: noised unless `noise` is None, and scaled.

    Flow matching: (1 - s) x + s e; DDPM: sqrt(a) x + sqrt(1 - a) e; Euler: x + s e, which is then
    scaled by 1 / sqrt(s^2 + 1).
    """
    if scheduler is None:
        if noise is None:
            return clean
        raise ValueError(
            "a reference is noised by the pipeline's scheduler, which does not know the timestep "
            "of this forward; apply to the pipeline that is run, or use Reference(noise=False)"
        )
    rule, timestep = scheduler
    if noise is not None:
        if getattr(rule.config, "invert_sigmas", False):  # from 0 (noise) to 1: Mochi, OmniGen
            clean, noise = noise, clean
        add = getattr(rule, "scale_noise", None)
        if add is not None:
            if rule.sigmas[rule.step_index or 0] > 1:
                raise ValueError(
                    f"this {type(rule).__name__} has sigmas above 1, as Cosmos has, whose pipeline "
                    "scales its latents itself; use Reference(noise=False) with latents at the "
                    "scale of the model's input"
                )
            clean = add(clean, timestep, noise)
        elif hasattr(rule, "add_noise"):
            clean = rule.add_noise(clean, noise, timestep)
        else:
            raise ValueError(
                f"{type(rule).__name__} does not tell how to add noise to a reference; use "
                "Reference(noise=False)"
            )
    scale = getattr(rule, "scale_model_input", None)
    return clean if scale is None else scale(clean, timestep[0])


def select_items(
    value: Any,
    batch: int,
    items: Tensor,
    name: str = "",
    lists: bool = False,
    frames: int = 1,
) -> Any:
    """An argument of the model's forward for these items of its batch.

    Tensors whose first dimension is the batch, inside of mappings, tuples and lists; and lists of
    one entry an item. Whatever has no items is handed through.

    Args:
        lists: a list has an entry for each item, whatever its entries look like: so in models
            whose latents are a list. Else a list of batches is one of ControlNet's, say.
        frames: of each item, where arguments may have batch * frames entries.
    """
    if any(fnmatchcase(name, pattern) for pattern in _NEVER_BATCHED):
        return value
    if isinstance(value, Tensor):
        axis = _BATCH_AXIS.get(name, 0)
        batched = value.ndim > axis and value.shape[axis] == batch
        if axis == 0 and frames > 1 and value.ndim > 1 and value.shape[0] == batch * frames:
            by_item = value.unflatten(0, (batch, frames))
            return by_item.index_select(0, items.to(value.device)).flatten(0, 1)
        if not batched or value.ndim == _WITHOUT_BATCH.get(name):
            return value
        return value.index_select(axis, items.to(value.device))
    if isinstance(value, Mapping):
        return {k: select_items(v, batch, items, str(k), lists, frames) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        batches = all(isinstance(v, Tensor) and v.ndim and v.shape[0] == batch for v in value)
        if isinstance(value, list) and len(value) == batch and (lists or not batches):
            return [value[item] for item in items.tolist()]
        selected = (select_items(entry, batch, items, name, lists, frames) for entry in value)
        return type(value)(*selected) if hasattr(value, "_fields") else type(value)(selected)
    return value


def with_latents(
    value: Any,
    references: Sequence[Tensor],
    tokens: ImageTokens | None = None,
    frame_axis: int = 2,
) -> Any:
    """The model's latents, a tensor (B, ...) or a list of B, with those of the references in them.

    The conditions of edit and image-to-video pipelines stay: channels and tokens that come after,
    tokens and frames that come before what is generated.

    Args:
        references: one (1, ...) for each item, of what is generated or of all.
        tokens: the image tokens, where known.
        frame_axis: of latents with frames.
    """
    if isinstance(value, (list, tuple)):
        # A list in the place of an item holds its conditions, and the generated image at its end.
        return [
            [*item[:-1], with_latents(item[-1][None], [own])[0]]
            if isinstance(item, (list, tuple))
            else with_latents(item[None], [own])[0]
            for item, own in zip(value, references, strict=True)
        ]
    own, value = torch.cat(list(references)), value.clone()
    place = [slice(0, size) for size in own.shape]
    source = [slice(None)] * own.ndim
    if tokens is not None and own.ndim == 3:
        place[1] = slice(tokens.first, tokens.first + tokens.generated)
        if own.shape[1] != tokens.generated:
            source[1] = place[1]
    elif tokens is not None and tokens.grid is not None and own.ndim == 5:
        given = tokens.first // (tokens.grid[0] * tokens.grid[1])
        if own.shape[frame_axis] == tokens.frames + given:
            place[frame_axis] = source[frame_axis] = slice(given, None)
    value[tuple(place)] = own[tuple(source)]
    return value


def refuse_stateful(arguments: Mapping[str, Any], model: str) -> None:
    """Keys and values that one forward leaves for the next would be those of the references."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            refuse_stateful(value, model)
        elif any(cache in name for cache in _CACHES) and not _is_idle(value):
            raise ValueError(
                f"{model} is called with a cache, {name}, which the references' forward would "
                "change; references need a pipeline without it"
            )


def _is_idle(cache: Any) -> bool:
    """Whether a cache holds nothing and is not filled: GLM-Image's where nothing is edited."""
    layers = getattr(cache, "caches", None)
    return cache is None or (
        isinstance(layers, list)
        and all(layer.mode != "write" and not layer.k_caches for layer in layers)
    )


def _frames(source: Any, what: str) -> tuple[Image, ...]:
    """The RGB frames of a picture or video."""
    return tuple(frame.convert("RGB") for frame in _pictures(source, what))


def _mask(source: Any) -> Tensor:
    """Bool (F, H, W)."""
    import numpy as np

    if isinstance(source, (Tensor, np.ndarray)) and source.dtype in (torch.bool, np.dtype(bool)):
        mask = torch.as_tensor(source).cpu()
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.ndim != 3:
            raise ValueError(f"a bool mask must be (H, W) or (F, H, W), not {tuple(mask.shape)}")
    else:
        grey = [np.asarray(frame.convert("L")) for frame in _pictures(source, "mask")]
        if len({frame.shape for frame in grey}) > 1:
            raise ValueError("the frames of a mask have different sizes")
        mask = torch.from_numpy(np.stack(grey) > 127)
    if not mask.any():
        raise ValueError(
            f"the mask{_named(source)} is black everywhere, so nothing of the reference could be "
            "matched; white marks what may be"
        )
    return mask


def _named(source: Any) -> str:
    return f" {source}" if isinstance(source, (str, Path)) else ""


def _pictures(source: Any, what: str) -> list[Image]:
    """A picture, or the frames of a video, as PIL images."""
    import numpy as np
    from PIL import Image

    if isinstance(source, Image.Image):
        return [source]
    if isinstance(source, (str, Path)):
        return _read(Path(source), what)
    if isinstance(source, np.ndarray):
        frames = source if source.ndim == 4 else source[None]
        grey = what == "mask" and source.ndim == 2
        if source.dtype != np.uint8 or not (grey or (frames.ndim == 4 and frames.shape[3] == 3)):
            raise ValueError(
                f"a {what} that is an array must be uint8 (H, W, 3) or (F, H, W, 3), not "
                f"{source.dtype} {source.shape}"
            )
        return [Image.fromarray(frame) for frame in frames]
    if isinstance(source, Sequence) and source:
        return [picture for entry in source for picture in _pictures(entry, what)]
    raise TypeError(
        f"a {what} must be a PIL image, a uint8 array, a path or a sequence of these, not "
        f"{type(source).__name__}" + (" without entries" if isinstance(source, Sequence) else "")
    )


def _read(path: Path, what: str) -> list[Image]:
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"the folder {path} of the {what} holds no images")
        return [frame for file in files for frame in _read(file, what)]
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} at {path}")
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return _read_video(path)
    try:
        with Image.open(path) as image:
            return [ImageOps.exif_transpose(f.copy()) for f in ImageSequence.Iterator(image)]
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is not an image that can be read; give the {what} as PNG, JPEG or WebP, and a "
            "video as a GIF or a folder of frames"
        ) from error


def _read_video(path: Path) -> list[Image]:
    from PIL import Image

    try:
        imageio = import_module("imageio.v3")
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs imageio: pip install 'imageio[pyav]'; or give the video as a "
            "GIF or a folder of frames"
        ) from error
    return [Image.fromarray(frame) for frame in imageio.imiter(path)]
