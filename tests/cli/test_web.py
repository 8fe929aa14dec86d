"""`negtome-fast web`: drawn images, refused requests, and the page in a browser.

Tests of the page itself need gradio, which is not in the extra `all`, because it forbids the Pillow
that tests run on. The test in the browser also needs Chromium.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from negtome_fast import cli, generation, models
from negtome_fast.cli.web import outcome, page, uploads
from negtome_fast.cli.web.session import DrawRequest, WebSession
from negtome_fast.cli.web.uploads import check_picture, drawn_mask
from negtome_fast.pipelines.hooks import find_hooks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="the extra 'web' is not installed"
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="Chromium and PyPI's playwright, which drives it, are not both installed",
)
PROMPT = "a pixel art person"
# Sentence about the guidance, without the words that gradio puts beside it while it waits.
SENTENCE = """() => (document.querySelector('#told').innerText
    .match(/Guided .*similarity [0-9.]*[0-9]/) || [''])[0]"""
QUICK = {"prompt": PROMPT, "count": 2, "steps": 2}


@pytest.fixture(scope="module")
def session() -> WebSession:
    return WebSession()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A face as the model draws them: a disk on the background of its pictures."""
    image = Image.new("RGB", (120, 90), "#eef1f5")
    ImageDraw.Draw(image).ellipse((30, 15, 90, 75), fill="#f7d9b8")
    return image


def pixels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in images])


def test_images_are_those_of_the_model_without_and_with_guidance(session: WebSession) -> None:
    made = session.make(DrawRequest(**QUICK, seed=3, guidance={"alpha": 0.9, "t_end": 0}))
    alone = models.generate(session.pipe, PROMPT, [3, 4], steps=2, output_type="pil")
    assert np.array_equal(pixels(made.plain), pixels(alone))
    assert not np.array_equal(pixels(made.guided), pixels(alone))
    assert made.summary["guided"] == 4  # of each half of guidance, in both steps
    assert made.summary["total"]["pushed"] > 0
    assert f"{made.summary['total']['pushed']:.1%} were pushed" in outcome.told(made.summary)
    assert find_hooks(session.pipe.transformer) is None


def test_first_image_of_the_batch_stays(session: WebSession) -> None:
    made = session.make(DrawRequest(**QUICK, mode="first", guidance={"t_end": 0, "threshold": 0.2}))
    same = [np.array_equal(a, b) for a, b in zip(made.plain, made.guided, strict=True)]
    assert same == [True, False]


def test_a_painted_region_is_matched_and_no_other(
    session: WebSession, picture: Image.Image
) -> None:
    layer = Image.new("RGBA", picture.size)
    layer.paste("#d93025ff", (0, 0, 40, 90))
    pushed = {}
    for name, mask in (("all", None), ("left", drawn_mask([layer]))):
        wanted = DrawRequest(
            PROMPT,
            count=1,
            steps=2,
            mode="image",
            picture=picture,
            mask=mask,
            guidance={"threshold": 0.2, "t_end": 0},
        )
        pushed[name] = session.make(wanted).summary["total"]["similarity"]
    assert pushed["left"] < pushed["all"]


def test_requests_at_the_same_time_do_not_meet_in_the_model(session: WebSession) -> None:
    wishes = [DrawRequest(**QUICK, guidance={"alpha": alpha, "t_end": 0}) for alpha in (0.5, 2.0)]
    alone = [pixels(session.make(wish).guided) for wish in wishes]
    together: dict[int, Any] = {}

    def work(number: int) -> None:
        together[number] = pixels(session.make(wishes[number]).guided)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(alone[number], together[number]) for number in range(2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "a purple zebra"}, "does not know 'purple', 'zebra'"),
        ({"prompt": "a " * 600}, "1200 characters"),
        ({"count": 1}, "no other to differ from"),
        ({"count": 1000}, "must be 1 to 16"),
        ({"count": 10**9}, "must be 1 to 16"),
        ({"count": float("nan")}, "must be 1 to 16, got nan"),
        ({"count": 2.5}, "must be a whole number, got 2.5"),
        ({"count": None}, "number of images must be 1 to 16, got None"),
        ({"steps": 10**6}, "steps must be 0 to 100"),
        ({"steps": -1}, "steps must be 0 to 100"),
        ({"steps": float("inf")}, "steps must be 0 to 100"),
        ({"seed": -1}, "first seed must be 0 to"),
        ({"seed": 10**30}, "first seed must be 0 to"),
        ({"guidance_scale": float("nan")}, "guidance must be 0 to 20, got nan"),
        ({"guidance_scale": 1e9}, "guidance must be 0 to 20"),
        ({"prompt": None}, "prompt is empty"),
        ({"mode": ["first"]}, "no mode"),
        ({"guidance": {"alpha": None}}, "alpha must be a number"),
        ({"guidance": {"threshold": 2.0}}, "threshold"),
        ({"mode": "last"}, "no mode 'last'"),
        ({"mode": "image"}, "choose a reference image"),
        ({"guidance": {"t_start": 100, "t_end": 900}}, "t_start"),
        ({"guidance": {"alpha": float("nan")}}, "alpha"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_right_is_refused(
    session: WebSession, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        session.make(DrawRequest(**{**QUICK, **changes}))
    assert find_hooks(session.pipe.transformer) is None


def test_warnings_of_the_library_are_handed_on(session: WebSession) -> None:
    made = session.make(DrawRequest(**QUICK, guidance={"blocks": ["attn"], "min_grid": (99, 99)}))
    assert any("no block was guided" in words for words in made.warnings)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_uploads_are_looked_at_before_they_are_read(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in uploads.FORMATS:
        check_picture(encoded(picture, kind))
    with pytest.raises(ValueError, match="not a readable picture: PNG, JPEG, WEBP"):
        check_picture(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(ValueError, match="not a readable picture"):
        check_picture(encoded(picture, "TIFF"))
    # A few kilobytes that would fill gigabytes: black, of one bit a pixel.
    for side in (5000, 20000):
        bomb = tmp_path / f"bomb-{side}.png"
        bomb.write_bytes(encoded(Image.new("1", (side, side))))
        assert bomb.stat().st_size < uploads.MOST_BYTES
        with pytest.raises(ValueError, match="16 million"):
            check_picture(bomb)
    monkeypatch.setattr(uploads, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="MiB"):
        check_picture(encoded(picture))


def test_mask_is_what_was_painted_on_the_one_layer() -> None:
    layer = Image.new("RGBA", (8, 4))
    assert drawn_mask([layer]) is None
    assert drawn_mask([]) is None
    layer.putpixel((1, 2), (255, 0, 0, 255))
    layer.putpixel((6, 0), (255, 0, 0, 40))  # the soft rim of the brush
    mask = drawn_mask([layer])
    assert mask is not None
    assert np.argwhere(np.asarray(mask) > 0).tolist() == [[2, 1]]
    with pytest.raises(ValueError, match="2 layers of paint; 1 is allowed"):
        drawn_mask([layer, layer])


@pytest.mark.parametrize(
    ("alpha", "window", "words"),
    [
        (0.9, {"t_start": 5, "t_end": 0}, "Not guided: none of the 4 forwards"),
        (0.0, {"t_end": 0}, "Measured only, in 4 of 4 forwards"),
        (0.0, {"t_start": 5, "t_end": 0}, "Not guided: none of the 4 forwards"),
    ],
)
def test_the_sentence_says_if_nothing_was_guided(
    session: WebSession, alpha: float, window: dict[str, float], words: str
) -> None:
    made = session.make(DrawRequest(**QUICK, guidance={"alpha": alpha, **window}))
    told = outcome.told(made.summary, made.alpha)
    assert told.startswith(words)
    assert ("none was pushed" in told) == (words[0] == "M")
    assert np.array_equal(pixels(made.plain), pixels(made.guided))
    assert outcome.plot(made.summary).axes


def test_every_guided_block_is_in_the_plot(session: WebSession) -> None:
    made = session.make(DrawRequest(**QUICK, guidance={"t_end": 0}))
    axes = outcome.plot(made.summary).axes[0]
    rows = made.summary["rows"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [r["block"] for r in rows]
    lengths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert lengths == [[row[name] for row in rows] for name in ("matched", "pushed")]


def test_a_mode_begins_with_the_settings_of_its_application(session: WebSession) -> None:
    for mode, application in (("others", "diversity"), ("image", "avoid")):
        config = session.defaults(mode).to_dict()
        tuned = generation.APPLICATIONS[application].embedded
        assert {name: config[name] for name in tuned} == tuned


def test_without_gradio_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["web"]) == 2
    assert "pip install 'negtome-fast[web]'" in capsys.readouterr().err


def test_options_of_the_command_reach_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(page, "serve", lambda *args, **kwargs: seen.append((args, kwargs)))
    assert cli.main(["web"]) == 0
    options = ["--model", "owner/name", "--dtype", "bfloat16", "--host", "0.0.0.0", "--port", "0"]
    options += ["--allow-host", "a.example", "--allow-host", "b.example"]
    assert cli.main(["web", *options]) == 0
    settings = generation.Settings(model="owner/name", dtype="bfloat16")
    place = {"host": "0.0.0.0", "port": 0, "allow_hosts": ["a.example", "b.example"]}
    assert seen == [((generation.Settings(),), {}), ((settings,), place)]


@pytest.fixture(scope="module")
def address(session: WebSession) -> Iterator[str]:
    opened, address = page.serve(session.settings, port=0, pipe=session.pipe, wait=False)
    yield address
    opened.close()


@needs_gradio
def test_page_is_for_this_machine_and_serves_one_request_at_a_time(session: WebSession) -> None:
    built = page.build(session)
    assert built.analytics_enabled is False
    assert built._queue.max_size == page.WAITING
    (event,) = [fn for fn in built.fns.values() if fn.api_name == "generate"]
    assert event.concurrency_limit == 1


@needs_gradio
def test_program_interface_draws_and_says_what_is_wrong(
    address: str, tmp_path: Path, picture: Image.Image
) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    assert address.startswith("http://127.0.0.1:")
    client = Client(address, verbose=False, download_files=str(tmp_path / "got"))
    path = tmp_path / "reference.png"
    picture.save(path)

    def ask(
        prompt: str = PROMPT,
        mode: str = "others",
        drawn: Any = None,
        count: int = 2,
        seed: int | None = 0,
    ) -> Any:
        rest = (2.5, 2, 0.5, 0.65, 1000, 0, "paper")
        return client.predict(prompt, mode, drawn, count, seed, *rest, api_name="/generate")

    plain, guided, words, figure = ask()
    assert len(plain) == len(guided) == 2
    assert Image.open(guided[0]["image"]).size == (64, 64)
    assert words.startswith("Guided 4 of 4 forwards")
    assert figure["type"] == "matplotlib"
    drawn = {"background": handle_file(path), "layers": [], "composite": None}
    assert len(ask(mode="image", drawn=drawn, count=1)[1]) == 1
    with pytest.raises(AppError, match="does not know 'zebra'"):
        ask(prompt="a zebra")
    (tmp_path / "text.png").write_text("not a picture")
    drawn["background"] = handle_file(tmp_path / "text.png")
    with pytest.raises(AppError, match="not a readable picture"):
        ask(mode="image", drawn=drawn)
    with pytest.raises(AppError, match="16"):
        ask(count=10**6)
    with pytest.raises(AppError, match="first seed is empty"):
        ask(seed=None)


@needs_gradio
def test_a_port_that_is_taken_is_named(address: str, session: WebSession) -> None:
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(OSError, match=f"port {port}, which is taken.*`port`"):
        page.serve(session.settings, port=port, pipe=session.pipe, wait=False)


@needs_gradio
@needs_browser
def test_page_in_a_browser(address: str, tmp_path: Path, picture: Image.Image) -> None:
    from playwright.sync_api import sync_playwright

    path = tmp_path / "reference.png"
    picture.resize((360, 270)).save(path)
    elsewhere: list[str] = []

    def local_only(route: Any) -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    with sync_playwright() as driver:
        # The editor draws with WebGL, which software provides here.
        flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        opened = browser.new_page(viewport={"width": 1300, "height": 1500})
        opened.set_default_timeout(60_000)  # of a busy machine
        opened.route("**/*", local_only)
        opened.goto(address)
        images_are_drawn(opened)
        unknown_words_are_refused(opened)
        opened.click("#mode label:has-text('picture')")
        opened.wait_for_selector("#reference canvas")
        opened.wait_for_function("document.querySelector('#alpha input[type=number]').value == 3")
        with opened.expect_file_chooser() as chooser:
            opened.click("#reference button[title='Upload']")
        chooser.value.set_files(path)
        opened.wait_for_timeout(1000)
        everywhere = drawn_similarity(opened)
        paint_a_region(opened)
        painted = drawn_similarity(opened)
        browser.close()
    assert painted < everywhere  # a part of the picture resembles less than all of it
    assert elsewhere == []


def images_are_drawn(opened: Any) -> None:
    opened.click("text=More settings")
    opened.fill("#steps input[type=number]", "2")
    opened.fill("#count input[type=number]", "2")
    opened.press("#count input[type=number]", "Tab")
    opened.click("#generate")
    opened.wait_for_selector("#guided img")
    opened.wait_for_selector("#blocks img")
    assert [opened.locator(f"#{name} img").count() for name in ("plain", "guided")] == [2, 2]
    assert opened.eval_on_selector("#guided img", "image => image.naturalWidth") == 64
    assert "forwards of the model" in opened.inner_text("#told")


def unknown_words_are_refused(opened: Any) -> None:
    opened.fill("#prompt textarea, #prompt input", "a <b>zebra</b>")
    opened.click("#generate")
    opened.wait_for_selector(".toast-body")
    assert "does not know" in opened.inner_text(".toast-body")
    assert opened.locator(".toast-body b:has-text('zebra')").count() == 0
    opened.click(".toast-close")
    opened.fill("#prompt textarea, #prompt input", PROMPT)


def drawn_similarity(opened: Any) -> float:
    before = opened.evaluate(SENTENCE)
    opened.click("#generate")
    opened.wait_for_function(f"before => ![before, ''].includes(({SENTENCE})())", arg=before)
    return float(opened.evaluate(SENTENCE).split()[-1])


def paint_a_region(opened: Any) -> None:
    opened.click("#reference button[title='Brush']")
    box = opened.locator("#reference canvas").first.bounding_box()
    assert box is not None
    left, top = box["x"] + box["width"] * 0.28, box["y"] + box["height"] / 2
    opened.mouse.move(left, top - 60)
    opened.mouse.down()
    opened.mouse.move(left, top + 60, steps=5)
    opened.mouse.up()
    opened.wait_for_timeout(500)
