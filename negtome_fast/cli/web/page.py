"""The page as `gradio.Blocks`, and the server that opens it to this machine or to others."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...models import GUIDANCE_SCALE, STEPS
from ...models.avatars import vocabulary
from .gate import Gate, HostNames, is_loopback
from .outcome import plot, told
from .session import (
    MODES,
    MOST_IMAGES,
    MOST_SCALE,
    MOST_SEED,
    MOST_STEPS,
    MOST_WORDS,
    DrawRequest,
    WebSession,
)
from .upload_folder import UploadFolder
from .uploads import (
    FORMATS,
    MOST_BYTES,
    MOST_PIXELS,
    checked_reading,
    checked_receiving,
    drawn_mask,
    local_only,
    shown_error,
)

if TYPE_CHECKING:
    from ...generation import Settings

HOST, PORT = "127.0.0.1", 7860
WAITING = 16
"""Number of requests that may wait in the queue; further ones are refused."""

CSS = """
.gradio-container { max-width: 1400px !important; }
#plain img, #guided img { image-rendering: pixelated; }
"""
"""Style that enlarges small images without smoothing, as on the sheets."""


def serve(
    settings: Settings | None = None,
    host: str = HOST,
    port: int = PORT,
    *,
    allow_hosts: Sequence[str] = (),
    pipe: Any = None,
    wait: bool = True,
) -> tuple[Any, str]:
    """Open the page; returns the page and its address.

    Args:
        settings: the model and its device; the embedded model if None.
        host: address of this machine that the page listens at; `HOST` is reached from here alone.
        port: 0 takes a free one.
        allow_hosts: names under which the page may be asked for, beside those of `HostNames`.
        pipe: as in `WebSession`.
        wait: return only when the process is interrupted.

    Raises:
        ImportError: a package is missing; names the extra to install.
        OSError: the port is taken, or `host` is no address of this machine.
        ValueError, FileNotFoundError: as in `WebSession`; or no such port or name.
    """
    # What is wrong with the address shows before a model is loaded, which can take minutes.
    names = HostNames(host, allow_hosts)
    gr = load_gradio()
    port = _free_port(host, port)
    session = WebSession(settings, pipe)
    folder = UploadFolder()
    try:
        with folder.for_gradio():
            page = build(session)
            address = _launch(gr, page, host, port, Doorkeeper(names, folder))
    except BaseException:
        folder.remove()
        raise
    if wait:
        print(f"negtome-fast web: {address} (Ctrl-C ends it)", flush=True)
        if not is_loopback(host):
            print("open, without a password, to all who reach this machine", flush=True)
        page.block_thread()
    return page, address


@dataclass(frozen=True)
class Doorkeeper:
    """Puts the gate before gradio's application when it starts, and clears up when it stops."""

    names: HostNames
    folder: UploadFolder

    @asynccontextmanager
    async def __call__(self, app: Any) -> AsyncIterator[None]:
        app.middleware_stack = Gate(app.middleware_stack, self.names, self.folder)
        try:
            yield
        finally:
            self.folder.remove()


def _launch(gr: Any, page: Any, host: str, port: int, doorkeeper: Doorkeeper) -> str:
    """Start gradio's server; returns the address of the page."""
    fonts = ["system-ui", "sans-serif"]  # the machine's: gradio loads its own from a network
    try:
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
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
            css=CSS,
            app_kwargs={"lifespan": doorkeeper},
        )
    except OSError as error:
        raise _unavailable(host, port) from error
    return str(address)


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        ValueError: it is no port.
        OSError: it is taken, or `host` is no address of this machine.
    """
    if not host.isascii() or not host:
        raise ValueError(f"`host` {host!r} is no address of this machine")
    if not 0 <= port < 2**16:
        raise ValueError(f"`port` must be 1 to 65535, or 0 for a free one, got {port}")
    try:
        kind, *_, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
            return int(tried.getsockname()[1])
    except (OSError, UnicodeError) as error:
        raise _unavailable(host, port) from error


def _unavailable(host: str, port: int) -> OSError:
    return OSError(
        f"the page cannot be opened at {host}, port {port}, which is taken or unavailable: choose "
        "another `port`, 0 for a free one, or an address of this machine as `host`"
    )


def build(session: WebSession) -> Any:
    """Return the page as `gradio.Blocks`, with one queue that serves one request at a time.

    Raises:
        ImportError: gradio or matplotlib is missing; names the extra to install.
    """
    gr = load_gradio()
    _switch_reports_off()
    with gr.Blocks(title="negtome-fast", analytics_enabled=False, delete_cache=(60, 3600)) as page:
        gr.Markdown(
            "# negtome-fast\nImages without and with NegToMe, from the same seeds. Tokens that "
            "resemble a reference are pushed away from it while the image is made."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                controls = _add_controls(gr, session)
            with gr.Column(scale=3, min_width=320):
                outputs = _add_outputs(gr)
        gr.on(
            [controls.button.click, controls.prompt.submit],
            _drawing(gr, session),
            controls.values(),
            outputs,
            concurrency_limit=1,
            api_name="generate",
        )
        controls.mode.change(
            _mode_change(gr, session),
            controls.mode,
            [controls.reference, *controls.strength],
            queue=False,
            api_visibility="private",
        )
        page.unload(lambda: None)  # with it, an open page keeps a request open, which `Gate` counts
    # Not open: a request that does not queue would be drawn beside others, and wait without limit.
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def load_gradio() -> Any:
    """Import gradio.

    Raises:
        ImportError: gradio or matplotlib is missing; names the extra to install.
    """
    try:
        import gradio
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the page needs the extra 'web' ({error.name} is missing): "
            "pip install 'negtome-fast[web]'"
        ) from error
    return gradio


def _switch_reports_off() -> None:
    """Send no usage counts to gradio and the Hub, whose clients read the environment."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@dataclass(frozen=True)
class Controls:
    """Components of the page that a user sets.

    Attributes:
        reference: the column that holds `picture`; shown for the mode "image" only.
        strength: alpha, threshold, and start and end of the window.
    """

    prompt: Any
    mode: Any
    reference: Any
    picture: Any
    count: Any
    seed: Any
    strength: tuple[Any, Any, Any, Any]
    matching: Any
    guidance_scale: Any
    steps: Any
    button: Any

    def values(self) -> list[Any]:
        """Components in the order of the arguments of a request."""
        first = [self.prompt, self.mode, self.picture, self.count, self.seed]
        return [*first, self.guidance_scale, self.steps, *self.strength, self.matching]


def _add_controls(gr: Any, session: WebSession) -> Controls:
    prompt = gr.Textbox(
        label="Prompt",
        value="a pixel art person" if session.embedded else "",
        info=_prompt_help(session.embedded),
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
        picture = _add_editor(gr)
    with gr.Row():
        count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images", elem_id="count")
        seed = gr.Number(
            0, label="First seed", precision=0, minimum=0, maximum=MOST_SEED, elem_id="seed"
        )
    strength = _add_strength(gr, session)
    with gr.Accordion("More settings", open=False):
        matching, guidance_scale, steps = _add_more(gr, session.embedded)
    button = gr.Button("Generate", variant="primary", elem_id="generate")
    return Controls(
        prompt,
        mode,
        reference,
        picture,
        count,
        seed,
        strength,
        matching,
        guidance_scale,
        steps,
        button,
    )


def _prompt_help(embedded: bool) -> str:
    if not embedded:
        return "what the images show"
    return f"the embedded model knows these words: {' '.join(vocabulary())}"


def _add_editor(gr: Any) -> Any:
    """Editor of the reference image, whose layers become its mask."""
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
    picture.preprocess = checked_reading(gr, picture)
    picture.accept_blobs = checked_receiving(picture)
    picture.async_move_resource_to_block_cache = local_only
    return picture


def _add_strength(gr: Any, session: WebSession) -> tuple[Any, Any, Any, Any]:
    """Sliders of alpha, threshold, and start and end of the window."""
    first = session.defaults("others")
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
        t_end = gr.Slider(0, 1000, first.t_end, step=5, label="Window: to", info="0: image")
    return alpha, threshold, t_start, t_end


def _add_more(gr: Any, embedded: bool) -> tuple[Any, Any, Any]:
    """Matching, scale of classifier-free guidance, and steps."""
    matching = gr.Radio(
        [("paper", "paper"), ("authors' code", "official")],
        value="paper",
        label="Matching",
        info="which token is compared with which; the authors' code has the roles of image and "
        "reference swapped",
        elem_id="matching",
    )
    guidance_scale = gr.Slider(
        0,
        MOST_SCALE,
        GUIDANCE_SCALE if embedded else 0,
        step=0.1,
        label="Scale of classifier-free guidance",
        info="how closely the prompt is followed; 0: the model's default",
    )
    steps = gr.Slider(
        0,
        MOST_STEPS,
        STEPS if embedded else 0,
        step=1,
        label="Steps",
        elem_id="steps",
        info="steps of the scheduler; 0: the model's default",
    )
    return matching, guidance_scale, steps


def _add_outputs(gr: Any) -> list[Any]:
    """Galleries without and with guidance, the sentence, and the plot."""
    galleries = []
    with gr.Row():
        for name, label in (("plain", "Without guidance"), ("guided", "With NegToMe, same seeds")):
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
    return [*galleries, words, figure]


def _drawing(gr: Any, session: WebSession) -> Callable[..., tuple[Any, ...]]:
    """Handler of the button; its arguments are those of the program interface."""

    def draw(
        prompt: str,
        mode: str,
        drawn: dict[str, Any] | None,
        count: Any,
        seed: Any,
        guidance_scale: Any,
        steps: Any,
        alpha: float,
        threshold: float,
        t_start: float,
        t_end: float,
        matching: str,
    ) -> tuple[Any, ...]:
        window = {"t_start": t_start, "t_end": t_end}
        drawn = drawn or {}
        try:
            if seed is None:
                raise ValueError("the field of the first seed is empty: give a whole number")
            request = DrawRequest(
                prompt=prompt,
                count=count,
                seed=seed,
                guidance_scale=guidance_scale,
                steps=steps,
                mode=mode,
                picture=drawn.get("background"),
                mask=drawn_mask(drawn.get("layers") or []),
                guidance={"alpha": alpha, "threshold": threshold, **window, "matching": matching},
            )
            made = session.make(request)
        except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
            raise shown_error(gr, error) from error
        words = "\n\n".join(
            [told(made.summary, made.alpha), *(f"Note: {w}" for w in made.warnings)]
        )
        return made.plain, made.guided, words, plot(made.summary)

    return draw


def _mode_change(gr: Any, session: WebSession) -> Callable[[str], list[Any]]:
    """Handler that shows the editor for the mode "image" and sets the mode's defaults."""

    def change(mode: str) -> list[Any]:
        config = session.defaults(mode)
        values = (config.alpha, config.threshold, config.t_start, config.t_end)
        return [gr.update(visible=mode == "image"), *(gr.update(value=v) for v in values)]

    return change
