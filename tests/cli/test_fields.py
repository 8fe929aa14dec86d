"""Errors of the library name fields; the command line shows the options that set them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')

from negtome_fast.cli import build_parser, main
from negtome_fast.cli.fields import in_options
from negtome_fast.generation import Settings


def translated(message: str, *arguments: str) -> str:
    parser = build_parser()
    return in_options(message, parser, parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "field", "option"),
    [
        (["generate"], "vae_tiling", "--vae-tiling"),
        (["generate"], "images", "--images"),
        (["generate"], "prompts", "--prompt"),
        (["generate"], "call", "--argument"),
        (["generate"], "references", "--reference"),
        (["generate"], "reference", "--in-batch"),
        (["generate"], "folder", "--output"),
        (["eval", "own"], "references", "--avoid"),
        (["eval", "own"], "reference", "--reference"),
        (["eval", "own"], "guidance_scale", "--guidance-scale"),
        (["eval", "own"], "scales", "--guidance-scale"),
        (["nudge"], "filters", "--filter"),
        (["nudge"], "max_attempts", "--max-attempts"),
        (["bank", "build", "pictures", "--out", "bank"], "size", "--size"),
        (["web"], "port", "--port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_field_becomes_the_option_that_sets_it(
    arguments: list[str], field: str, option: str
) -> None:
    message = f"`{field}` must be at least 1, and `{field}` is 0"
    assert translated(message, *arguments) == f"{option} must be at least 1, and {option} is 0"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("images must be at least 1", "--images must be at least 1"),
        ("seed: not a number", "--seed: not a number"),
        ("set true_cfg_scale above 1", "set --true-cfg-scale above 1"),
        ("`call` eta: no such argument", "--argument eta: no such argument"),
    ],
)
def test_a_field_is_quoted_or_long_or_first(message: str, shown: str) -> None:
    assert translated(message, "generate") == shown


@pytest.mark.parametrize(
    "message",
    [
        "`colour` is unknown",
        "the images differ",
        "there is no model at x",
        "steps=(start, end) are fractions, t_start=800 is a timestep",
        "no max_attempts here",
        "no model at /data/negative_prompt/x or in vae_tiling.json, true_cfg_scale/y",
        "pip install 'negtome-fast[web]'",
    ],
)
def test_other_words_stay(message: str) -> None:
    assert translated(message, "generate") == message


def test_generate_has_an_option_for_every_setting() -> None:
    for field in {f.name for f in fields(Settings)} - {"guidance"}:
        assert translated(f"`{field}`", "generate").startswith("--"), field


def test_an_error_of_the_library_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nudge", "--max-attempts", "0"]) == 2
    assert capsys.readouterr().err == (
        "negtome-fast: error: --max-attempts must be at least 1, got 0\n"
    )


def test_the_removed_command_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench"])
    assert stop.value.code == 2
    assert "invalid choice: 'bench'" in capsys.readouterr().err


def test_choices_are_those_of_the_library() -> None:
    from negtome_fast.cli.commands import nudge
    from negtome_fast.generation.nudge_filters import FILTERS
    from negtome_fast.nudging.schedule import METHODS

    assert nudge.METHODS == METHODS and nudge.FILTERS == FILTERS


def test_the_parser_loads_no_library_of_a_command() -> None:
    """The help appears at once."""
    program = (
        "import sys; from negtome_fast.cli import build_parser; build_parser();"
        "heavy = ('generation', 'nudging', 'studies', 'pipelines', 'models', 'tuner');"
        "print([name for name in heavy if f'negtome_fast.{name}' in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
