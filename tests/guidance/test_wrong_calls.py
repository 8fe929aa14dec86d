"""Wrong arguments of every public name: an error of the usual kinds that names the argument.

Every argument is given every value of a table. It may be right; else the error must be one that a
caller expects, and say which argument was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import negtome_fast as nf
from negtome_fast.config import ReferenceSettings

X = torch.randn(4, 10, 8)
EXPECTED = (ValueError, TypeError, FileNotFoundError, RuntimeError)

WRONG: dict[str, Any] = {
    "an object": object(),
    "bytes": b"x",
    "a complex number": 1j,
    "a set": {1},
    "a function": len,
    "a module": torch.nn.Linear(2, 2),
    "lists of lists": [[1], [2, 3]],
}
"""Values that are right for no argument."""

VALUES: dict[str, Any] = WRONG | {
    "None": None,
    "text": "x",
    "no text": "",
    "a bool": True,
    "a huge integer": 10**400,
    "a large integer": 2**70,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "a fraction": Fraction(1, 3),
    "a decimal": Decimal("0.5"),
    "a list": [1],
    "no tuple": (),
    "a dictionary": {},
    "a NumPy number": np.float32(1),
    "a NumPy integer": np.int64(3),
    "a NumPy nan": np.float64("nan"),
    "an array": np.zeros((4, 10, 8), np.float32),
    "an array of no dimension": np.array(0.5),
    "a tensor of no dimension": torch.tensor(0.5),
    "a tensor of nan": torch.full((4, 10, 8), math.nan),
    "a tensor of integers": torch.zeros(4, 10, 8, dtype=torch.long),
    "a complex tensor": torch.zeros(4, 10, 8, dtype=torch.complex64),
    "a tensor of two dimensions": torch.zeros(3, 3),
    "a tensor of four dimensions": torch.zeros(2, 2, 2, 2),
    "no elements": torch.empty(0),
    "a device elsewhere": torch.empty(4, 10, 8, device="meta"),
    "a bool tensor": torch.ones(10, dtype=torch.bool),
}


def layer(**given: Any) -> None:
    made = nf.NegToMe(**given)
    made(X)
    repr(made)


def changed_layer(**given: Any) -> None:
    made = nf.NegToMe()
    for name, value in given.items():
        setattr(made, name, value)
    repr(made)
    made(X)


def step(**given: Any) -> None:
    nf.Guidance().begin_step(**{"timestep": 950.0, **given})


def step_of_steps(**given: Any) -> None:
    config = nf.NegToMeConfig(steps=(0, 0.5))
    nf.Guidance(config).begin_step(**{"step": 0, "num_steps": 4, **given})


def applied(**given: Any) -> None:
    guidance = nf.Guidance()
    guidance.begin_step(950.0)
    guidance.apply(**{"image_tokens": X, **given})


def grid(**given: Any) -> None:
    nf.NegToMeConfig(min_grid=(2, 2)).includes_grid(**given)


def warmed(**given: Any) -> None:
    nf.warmup(**{"shapes": [(4, 10, 8)], "device": "cpu", "dtype": torch.float32, **given})


def warmed_shape(shape: Any) -> None:
    nf.warmup([shape], device="cpu", dtype=torch.float32)


OPERATOR = ("x", "reference", "reference_mask", "groups", "backend")
MATCHES = ("alpha", "threshold", "matching", "combine", "dropout")
FIELDS = ("t_start", "t_end", "steps", "seed", "blocks", "exclude_blocks", "min_grid", "placement")
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "negtome": (
        lambda **given: nf.negtome(**{"x": X, **given}),
        (*OPERATOR, *MATCHES, "source_mask", "generator", "inplace"),
    ),
    "match_tokens": (lambda **given: nf.match_tokens(**{"x": X, **given}), OPERATOR),
    "NegToMe": (layer, (*MATCHES, "reference", "groups", "backend", "inplace")),
    "NegToMe.attribute": (changed_layer, ("alpha", "threshold", "dropout", "groups")),
    "NegToMe.forward": (lambda **given: nf.NegToMe()(**{"x": X, **given}), ("x", "reference_mask")),
    "warmup": (warmed, ("shapes", "dtype", "device", "groups")),
    "warmup's": (warmed_shape, ("shape",)),
    "NegToMeConfig": (nf.NegToMeConfig, (*MATCHES, *FIELDS, "reference", "groups", "backend")),
    "NegToMeConfig.includes_grid": (grid, ("grid",)),
    "Guidance": (nf.Guidance, ("config", "references")),
    "Guidance.configure": (lambda **given: nf.Guidance().configure(**given), ("config",)),
    "Guidance.begin_step": (step, ("timestep", "tolerance")),
    "Guidance.begin_step of steps": (step_of_steps, ("step", "num_steps")),
    "Guidance.apply": (applied, ("image_tokens",)),
    "ReferenceSettings": (ReferenceSettings, ("alpha", "threshold", "mask")),
}


def told(call: Callable[..., Any], argument: str, value: Any) -> Exception | None:
    """The error of a call, if it is one that a caller expects."""
    try:
        call(**{argument: value})
    except EXPECTED as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "argument"), [(name, one) for name, (_, names) in CALLS.items() for one in names]
)
def test_a_wrong_argument_is_named(name: str, argument: str) -> None:
    call, _ = CALLS[name]
    for kind, value in VALUES.items():
        error = told(call, argument, value)
        assert error is not None or kind not in WRONG, f"{kind} was taken for {argument}"
        if error is not None:
            words = (argument.rstrip("s"), "x must be one of" if argument[0] == "i" else argument)
            assert any(word in str(error) for word in words), f"{argument}, {kind}: {error}"


# ---------------------------------------------------------------------------------------------
# Pipelines, references and nudging
# ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipe() -> Any:
    pytest.importorskip("diffusers", reason="the extra 'diffusers' is not installed")
    from helpers.pipelines_fixtures import flux_pipeline

    return flux_pipeline()


@contextmanager
def guided(pipe: Any, **given: Any) -> Iterator[Any]:
    handle = nf.apply_negtome(pipe, **given)
    try:
        yield handle
    finally:
        nf.remove_negtome(pipe)


@pytest.mark.parametrize("argument", ["config", "reference", "alpha", "blocks", "groups", "nope"])
def test_a_pipeline_stays_unguided_after_a_wrong_argument(pipe: Any, argument: str) -> None:
    for kind, value in VALUES.items():
        for guide in (nf.apply_negtome, nf.negtome_guidance):
            try:
                if guide is nf.apply_negtome:
                    with guided(pipe, **{argument: value}):
                        pass
                else:
                    with nf.negtome_guidance(pipe, **{argument: value}):
                        pass
            except EXPECTED as error:
                assert argument.rstrip("s") in str(error), f"{argument}, {kind}: {error}"
            else:
                assert kind not in WRONG and argument != "nope", kind
        assert not pipe.transformer._forward_pre_hooks
    with guided(pipe) as handle:
        before = handle.config
        for kind, value in VALUES.items():
            error = told(handle.update, argument if argument != "reference" else "alpha", value)
            assert error is not None or kind not in WRONG
            handle.update(before)


def test_what_is_no_pipeline_is_refused() -> None:
    pytest.importorskip("diffusers", reason="the extra 'diffusers' is not installed")
    for kind, value in VALUES.items():
        for call in (nf.apply_negtome, nf.remove_negtome):
            if kind != "a module":
                with pytest.raises(TypeError, match="expected a diffusers pipeline"):
                    call(value)
        with pytest.raises(TypeError):
            nf.register_layout(value, value)


@pytest.mark.parametrize("argument", ["image", "mask", "alpha", "threshold", "noise"])
def test_a_wrong_reference_is_named(argument: str) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed").new("RGB", (8, 8))

    def load(**given: Any) -> None:
        nf.Reference(**{"image": image, **given}).load()

    for kind, value in VALUES.items():
        error = told(load, argument, value)
        assert error is not None or kind not in WRONG, kind
        named = ("image", "latents", "reference") if argument == "image" else (argument,)
        assert error is None or any(word in str(error) for word in named), f"{kind}: {error}"
    for latents in (X, torch.zeros(1, 4, 4)):
        load(image=latents)
    for latents in (torch.zeros(4), torch.zeros(4, 0, 4), torch.full((4, 4, 4), math.nan)):
        with pytest.raises(ValueError, match="latents"):
            load(image=latents)


NUDGE = ("latents", "desired", "undesired", "alpha", "beta", "objective", "steps", "step_size")


@pytest.mark.parametrize("argument", [*NUDGE, "max_distance", "tolerance", "backend"])
def test_a_wrong_argument_of_nudge_is_named(argument: str) -> None:
    right = {"latents": torch.randn(2, 4, 4), "undesired": torch.randn(3, 4, 4), "steps": 1}
    for kind, value in VALUES.items():
        error = told(nf.nudge, argument, value) if argument not in right else None
        try:
            nf.nudge(**{**right, argument: value})
        except EXPECTED as found:
            error = found
            words = (argument, "undesired") if argument == "latents" else (argument,)
            assert any(word in str(error) for word in words), f"{kind}: {error}"
        assert error is not None or kind not in WRONG, kind


def test_wrong_banks_and_filters_are_named(pipe: Any) -> None:
    bank = nf.ReferenceBank(("a",), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for kind, value in WRONG.items():
        for argument in ("images", "features"):
            given = {"names": ("a",), "images": bank.images, argument: value}
            with pytest.raises(TypeError, match=f"{argument} must be a tensor"):
                nf.ReferenceBank(**given)
        with pytest.raises(TypeError, match="filters must"):
            nf.generate_with_nudging(pipe, "x", filters=value, undesired=bank)
        with pytest.raises(TypeError, match="filters must have a method judge"):
            nf.generate_with_nudging(pipe, "x", filters=[value], undesired=bank)
        with pytest.raises((TypeError, FileNotFoundError, ValueError)):
            nf.ReferenceBank.load(value)
        assert kind


def test_every_public_name_is_in_a_table() -> None:
    called = {name.split(".")[0].split("'")[0].split(" ")[0] for name in CALLS}
    others = {"apply_negtome", "negtome_guidance", "remove_negtome", "register_layout"}
    others |= {"Reference", "nudge", "ReferenceBank", "generate_with_nudging"}
    assert set(nf.__all__) <= called | others
