"""The world of `tiny-flux-avatars`: attributes, prompts, skewed sampling, rendering.

DiceBear draws the avatars (styles under CC0 and CC BY, see NOTICE) and resvg rasterises them. The
true attributes of every image are known, so prompt agreement and diversity can be measured.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata, resources
from typing import Any, Literal

import numpy as np

#: Distribution of the attributes, see `sample_avatars`.
Kind = Literal["skewed", "balanced", "unusual"]

IMAGE_SIZE = 64
BACKGROUND = "#eef1f5"

SKINS = {"fair": "#f7d9b8", "tan": "#dda46a", "bronze": "#a8683a", "dark": "#5a3820"}
HAIR_COLORS = {
    "black": "#1d1a20",
    "brown": "#6b4226",
    "blond": "#ecc95c",
    "red": "#c5281c",
    "blue": "#2f6fd6",
    "green": "#2f9e44",
}
HAIR_SHAPES = ("short", "long", "curly", "mohawk", "bun")


@dataclass(frozen=True)
class StyleSpec:
    """One DiceBear style.

    Attributes:
        file: name of the style's file.
        hair_component: component that has the hair.
        shapes: variants of that component that show each hair shape.
        majority: value of each open attribute that most training images have.
        options: further options of the style.
    """

    file: str
    hair_component: str
    shapes: dict[str, tuple[str, ...]]
    majority: dict[str, str]
    options: dict[str, Any]


STYLES: dict[str, StyleSpec] = {
    "pixel art": StyleSpec(
        file="pixel-art",
        hair_component="hair",
        shapes={
            "short": ("short15", "short16"),
            "long": ("long09", "long12"),
            "curly": ("long15", "short11"),
            "mohawk": ("short21",),
            "bun": ("long05",),
        },
        majority={"skin": "fair", "hair_color": "black", "hair_shape": "short"},
        options={
            "eyesVariant": ["variant01", "variant05", "variant12"],
            "eyesColor": ["#647b90"],
            "mouthVariant": ["happy01", "happy04", "happy09", "sad05"],
            "mouthColor": ["#d11141"],
            "clothesVariant": ["variant01", "variant06", "variant12"],
            "clothingColor": ["#428bca", "#44c585", "#d11141", "#ffd969"],
            "beardProbability": 0,
            "glassesProbability": 0,
            "hatProbability": 0,
            "accessoriesProbability": 0,
        },
    ),
    "voxel art": StyleSpec(
        file="voxel-art",
        hair_component="top",
        shapes={
            "short": ("short", "sideSwept"),
            "long": ("longStraight", "shoulderLength"),
            "curly": ("afro",),
            "mohawk": ("mohawk",),
            "bun": ("buns",),
        },
        majority={"skin": "tan", "hair_color": "brown", "hair_shape": "long"},
        options={
            "outfitVariant": ["plain", "stripes", "hoodie"],
            "mouthVariant": ["smile", "bigSmile", "flat"],
            "eyesVariant": ["open", "happy", "wide"],
            "noseVariant": ["block"],
            "shirtColor": ["#e64980", "#fab005", "#40c057", "#228be6"],
            "pantsColor": ["#3b5b8c"],
            "shoesColor": ["#343a40"],
            "animationVariant": ["none"],
            "topProbability": 100,
            "beardProbability": 0,
            "glassesProbability": 0,
            "cheeksProbability": 0,
        },
    ),
    "big smile": StyleSpec(
        file="big-smile",
        hair_component="hair",
        shapes={
            "short": ("shortHair", "shavedHead"),
            "long": ("straightHair", "bangs"),
            "curly": ("curlyShortHair", "curlyBob"),
            "mohawk": ("mohawk",),
            "bun": ("bunHair",),
        },
        majority={"skin": "dark", "hair_color": "black", "hair_shape": "curly"},
        options={
            "eyesVariant": ["cheery", "normal", "sad", "winking"],
            "mouthVariant": ["openedSmile", "teethSmile", "unimpressed", "kawaii"],
            "accessoriesProbability": 0,
        },
    ),
    "adventurer": StyleSpec(
        file="adventurer",
        hair_component="hair",
        shapes={
            "short": ("short10", "short04"),
            "long": ("long07", "long05"),
            "curly": ("short03", "short18"),
            "mohawk": ("short15",),
            "bun": ("long23",),
        },
        majority={"skin": "fair", "hair_color": "blond", "hair_shape": "long"},
        options={
            "eyesVariant": ["variant04", "variant12", "variant23", "variant26"],
            "eyebrowsVariant": ["variant01", "variant10"],
            "mouthVariant": ["variant01", "variant05", "variant21", "variant26"],
            "earringsProbability": 0,
            "glassesProbability": 0,
            "detailsProbability": 0,
        },
    ),
}

#: The attributes and their values, in the order of the reader's classes.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "style": tuple(STYLES),
    "skin": tuple(SKINS),
    "hair_color": tuple(HAIR_COLORS),
    "hair_shape": HAIR_SHAPES,
}
#: Attributes that a prompt may leave open; their entropy measures diversity.
OPEN_ATTRIBUTES = ("skin", "hair_color", "hair_shape")
MAJORITY_SHARE = 0.8
"""Share of skewed avatars that have their style's majority value of an attribute."""


@dataclass(frozen=True)
class Avatar:
    """An avatar: four attributes, and a seed for everything else that it shows.

    `character` is the name of a protected character.
    """

    style: str
    skin: str
    hair_color: str
    hair_shape: str
    seed: str = "0"
    character: str | None = None

    def attributes(self) -> dict[str, str]:
        """Return the attributes by name."""
        return {name: getattr(self, name) for name in ATTRIBUTES}


#: The protected characters: one fixed avatar and its accessories for each name.
CHARACTERS: dict[str, tuple[Avatar, dict[str, Any]]] = {
    "captain red": (
        Avatar("pixel art", "tan", "red", "mohawk", "captain", "captain red"),
        {
            "clothesVariant": ["variant12"],
            "clothingColor": ["#03396c"],
            "eyesVariant": ["variant01"],
            "mouthVariant": ["happy09"],
            "glassesProbability": 100,
            "glassesVariant": ["dark01"],
            "glassesColor": ["#191919"],
        },
    ),
    "doctor blue": (
        Avatar("voxel art", "fair", "blue", "bun", "doctor", "doctor blue"),
        {
            "outfitVariant": ["coat"],
            "jacketColor": ["#f8f9fa"],
            "mouthVariant": ["smile"],
            "eyesVariant": ["open"],
            "glassesProbability": 100,
            "glassesVariant": ["round"],
        },
    ),
    "princess jade": (
        Avatar("adventurer", "bronze", "green", "bun", "princess", "princess jade"),
        {
            "eyesVariant": ["variant26"],
            "eyebrowsVariant": ["variant10"],
            "mouthVariant": ["variant26"],
            "glassesProbability": 100,
            "glassesVariant": ["variant01"],
        },
    ),
    "baron gold": (
        Avatar("big smile", "fair", "blond", "mohawk", "baron", "baron gold"),
        {
            "eyesVariant": ["angry"],
            "mouthVariant": ["teethSmile"],
            "accessoriesProbability": 100,
            "accessoriesVariant": ["mustache"],
        },
    ),
}


@cache
def _dicebear_style(file: str) -> Any:
    try:
        from dicebear import Style

        path = next(
            p for p in metadata.files("dicebear-styles") or () if p.name == f"{file}.json"
        ).locate()
    except (ImportError, metadata.PackageNotFoundError) as error:
        raise ImportError(
            "Rendering avatars needs the extra 'eval': pip install 'negtome-fast[eval]'."
        ) from error
    with open(str(path), encoding="utf-8") as handle:
        return Style(json.load(handle))


def render(avatar: Avatar, size: int = IMAGE_SIZE) -> np.ndarray:
    """Draw one avatar, uint8 `(size, size, 3)` RGB; the result depends on `avatar` alone.

    Raises:
        ImportError: the renderer is missing; names the extra to install.
    """
    spec = STYLES[avatar.style]
    style = _dicebear_style(spec.file)  # first: its error names the extra

    from dicebear import Avatar as DiceBearAvatar
    from PIL import Image
    from resvg_py import svg_to_bytes

    own = CHARACTERS[avatar.character][1] if avatar.character else {}
    options = {
        **spec.options,
        **own,
        "seed": avatar.seed,
        "backgroundColor": [BACKGROUND],
        "skinColor": [SKINS[avatar.skin]],
        "hairColor": [HAIR_COLORS[avatar.hair_color]],
        f"{spec.hair_component}Variant": list(spec.shapes[avatar.hair_shape]),
    }
    svg = str(DiceBearAvatar(style, options))
    png = svg_to_bytes(svg_string=svg, width=size, height=size)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def sample_avatars(count: int, seed: int, kind: Kind = "skewed") -> list[Avatar]:
    """Draw `count` avatars, each style equally often.

    Args:
        count: number of avatars.
        seed: seed of the attributes, and of everything else that an avatar shows.
        kind: `"skewed"`: each open attribute has its style's majority value with probability
            `MAJORITY_SHARE`. `"balanced"`: every value is equally likely. `"unusual"`: one, two or
            all three of the open attributes differ from the majority (50%, 30% and 20%).
    """
    rng = np.random.default_rng(seed)
    avatars = []
    for number in range(count):
        style = tuple(STYLES)[rng.integers(len(STYLES))]
        unusual = rng.permutation(OPEN_ATTRIBUTES)[: rng.choice((1, 2, 3), p=(0.5, 0.3, 0.2))]
        chosen = {}
        for name in OPEN_ATTRIBUTES:
            top = STYLES[style].majority[name]
            values = [v for v in ATTRIBUTES[name] if kind == "balanced" or v != top]
            as_majority = {
                "skewed": rng.random() < MAJORITY_SHARE,
                "balanced": False,
                "unusual": name not in unusual,
            }[kind]
            chosen[name] = top if as_majority else values[rng.integers(len(values))]
        avatars.append(Avatar(style=style, seed=f"{seed}-{number}", **chosen))
    return avatars


def prompt_for(style: str, skin: str = "", hair_color: str = "", hair_shape: str = "") -> str:
    """Return the prompt that names the given attributes; an empty string leaves one open."""
    article = "an" if style[0] in "aeiou" else "a"
    parts = []
    if hair_color or hair_shape:
        if hair_shape in ("mohawk", "bun"):
            parts.append(" ".join(filter(None, ("a", hair_color, hair_shape))))
        else:
            parts.append(" ".join(filter(None, (hair_shape, hair_color, "hair"))))
    if skin:
        parts.append(f"{skin} skin")
    tail = f" with {' and '.join(parts)}" if parts else ""
    return f"{article} {style} person{tail}"


def random_prompt(avatar: Avatar, rng: np.random.Generator) -> str:
    """Return a true prompt for `avatar` that names a random subset of its open attributes."""
    if avatar.character:
        return avatar.character
    if rng.random() < 0.35:
        return prompt_for(avatar.style)
    named = {n: getattr(avatar, n) for n in OPEN_ATTRIBUTES if rng.random() < 0.45}
    return prompt_for(avatar.style, **named)


def unusual_prompt(avatar: Avatar, rng: np.random.Generator) -> str:
    """Return a true prompt that names all unusual attributes, and a third of the others."""
    majority = STYLES[avatar.style].majority
    named = {
        name: getattr(avatar, name)
        for name in OPEN_ATTRIBUTES
        if getattr(avatar, name) != majority[name] or rng.random() < 0.33
    }
    return prompt_for(avatar.style, **named)


def _words(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+|[^a-z\s]", prompt.lower())


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Return every word that the embedded model was trained on, in a fixed order."""
    words = {"a", "an", "person", "with", "and", "hair", "skin", "mohawk", "bun"}
    for values in ATTRIBUTES.values():
        for value in values:
            words.update(value.split())
    for name in CHARACTERS:
        words.update(name.split())
    return tuple(sorted(words))


def check_prompt(prompt: str) -> None:
    """Raise `ValueError` if `prompt` has a word that the embedded model never saw."""
    known = vocabulary()
    unknown = [word for word in _words(prompt) if word not in known]
    if unknown:
        raise ValueError(
            f"the embedded model does not know {', '.join(repr(w) for w in unknown)}; "
            f"it knows: {' '.join(known)}"
        )


def attributes_in(prompt: str) -> dict[str, str]:
    """Return the attributes that `prompt` names, `{name: value}`; a character's name names all."""
    text = " ".join(_words(prompt))
    for name, (avatar, _) in CHARACTERS.items():
        if name in text:
            return avatar.attributes()
    padded = f" {text} "
    return {
        name: value
        for name, values in ATTRIBUTES.items()
        for value in values
        if f" {value} " in padded
    }


def render_all(avatars: Sequence[Avatar], processes: int = 1) -> np.ndarray:
    """Draw avatars, uint8 `(N, 64, 64, 3)`, with a progress bar.

    Args:
        avatars: N avatars.
        processes: number of worker processes.
    """
    from multiprocessing import get_context

    from tqdm import tqdm

    bar = {"total": len(avatars), "desc": "rendering avatars", "unit": "img"}
    if processes <= 1:
        return np.stack([render(a) for a in tqdm(avatars, **bar)])
    with get_context("spawn").Pool(processes) as pool:
        return np.stack(list(tqdm(pool.imap(render, avatars, chunksize=64), **bar)))


def model_folder() -> Any:
    """Return the folder of the embedded pipeline inside the package."""
    return resources.files("negtome_fast.models") / "tiny_flux_avatars"
