"""`negtome-fast web`: a page that draws with and without guidance, from the same seeds.

`Workshop` makes what a `Request` asks for and needs no web server; `build` puts a page of gradio
around it, and `serve` opens that to this machine, or to others where told so.
"""

from __future__ import annotations

import html
import io
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import generation
from ..config import NegToMeConfig
from ..models import GUIDANCE_SCALE, STEPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from ..generation import Settings

HOST, PORT = "127.0.0.1", 7860
MOST_IMAGES = 16
MOST_WORDS = 1000
"""Characters of a prompt."""
MOST_BYTES = 10 * 2**20
MOST_PIXELS = 16 * 10**6
"""Of an uploaded picture; what is larger is refused before its pixels are read."""
FORMATS = ("PNG", "JPEG", "WEBP")
WAITING = 16
"""Requests that may wait for their turn; others are told to come again."""

MODES = {
    "others": "all other images",
    "first": "the first image",
    "image": "a picture of yours",
}
"""What the images are pushed away from."""


@dataclass(frozen=True)
class Request:
    """What the page asks for.

    Attributes:
        prompt: of all images.
        count: images, 1 to `MOST_IMAGES`.
        seed: of the first image; the next ones count up.
        guidance_scale: of classifier-free guidance; 0 is the model's own.
        steps: of the scheduler; 0 is the model's own.
        mode: a name of `MODES`.
        picture: the reference, where the mode is "image".
        mask: white where the reference may be matched; None is everywhere.
        guidance: fields of `NegToMeConfig`.
    """

    prompt: str
    count: int = 4
    seed: int = 0
    guidance_scale: float = 0.0
    steps: int = 0
    mode: str = "others"
    picture: Image | None = None
    mask: Image | None = None
    guidance: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Made:
    """Images without and with guidance from the same seeds, and what the guidance did.

    Attributes:
        plain, guided: the images, or the middle frames of videos.
        summary: `GuidanceSummary.to_dict()`.
        warnings: of the library, such as that nothing was pushed.
    """

    plain: list[Image]
    guided: list[Image]
    summary: dict[str, Any]
    warnings: list[str]


class Workshop:
    """A loaded model that serves one request at a time: the hooks of two would meet in it.

    Args:
        settings: the model and its place; what a request decides is replaced.
        pipe: use this pipeline instead of loading `settings.model`.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `generation.load_pipeline`; or the pipeline
            does not generate from text.
    """

    def __init__(self, settings: Settings | None = None, pipe: Any = None) -> None:
        self.settings = generation.Settings() if settings is None else settings
        self.pipe = generation.load_pipeline(self.settings) if pipe is None else pipe
        generation.call_arguments(self.pipe, self.settings)
        self._turn = threading.Lock()

    @property
    def embedded(self) -> bool:
        """Whether it is the model of the package, whose words and settings are known."""
        return self.settings.model == generation.EMBEDDED

    def defaults(self, mode: str) -> NegToMeConfig:
        """What the page begins with for a mode: that of the application that it is for."""
        preset = "avoid" if mode == "image" else "diversity"
        return generation.configuration(self.pipe, replace(self.settings, preset=preset))

    def make(self, request: Request) -> Made:
        """Draws the images twice; the pipeline is afterwards as it was, also after an error.

        Raises:
            ValueError, TypeError: the request cannot be right; the text is for its author.
        """
        check(request)
        with self._turn, tempfile.TemporaryDirectory(prefix="negtome-fast-") as folder:
            settings = self._settings(request, Path(folder))
            with warnings.catch_warnings():
                warnings.showwarning = lambda *_, **__: None  # they are recorded, for the page
                made = generation.generate(
                    settings, Path(folder) / "run", pipe=self.pipe, progress=False
                )
        record = made.record
        return Made(made.plain[0], made.guided[0], record["summaries"][0], record["warnings"])

    def _settings(self, request: Request, folder: Path) -> Settings:
        references: tuple[generation.ReferenceFile, ...] = ()
        guidance = dict(request.guidance or {})
        if request.mode == "image":
            assert request.picture is not None
            paths: list[str | None] = []
            for name, picture in (("reference", request.picture), ("mask", request.mask)):
                path = folder / f"{name}.png"
                if picture is not None:
                    picture.save(path)
                paths.append(None if picture is None else str(path))
            references = (generation.ReferenceFile(str(paths[0]), paths[1]),)
        else:
            guidance["reference"] = request.mode
        return replace(
            self.settings,
            prompts=(request.prompt,),
            images=request.count,
            seed=request.seed,
            guidance_scale=request.guidance_scale or None,
            steps=request.steps or None,
            references=references,
            guidance=guidance,
            compare=True,
        )


def check(request: Request) -> None:
    """Refuses a request in the words of the page.

    Raises:
        ValueError: what is wrong and what to do.
    """
    if len(request.prompt) > MOST_WORDS:
        raise ValueError(f"the prompt has {len(request.prompt)} characters; {MOST_WORDS} will do")
    if not 1 <= request.count <= MOST_IMAGES:
        raise ValueError(f"the number of images must be 1 to {MOST_IMAGES}, got {request.count}")
    if request.mode not in MODES:
        raise ValueError(f"no mode {request.mode!r}; there are {', '.join(MODES)}")
    if request.mode == "image" and request.picture is None:
        raise ValueError("choose a reference image, or push away from the images of the batch")
    if request.mode != "image" and request.count < 2:
        raise ValueError(
            "a single image has no other to differ from: ask for 2 or more, or give a reference"
        )


def check_picture(source: Path | bytes) -> None:
    """Refuses an upload that is too large or no picture, before its pixels are read.

    Raises:
        ValueError: which of the two, and what is allowed.
    """
    from PIL import Image

    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"the file has {size / 2**20:.1f} MiB; {MOST_BYTES // 2**20} are allowed")
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # counted below
            with Image.open(stream, formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        most = MOST_PIXELS // 10**6
        raise ValueError(f"the picture has more than {most} million pixels") from None
    except (OSError, SyntaxError, ValueError):
        raise ValueError(f"the file is no picture that can be read: {', '.join(FORMATS)}") from None
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"the picture has {width} x {height} pixels; {MOST_PIXELS // 10**6} million are allowed"
        )


def drawn_mask(layers: list[Image]) -> Image | None:
    """White where any layer was painted on; None where nothing was painted."""
    from PIL import Image, ImageChops

    mask = None
    for layer in layers:
        painted = layer.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 127))
        mask = painted if mask is None else ImageChops.lighter(mask, painted.resize(mask.size))
    return mask if isinstance(mask, Image.Image) and mask.getbbox() else None


def told(summary: Mapping[str, Any]) -> str:
    """What the guidance did, in a sentence."""
    total = summary["total"]
    return (
        f"Guided {summary['guided']} of {summary['forwards']} forwards of the model: "
        f"{total['matched']:.1%} of the tokens matched, {total['pushed']:.1%} were pushed, "
        f"mean similarity {total['similarity']:.3f}."
    )


def plot(summary: Mapping[str, Any]) -> Figure:
    """Shares matched and pushed and the mean similarity of each guided block."""
    from matplotlib.figure import Figure  # without pyplot, whose figures all threads share

    rows = summary["rows"]
    figure = Figure(figsize=(9, 0.9 + 0.34 * max(len(rows), 2)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    bars = (("matched", "#9dc0f5", 0.8), ("pushed", "#0b57d0", 0.45))
    for name, colour, height in bars:
        values = [row[name] for row in rows]
        axes.barh(places, values, height, color=colour, label=f"share {name}")
    similarities = [row["similarity"] for row in rows]
    style: dict[str, Any] = {"color": "#d93025", "label": "mean similarity", "clip_on": False}
    axes.plot(similarities, places, "o", **style)
    axes.set_yticks(places, [row["block"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(min([0.0, *similarities]), 1)
    axes.set_title("What the guidance did in each block", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def build(workshop: Workshop) -> Any:
    """The page as `gradio.Blocks`, with one queue of which one request is served at a time.

    Raises:
        ImportError: gradio or matplotlib is missing; names the extra to install.
    """
    gr = _gradio()
    _no_reports()
    first = workshop.defaults("others")
    embedded = workshop.embedded

    def draw(
        prompt: str,
        mode: str,
        drawn: dict[str, Any] | None,
        count: float,
        seed: float | None,
        guidance_scale: float,
        steps: float,
        alpha: float,
        threshold: float,
        t_start: float,
        t_end: float,
        matching: str,
    ) -> tuple[Any, ...]:
        guidance = {
            "alpha": alpha,
            "threshold": threshold,
            "t_start": t_start,
            "t_end": t_end,
            "matching": matching,
        }
        drawn = drawn or {}
        try:
            if seed is None:
                raise ValueError("the field of the first seed is empty: give a whole number")
            request = Request(
                prompt=prompt,
                count=int(count),
                seed=int(seed),
                guidance_scale=guidance_scale,
                steps=int(steps),
                mode=mode,
                picture=drawn.get("background"),
                mask=drawn_mask(drawn.get("layers") or []),
                guidance=guidance,
            )
            made = workshop.make(request)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            raise _shown(gr, error) from error
        words = "\n\n".join([told(made.summary), *(f"Note: {w}" for w in made.warnings)])
        return made.plain, made.guided, words, plot(made.summary)

    def change_mode(mode: str) -> list[Any]:
        config = workshop.defaults(mode)
        values = (config.alpha, config.threshold, config.t_start, config.t_end)
        return [gr.update(visible=mode == "image"), *(gr.update(value=v) for v in values)]

    with gr.Blocks(title="negtome-fast", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            "# negtome-fast\nImages without and with NegToMe, from the same seeds. Tokens that "
            "resemble a reference are pushed away from it while the image is made."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(
                    label="Prompt",
                    value="a pixel art person" if embedded else "",
                    info=_prompt_help(embedded),
                    max_length=MOST_WORDS,
                    elem_id="prompt",
                )
                mode = gr.Radio(
                    [(words, name) for name, words in MODES.items()],
                    value="others",
                    label="Push away from",
                    info="changing it sets strength, threshold and window to its defaults",
                    elem_id="mode",
                )
                with gr.Column(visible=False) as reference:
                    picture = gr.ImageEditor(
                        label="Reference image",
                        type="pil",
                        sources=("upload", "clipboard"),
                        transforms=(),
                        layers=gr.LayerOptions(allow_additional_layers=False, disabled=True),
                        brush=gr.Brush(colors=["#d93025"], color_mode="fixed", default_size=40),
                        height=420,
                        elem_id="reference",
                    )
                    gr.Markdown(
                        "Paint over what may be matched; nothing painted: all of it. "
                        f"{', '.join(FORMATS)}, at most {MOST_BYTES // 2**20} MiB and "
                        f"{MOST_PIXELS // 10**6} million pixels."
                    )
                with gr.Row():
                    count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images", elem_id="count")
                    seed = gr.Number(
                        0, label="First seed", precision=0, minimum=0, maximum=2**31, elem_id="seed"
                    )
                alpha = gr.Slider(
                    -2,
                    6,
                    first.alpha,
                    step=0.05,
                    label="Strength (alpha)",
                    info="above 0 pushes away, below 0 pulls toward, 0 only measures",
                    elem_id="alpha",
                )
                threshold = gr.Slider(
                    -1,
                    1,
                    first.threshold,
                    step=0.01,
                    label="Threshold",
                    info="cosine similarity that a match must exceed",
                    elem_id="threshold",
                )
                with gr.Row():
                    t_start = gr.Slider(
                        0, 1000, first.t_start, step=5, label="Window: from", info="1000: noise"
                    )
                    t_end = gr.Slider(
                        0, 1000, first.t_end, step=5, label="Window: to", info="0: image"
                    )
                with gr.Accordion("More settings", open=False):
                    matching = gr.Radio(
                        [("paper", "paper"), ("authors' code", "official")],
                        value="paper",
                        label="Matching",
                        info="which token is compared with which; the authors' code has the roles "
                        "of image and reference swapped",
                        elem_id="matching",
                    )
                    guidance_scale = gr.Slider(
                        0,
                        20,
                        GUIDANCE_SCALE if embedded else 0,
                        step=0.1,
                        label="Scale of classifier-free guidance",
                        info="how closely the prompt is followed; 0: the model's own",
                    )
                    steps = gr.Slider(
                        0,
                        100,
                        STEPS if embedded else 0,
                        step=1,
                        label="Steps",
                        elem_id="steps",
                        info="of the scheduler; 0: the model's own",
                    )
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    galleries = []
                    for name, label in (
                        ("plain", "Without guidance"),
                        ("guided", "With NegToMe, same seeds"),
                    ):
                        with gr.Column(min_width=240):
                            gr.Markdown(f"### {label}")
                            gallery = gr.Gallery(
                                label=label,
                                show_label=False,
                                columns=2,
                                format="png",
                                object_fit="contain",
                                height="auto",
                                interactive=False,
                                buttons=["download", "fullscreen"],
                                elem_id=name,
                            )
                        galleries.append(gallery)
                words = gr.Markdown(elem_id="told")
                figure = gr.Plot(show_label=False, format="png", elem_id="blocks")
        picture.preprocess = _checked(gr, picture)
        settings = [prompt, mode, picture, count, seed, guidance_scale, steps]
        settings += [alpha, threshold, t_start, t_end, matching]
        gr.on(
            [button.click, prompt.submit],
            draw,
            settings,
            [*galleries, words, figure],
            concurrency_limit=1,
            api_name="generate",
        )
        mode.change(
            change_mode,
            mode,
            [reference, alpha, threshold, t_start, t_end],
            queue=False,
            api_visibility="private",
        )
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def serve(
    settings: Settings | None = None,
    host: str = HOST,
    port: int = PORT,
    *,
    pipe: Any = None,
    wait: bool = True,
) -> tuple[Any, str]:
    """Opens the page; returns it and its address, at once or when it was interrupted.

    Args:
        settings: the model and its place; the embedded model if None.
        host: the address of this machine that it listens at; `HOST` is reached from here alone.
        port: 0 takes a free one.
        pipe: as for `Workshop`.
        wait: block until the process is interrupted.

    Raises:
        ImportError: names the extra to install.
        OSError: the port is taken.
        ValueError, FileNotFoundError: as `Workshop`.
    """
    gr = _gradio()
    page = build(Workshop(settings, pipe))
    fonts = ["system-ui", "sans-serif"]  # those of the machine: gradio's own come from a network
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MOST_BYTES,
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
            css=_CSS,
        )
    except OSError as error:
        raise OSError(
            f"the page cannot be opened at {host}, port {port}, which is taken or not to be had: "
            "choose another --port, 0 for a free one"
        ) from error
    if wait:
        print(f"negtome-fast web: {address} (Ctrl-C ends it)", flush=True)
        if host not in (HOST, "localhost", "::1"):
            print("open, without a password, to all who reach this machine", flush=True)
        page.block_thread()
    return page, address


_CSS = """
.gradio-container { max-width: 1400px !important; }
#plain img, #guided img { image-rendering: pixelated; }
"""
"""Small images are enlarged without smoothing, as on the sheets."""


def _gradio() -> Any:
    try:
        import gradio
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the page needs the extra 'web' ({error.name} is missing): "
            "pip install 'negtome-fast[web]'"
        ) from error
    return gradio


def _no_reports() -> None:
    """No counts of use to gradio and the Hub, whose clients look at the environment."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def _prompt_help(embedded: bool) -> str:
    if not embedded:
        return "what the images show"
    from ..models.avatars import vocabulary

    return f"the embedded model knows these words: {' '.join(vocabulary())}"


def _shown(gr: Any, error: Exception) -> Any:
    """The error for the page, which takes its text for HTML."""
    return gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False)


def _checked(gr: Any, editor: Any) -> Callable[[Any], Any]:
    """The editor's reading of what was sent, after a look at it.

    On the object: gradio writes a file of stubs beside the source of each derived component.
    """
    read = editor.preprocess

    def preprocess(payload: Any) -> Any:
        if payload is not None:
            sent = editor.blob_storage.get(payload.id) if payload.id is not None else payload
            parts = [sent.background, *(sent.layers or []), sent.composite] if sent else []
            try:
                for part in parts:
                    if part is not None:
                        check_picture(part if isinstance(part, bytes) else Path(part.path))
            except ValueError as error:
                raise _shown(gr, error) from None
        return read(payload)

    return preprocess
