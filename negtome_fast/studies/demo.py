"""`negtome-fast demo`: the embedded model with and without guidance, from the same seeds.

Writes a labelled picture and a JSON file. The table that it prints also shows prompts for which
guidance does not help.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import models, ops
from ..config import NegToMeConfig
from ..models.avatars import OPEN_ATTRIBUTES, attributes_in, check_prompt
from .conditions import Condition, Group
from .measures import attribute_entropy, mean_pairwise_cosine, prompt_agreement
from .sampler import Sampler
from .store import check_file, save_png, save_text

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = (
    "a pixel art person",
    "a big smile person",
    "an adventurer person with long hair",
    "a voxel art person with long red hair and dark skin",
)

#: Settings of the guidance: every image is pushed away from all others. The authors' window for
#: FLUX.1, [900, 1000], holds only three of the 20 steps here; this one is wider.
CONFIG = NegToMeConfig(alpha=0.5, threshold=0.65, t_start=1000, t_end=750, reference="others")


MOST_IMAGES, MOST_STEPS, MOST_SCALE = 256, 1000, 100
"""Limits of a request: more images do not fit memory, and more steps or scale change nothing."""


@dataclass(frozen=True)
class Measures:
    """Measures of one batch of images.

    Attributes:
        seconds: sampling time per image.
        cosine: mean pairwise cosine of image features; lower is more diverse.
        entropy: entropy of the attributes that the prompt leaves open, in nats; None if it names
            all of them.
        agreement: share of images that show everything that the prompt names.
    """

    seconds: float
    cosine: float
    entropy: float | None
    agreement: float


@dataclass(frozen=True)
class PromptResult:
    """Measures of one prompt, without and with guidance.

    Attributes:
        prompt: the prompt.
        without: measures without guidance.
        guided: measures with guidance.
        pushed: share of tokens that the guidance pushed.
        similarity: mean best cosine that the guidance saw.
    """

    prompt: str
    without: Measures
    guided: Measures
    pushed: float
    similarity: float

    @property
    def verdict(self) -> str:
        """The effect in words: diversity by the cosine, cost by the prompt agreement."""
        closer = self.guided.cosine - self.without.cosine
        if closer < -0.01:
            words = "more diverse"
        elif closer > 0.01:
            words = "less diverse"
        else:
            words = "no change seen"
        lost = self.without.agreement - self.guided.agreement
        return f"{words}, off the prompt more often" if lost > 0 else words


def run(
    prompts: Sequence[str],
    config: NegToMeConfig,
    seed: int,
    count: int,
    output: Path,
    guidance_scale: float = models.GUIDANCE_SCALE,
    steps: int = models.STEPS,
) -> list[PromptResult]:
    """Generate and measure; write `output` (PNG) and a JSON file beside it.

    Args:
        prompts: words of the embedded model's vocabulary.
        config: settings of the guidance.
        seed: seed of the first image of every prompt.
        count: number of images per prompt, at least 2.
        output: the picture.
        guidance_scale: true classifier-free guidance scale; 1 switches it off.
        steps: number of scheduler steps.

    Raises:
        ValueError: an unknown word in a prompt, or a number that is out of range.
        OSError: the picture cannot be written; raised before anything is generated.
        RuntimeError: the backend was chosen by name and cannot run here.
    """
    if not 2 <= count <= MOST_IMAGES:
        raise ValueError(
            f"`images` must be 2, to differ from each other, to {MOST_IMAGES}, got {count}"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be between 0 and 2**63, got {seed}")
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"`steps` must be 1 to {MOST_STEPS}, got {steps}")
    if not 0 <= guidance_scale <= MOST_SCALE:
        raise ValueError(f"`guidance_scale` must be 0 to {MOST_SCALE}, got {guidance_scale}")
    for prompt in prompts:
        check_prompt(prompt)
    check_file("output", output)
    output.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops.resolve_backend(config.backend, torch.device(device), torch.float32)
    sampler = Sampler(None, device=device)
    plain = Condition("without", guidance_scale=guidance_scale, steps=steps)
    guided = replace(plain, name="with", negtome=config)
    groups = [Group(prompt, tuple(range(seed, seed + count))) for prompt in prompts]
    # The first call of a process is slow; it must not be charged to the unguided column.
    sampler.draw(replace(plain, steps=1), groups[:1])
    results, rows = _compare(sampler, plain, guided, groups)
    save_png(output, picture(results, rows, caption(config, guidance_scale, steps, seed)))
    record = {
        "config": config.to_dict(),
        "seed": seed,
        "images_per_prompt": count,
        "guidance_scale": guidance_scale,
        "steps": steps,
        "device": device,
        "torch": torch.__version__,
        "results": [{**asdict(result), "verdict": result.verdict} for result in results],
    }
    save_text(output.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    return results


def _compare(
    sampler: Sampler, plain: Condition, guided: Condition, groups: Sequence[Group]
) -> tuple[list[PromptResult], list[tuple[Tensor, Tensor]]]:
    """Draw each group without and with guidance; return the measures and both batches of images."""
    from tqdm import tqdm

    results, rows = [], []
    with tqdm(total=2 * len(groups) * plain.steps, desc="generating", unit="step") as bar:
        for group in groups:
            images, before, _ = _drawn(sampler, plain, group, bar.update)
            moved, after, (_, pushed, similarity) = _drawn(sampler, guided, group, bar.update)
            results.append(PromptResult(group.prompt, before, after, pushed, similarity))
            rows.append((images, moved))
    return results, rows


def _drawn(
    sampler: Sampler, condition: Condition, group: Group, tick: Callable[[], Any]
) -> tuple[Tensor, Measures, tuple[float, float, float]]:
    """Return images (B, 3, 64, 64) in [0, 1], their measures, and the guidance's counts."""

    def after_step(_: Any, __: int, ___: Any, kept: dict[str, Any]) -> dict[str, Any]:
        tick()
        return kept

    began = time.perf_counter()
    images, counts = sampler.draw(condition, [group], callback_on_step_end=after_step)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    seconds = time.perf_counter() - began
    readings = sampler.reader.read(images * 2 - 1)
    free = [name for name in OPEN_ATTRIBUTES if name not in attributes_in(group.prompt)]
    measures = Measures(
        seconds=seconds / len(images),
        cosine=mean_pairwise_cosine(sampler.features(images)),
        entropy=attribute_entropy(readings, free) if free else None,
        agreement=prompt_agreement(readings, group.prompt),
    )
    return images, measures, counts


def caption(config: NegToMeConfig, guidance_scale: float, steps: int, seed: int) -> str:
    """Return the settings in a line, for the foot of the picture."""
    if config.steps is None:
        window = f"t in [{config.t_end:g}, {config.t_start:g}]"
    else:
        window = f"steps {config.steps[0]:g} to {config.steps[1]:g}"
    return (
        f'reference="{config.reference}", matching="{config.matching}", alpha {config.alpha:g}, '
        f"threshold {config.threshold:g}, {window}, guidance scale {guidance_scale:g}, "
        f"{steps} steps, first seed {seed}"
    )


def table(results: Sequence[PromptResult]) -> str:
    """Return the measures as text with a row per prompt; cells read `without -> with`."""

    def change(a: float | None, b: float | None, digits: int) -> str:
        return "-" if a is None or b is None else f"{a:.{digits}f} -> {b:.{digits}f}"

    header = ["prompt", "pairwise cosine", "open entropy", "prompt kept", "s / image", "pushed", ""]
    lines = [header]
    for r in results:
        lines.append(
            [
                r.prompt,
                change(r.without.cosine, r.guided.cosine, 3),
                change(r.without.entropy, r.guided.entropy, 2),
                f"{r.without.agreement:.0%} -> {r.guided.agreement:.0%}",
                change(r.without.seconds, r.guided.seconds, 2),
                f"{r.pushed:.0%}",
                r.verdict,
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    helped = sum(r.verdict == "more diverse" for r in results)
    text.append("")
    text.append(
        "Each cell: without -> with guidance, same seeds. A lower cosine of image features and a "
        "higher entropy\n(nats, of the attributes that the prompt leaves open) mean more diverse. "
        f"More diverse at no cost to the\nprompt for {helped} of {len(results)} prompts."
    )
    return "\n".join(line.rstrip() for line in text)


def picture(
    results: Sequence[PromptResult], rows: Sequence[tuple[Tensor, Tensor]], footer: str
) -> Image:
    """Draw a sheet with a row per prompt: images without guidance left, with guidance right."""
    from PIL import Image, ImageDraw, ImageFont

    scale, gap, margin, label, head = 2, 6, 24, 46, 40
    count = len(rows[0][0])
    tile = rows[0][0].shape[-1] * scale
    columns = min(count, 4)
    lines = -(-count // columns)
    half = columns * (tile + gap) - gap
    block = label + lines * (tile + gap)
    width = 3 * margin + 2 * half
    sheet = Image.new("RGB", (width, head + len(rows) * (block + 12) + 34), "white")
    draw = ImageDraw.Draw(sheet)
    title, body, small = (ImageFont.load_default(size=s) for s in (22, 17, 13))
    lefts = (margin, 2 * margin + half)
    draw.text((lefts[0], 10), "without guidance", "black", font=title)
    draw.text((lefts[1], 10), "with NegToMe, same seeds", "#0b57d0", font=title)
    for number, (result, pair) in enumerate(zip(results, rows, strict=True)):
        top = head + number * (block + 12)
        draw.text((margin, top + 4), f'"{result.prompt}"', "black", font=body)
        for left, images, measures in zip(
            lefts, pair, (result.without, result.guided), strict=True
        ):
            words = f"pairwise cosine {measures.cosine:.2f}"
            if measures.entropy is not None:
                words += f", entropy of open attributes {measures.entropy:.2f}"
            words += f", prompt kept {measures.agreement:.0%}"
            draw.text((left, top + 27), words, "#444444", font=small)
            for place, image in enumerate(images):
                array = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
                drawn = Image.fromarray(array).resize((tile, tile), Image.Resampling.NEAREST)
                x = left + place % columns * (tile + gap)
                y = top + label + place // columns * (tile + gap)
                sheet.paste(drawn, (x, y))
    draw.text((margin, sheet.height - 24), footer, "#444444", font=small)
    return sheet
