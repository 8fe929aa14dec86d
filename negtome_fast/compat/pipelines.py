"""The authors' pipelines as subclasses of diffusers', guided by hooks instead of a copied loop.

`__call__` has two more arguments, `use_negtome` and `negtome_args`. Everything else is as in the
installed diffusers, except for defaults that differ in the authors' code.
"""

from __future__ import annotations

import functools
import glob
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..config import Grid, NegToMeConfig
from ..pipelines import negtome_guidance
from ..statistics import GuidanceSummary
from .arguments import TEXT_TOKENS, AuthorsConfig, NegtomeArgs

PictureEncoder = Callable[[Tensor], Tensor]
"""Timestep of a step -> latents (1, ...) of the reference picture in that step."""


class _Guided:
    """Base of both pipelines.

    Attributes:
        negtome_summary: counts of the last guided call.
    """

    negtome_summary: GuidanceSummary | None = None
    _without: ClassVar[tuple[str, ...]] = ()

    def _guided_call(
        self,
        call: Callable[[], Any],
        arguments: NegtomeArgs,
        config: NegToMeConfig | None,
        model: nn.Module,
        encoder: Callable[[], PictureEncoder],
        mask: Callable[[Grid], Tensor],
    ) -> Any:
        """Runs the pipeline.

        Args:
            call: diffusers' `__call__`.
            arguments: the call's `negtome_args`.
            config: settings of the guidance; None for no guidance.
            model: the denoiser.
            encoder: makes the encoder of the reference picture, once per call.
            mask: (height, width) of a block's tokens -> bool (height * width,).
        """
        with ExitStack() as stack:
            if arguments.use_rag_assets:
                stack.enter_context(_first_item(self, model, encoder()))
            if config is None:
                return call()
            handle = stack.enter_context(negtome_guidance(self, config))
            handle.guidance.watch.advice = "nothing is guided. Lower merging_t_end"
            if arguments.use_rag_assets:
                handle.guidance.reference_mask = mask
            result = call()
            self.negtome_summary = handle.summary()
            return result

    def _config(
        self, arguments: NegtomeArgs, threshold: float, t_end: float, **settings: Any
    ) -> NegToMeConfig:
        given = (arguments.merging_threshold, arguments.merging_t_end)
        return AuthorsConfig(
            alpha=arguments.merging_alpha,
            threshold=threshold if given[0] is None else given[0],
            dropout=arguments.merging_dropout,
            t_start=arguments.merging_t_start,
            t_end=t_end if given[1] is None else given[1],
            matching=arguments.matching,
            backend=arguments.backend,
            **settings,
        )


class FluxNegToMePipeline(_Guided, FluxPipeline):
    """`FluxPipeline` with the authors' `use_negtome` and `negtome_args` (see `NegtomeArgs`).

    The authors push the attention's output before its projection, in double and in single blocks.
    Text and image tokens are told apart by the model's inputs, at any prompt length and size.
    """

    _without = ("blocks", "min_attn_dim")

    def __call__(
        self,
        *args: Any,
        use_negtome: bool = False,
        negtome_args: NegtomeArgs | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls `FluxPipeline`; `guidance_scale` defaults to 7.0, as in the authors' code.

        Raises:
            ValueError, TypeError: `negtome_args` has an unknown key or a wrong value; and whatever
                diffusers raises.
        """
        arguments = NegtomeArgs.of(negtome_args, self._without, type(self).__name__)
        kwargs = _by_name(super().__call__, args, kwargs)
        embeds, length = kwargs.get("prompt_embeds"), kwargs.get("max_sequence_length", TEXT_TOKENS)
        length = length if embeds is None else embeds.shape[1]
        if arguments.num_lang_tokens not in (TEXT_TOKENS, length):
            raise ValueError(
                f"num_lang_tokens={arguments.num_lang_tokens}, but the prompt has {length} tokens; "
                "leave it out, because the model's inputs tell the text from the image"
            )
        kwargs.setdefault("guidance_scale", 7.0)
        dtype = self.transformer.dtype if embeds is None else embeds.dtype
        config = None
        blocks = self._guided_blocks(arguments)
        if use_negtome and blocks:
            config = self._config(
                arguments,
                threshold=0.65,
                t_end=900,
                blocks=blocks,
                placement="pre_projection",
                groups=1,
                time_dtype=dtype,
            )
        size = [
            kwargs.get(name) or self.default_sample_size * self.vae_scale_factor
            for name in ("height", "width")
        ]
        return self._guided_call(
            functools.partial(super().__call__, **kwargs),
            arguments,
            config,
            self.transformer,
            lambda: self._picture_encoder(arguments, size, kwargs.get("generator"), dtype),
            lambda grid: _resized(_mask_of(arguments), grid).flatten() > 0,
        )

    def _guided_blocks(self, arguments: NegtomeArgs) -> list[str]:
        names = []
        for kind, number in (
            ("transformer_blocks", arguments.num_joint_blocks),
            ("single_transformer_blocks", arguments.num_single_blocks),
        ):
            count = len(getattr(self.transformer, kind))
            names += [
                f"{kind}.{i}.attn" for i in range(count if number < 0 else min(number, count))
            ]
        return names

    @torch.no_grad()
    def _picture_encoder(
        self, arguments: NegtomeArgs, size: list[int], generator: Any, dtype: torch.dtype
    ) -> PictureEncoder:
        device, generator = self._execution_device, _first(generator)
        picture = self.image_processor.preprocess(_picture_of(arguments), *size)
        distribution = self.vae.encode(picture.to(device, self.vae.dtype)).latent_dist
        settings = self.vae.config

        def encode(timestep: Tensor) -> Tensor:
            latents = (
                distribution.sample(generator) - settings.shift_factor
            ) * settings.scaling_factor
            latents = latents.to(dtype)
            if arguments.noise_rag:
                noise = _noise_like(latents, generator)
                latents = self.scheduler.scale_noise(latents, timestep.reshape(1), noise)
            return self._pack_latents(latents, *latents.shape)

        return encode


class StableDiffusionXLNegToMePipeline(_Guided, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with the authors' `use_negtome` and `negtome_args`.

    The authors push after the output projection, in `attn1` and `attn2`, and always split the batch
    into two halves, even without classifier-free guidance; `matching="paper"` splits it only with
    classifier-free guidance.
    """

    _without = ("num_joint_blocks", "num_single_blocks", "num_lang_tokens")

    def __call__(
        self,
        *args: Any,
        use_negtome: bool = False,
        negtome_args: NegtomeArgs | Mapping[str, Any] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Calls `StableDiffusionXLPipeline`; their `seed` is used if no generator is given.

        Raises:
            ValueError, TypeError: `negtome_args` has an unknown key or a wrong value; and whatever
                diffusers raises.
        """
        arguments = NegtomeArgs.of(negtome_args, self._without, type(self).__name__)
        kwargs = _by_name(super().__call__, args, kwargs)
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator(self._execution_device).manual_seed(seed)
        blocks = ["up_blocks"] if arguments.blocks is None else arguments.blocks
        config = None
        if use_negtome and blocks:
            smallest = arguments.min_attn_dim
            config = self._config(
                arguments,
                threshold=0.7,
                t_end=800,
                blocks=[glob.escape(name.removesuffix(".processor")) + "*" for name in blocks],
                min_grid=(smallest, smallest) if smallest > 1 else None,
                groups=1 if arguments.matching == "paper" or self._concatenates(kwargs) else 2,
            )
        size = [
            kwargs.get(name) or self.default_sample_size * self.vae_scale_factor
            for name in ("height", "width")
        ]

        def mask(grid: Grid) -> Tensor:
            at_latents = _resized(_mask_of(arguments), [n // self.vae_scale_factor for n in size])
            return _resized(at_latents, grid).flatten() > 0

        return self._guided_call(
            functools.partial(super().__call__, **kwargs),
            arguments,
            config,
            self.unet,
            lambda: self._picture_encoder(arguments, size, kwargs["generator"]),
            mask,
        )

    def _concatenates(self, arguments: Mapping[str, Any]) -> bool:
        """Returns True if a call with these arguments has two guidance parts in its batch."""
        scale = arguments.get("guidance_scale", 5.0)
        return bool(scale > 1 and self.unet.config.time_cond_proj_dim is None)

    @torch.no_grad()
    def _picture_encoder(
        self, arguments: NegtomeArgs, size: list[int], generator: Any
    ) -> PictureEncoder:
        device, generator, dtype = self._execution_device, _first(generator), self.unet.dtype
        picture = self.image_processor.preprocess(_picture_of(arguments), *size)
        settings, vae_dtype = self.vae.config, self.vae.dtype
        upcast = settings.force_upcast and vae_dtype in (torch.float16, torch.bfloat16)
        if upcast:  # the VAE overflows in fp16
            self.vae.to(torch.float32)
        try:
            distribution = self.vae.encode(picture.to(device, self.vae.dtype)).latent_dist
        finally:
            if upcast:
                self.vae.to(vae_dtype)
        mean, std = (
            None if values is None else torch.tensor(values, device=device).view(1, -1, 1, 1)
            for values in (settings.get("latents_mean"), settings.get("latents_std"))
        )

        def encode(timestep: Tensor) -> Tensor:
            latents = distribution.sample(generator).to(dtype)
            if mean is not None and std is not None:
                latents = (latents - mean.to(dtype)) / std.to(dtype)
            latents = settings.scaling_factor * latents
            if arguments.noise_rag:
                noise = _noise_like(latents, generator)
                latents = self.scheduler.add_noise(latents, noise, timestep.reshape(1))
            return latents

        return encode


@contextmanager
def _first_item(pipe: Any, model: nn.Module, encode: PictureEncoder) -> Iterator[None]:
    """Makes the reference picture item 0 of the batch in every step.

    The latents are changed on their way to the model and to the scheduler, so that the loop need
    not be copied.
    """
    scheduler = pipe.scheduler
    current: list[Tensor] = []

    def before_model(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # FLUX.1 gets its latents by name, and a time that is scaled and rounded. SDXL gets its
        # latents by position, and the timestep itself.
        is_unet = "hidden_states" not in kwargs
        given = args[0] if is_unet else kwargs["hidden_states"]
        timestep = args[1] if is_unet else pipe._current_timestep
        if not current:
            current.append(encode(timestep))
        picture = scheduler.scale_model_input(current[0], timestep) if is_unet else current[0]
        parts = 2 if is_unet and pipe.do_classifier_free_guidance else 1
        latents = given.clone()
        latents[:: len(given) // parts] = picture.to(given.dtype)
        if is_unet:
            return (latents, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": latents}

    real_step = scheduler.step

    @functools.wraps(real_step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        sample = torch.cat([current.pop().to(sample.dtype), sample[1:]])
        return real_step(model_output, timestep, sample, *args, **kwargs)

    overridden = "step" in vars(scheduler)
    hook = model.register_forward_pre_hook(before_model, with_kwargs=True, prepend=True)
    scheduler.step = step
    try:
        yield
    finally:
        hook.remove()
        if overridden:
            scheduler.step = real_step
        else:
            del scheduler.step


def _by_name(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Returns all arguments of a pipeline's call by their names."""
    given = dict(inspect.signature(call).bind_partial(*args, **kwargs).arguments)
    others = given.pop("kwargs", {})
    return {**given, **others}


def _picture_of(arguments: NegtomeArgs) -> Any:
    return (arguments.rag_assets or ())[0][0]


def _mask_of(arguments: NegtomeArgs) -> Tensor:
    """Returns the picture's mask (H, W) in [0, 1]; ones (1, 1) if there is none."""
    mask = (arguments.rag_assets or ())[0][1]
    if mask is None:
        return torch.ones(1, 1)
    return torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32)) / 255


def _resized(mask: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(mask[None, None], tuple(size), mode="nearest-exact")[0, 0]


def _first(generator: Any) -> torch.Generator | None:
    return generator[0] if isinstance(generator, (list, tuple)) else generator


def _noise_like(latents: Tensor, generator: torch.Generator | None) -> Tensor:
    return randn_tensor(latents.shape, generator, device=latents.device, dtype=latents.dtype)
