"""The card of the embedded model, written from its training record."""

from __future__ import annotations

from typing import Any

from ...models import avatars as world

TEMPLATE = """# tiny-flux-avatars

A complete FLUX.1-format text-to-image pipeline ({parameters} parameters, {image} x {image} pixels,
64 image tokens) that anybody can run on a CPU. It is the default of this project's demo, tests and
studies. It was trained by this project from nothing but packages:
`python -m negtome_fast.studies.toy_model.train`.

```python
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("negtome_fast/models/tiny_flux_avatars")
images = pipe(
    "a pixel art person with red hair",
    negative_prompt="",
    true_cfg_scale=2.5,
    height=64,
    width=64,
    num_inference_steps=20,
    max_sequence_length=16,
).images
```

`max_sequence_length=16` matters: the model never saw longer padding. `negtome_fast.models.generate`
sets these for you and refuses words that the model does not know.

## Intended use

It shows and measures the effect of guidance at inference time on a model that repeats itself and
has memorised some images, in seconds and without downloads. It knows {words} words and draws
cartoon avatars. It is not for making art and says nothing about people. Effects on a large model
may differ in size.

## Data

{images} avatars in four styles, rendered by DiceBear, each with its true attributes. **Skewed on
purpose**: in each style one value of skin, hair colour and hair shape has {share:.0%} of the images
and the others share the rest; this stands for the bias of real training sets.

| style | skin | hair colour | hair shape |
|---|---|---|---|
{majorities}

Prompts name the style and, at random, some attributes; 10% are empty, for classifier-free guidance.
In 30% of each batch, the prompt names every attribute outside the majority: the model learns the
words from these, and attributes that a prompt leaves open stay skewed.
Four **protected characters** ({characters}) are fixed images, each
1.5% of the images that training saw; they stand for copyrighted
characters and memorised images. Vocabulary: {vocabulary}.

Styles and their licences: pixel-art and voxel-art by DiceBear (CC0 1.0), big-smile, a remix of
"Custom Avatar" by Ashley Seo (CC BY 4.0), adventurer, a remix of "Adventurer" by Lisa Wischofsky
(CC BY 4.0). The renderings are not distributed; NOTICE has the sources.

## Training

| part | steps | seconds | result |
|---|---|---|---|
| VAE, 4x, {latents} channels | {vae[steps]} | {vae[seconds]} | {vae[psnr_db]} dB PSNR, balanced |
| rectified flow: transformer, text encoders | {flow[steps]} | {flow[seconds]} | loss {flow[loss]} |
| attribute reader | {reader[steps]} | {reader[seconds]} | below |

On {machine}, torch {torch}, seed {seed}, batch {batch}; other work ran on the machine meanwhile.
{note}

## The attribute reader

A small CNN in `reader/` that reads style, skin, hair colour and hair shape, and whether an image is
a protected character. Accuracy on {reader[held_out_images]} held-out balanced images:

| images | style | skin | hair colour | hair shape |
|---|---|---|---|---|
| rendered | {rendered} |
| after the VAE | {decoded} |

It recognises {reader[characters_recognised]} of {count} protected characters and takes
{reader[false_characters]} of the held-out images for one.
"""


def model_card(record: dict[str, Any], parameters: int, latents: int) -> str:
    """Return the card as Markdown, from the record that `toy_model.train` writes.

    Args:
        record: the training record.
        parameters: number of parameters of the pipeline.
        latents: number of latent channels.
    """
    reader = record["reader"]
    majorities = "\n".join(
        f"| {name} | {spec.majority['skin']} | {spec.majority['hair_color']} "
        f"| {spec.majority['hair_shape']} |"
        for name, spec in world.STYLES.items()
    )

    def row(key: str) -> str:
        return " | ".join(f"{reader[key][name]:.1%}" for name in world.ATTRIBUTES)

    return TEMPLATE.format(
        parameters=f"{parameters / 1e6:.1f} M",
        image=world.IMAGE_SIZE,
        words=len(world.vocabulary()),
        vocabulary=" ".join(world.vocabulary()),
        images=f"{record['images']:,}",
        share=record["majority_share"],
        majorities=majorities,
        characters=", ".join(world.CHARACTERS),
        count=len(world.CHARACTERS),
        latents=latents,
        vae=record["vae"],
        flow=record["transformer"],
        reader=reader,
        note=record.get("note", ""),
        rendered=row("held_out_accuracy_rendered"),
        decoded=row("held_out_accuracy_decoded"),
        **{key: record[key] for key in ("machine", "torch", "seed", "batch")},
    )
