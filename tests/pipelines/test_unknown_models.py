"""Models that are not in the table: guessed, refused, or registered by the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

pytest.importorskip("diffusers", reason='the extra "diffusers" is not installed')
from negtome_fast.functional import negtome
from negtome_fast.pipelines import (
    ImageTokens,
    Layout,
    apply_negtome,
    layouts,
    negtome_guidance,
    register_layout,
)


class Attention(nn.Module):
    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.answer(image, text)


class UnheardOf(nn.Module):
    """A third party's denoiser; `answer` is what its attention returns."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.attn = Attention(answer)

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        output = self.attn(hidden_states, text)
        return output[0] if isinstance(output, tuple) else output[:, -hidden_states.shape[1] :]


class UnheardOfPipeline:
    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        self.transformer = UnheardOf(answer)
        self.scheduler = type("Scheduler", (), {"timesteps": torch.tensor([1000.0, 500.0])})()

    def __call__(self, image: Tensor) -> list[Tensor]:
        outputs = []
        for step, t in enumerate(self.scheduler.timesteps):
            self.scheduler.step_index = step
            text = torch.ones(len(image), 3, 8)
            outputs.append(self.transformer(image, text, timestep=t / 7))
        return outputs


def unheard_of_input() -> Tensor:
    return torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "answer", [lambda image, text: (image, text), lambda image, text: image], ids=["tuple", "S==N"]
)
def test_an_unknown_class_is_served_where_the_rules_settle_it(answer: Any) -> None:
    pipe, image = UnheardOfPipeline(answer), unheard_of_input()
    with negtome_guidance(pipe, threshold=0.1) as handle:
        early, late = pipe(image)
    torch.testing.assert_close(early, negtome(image, threshold=0.1))
    assert torch.equal(late, image)
    assert handle.summary().guided == 1


def test_an_unknown_order_of_tokens_names_the_class_and_the_way_out() -> None:
    pipe = UnheardOfPipeline(lambda image, text: torch.cat([text, image], dim=1))
    expected = r"UnheardOf: .* attn has the shape \(3, 13, 8\) .* 10 tokens.*register_layout"
    with negtome_guidance(pipe), pytest.raises(ValueError, match=expected):
        pipe(unheard_of_input())


def test_an_unknown_class_needs_its_pipeline() -> None:
    with pytest.raises(ValueError, match=r"UnheardOf .*register_layout"):
        apply_negtome(UnheardOf(lambda image, text: image))


def test_a_registered_layout_serves_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))
    layout = Layout(
        scheduler_timestep=lambda t: t * 7,
        guidance="sequential",
        image_tokens=lambda model, arguments: ImageTokens(10, 10, (2, 5)),
        joint="text_first",
    )
    register_layout(UnheardOf, layout)
    pipe = UnheardOfPipeline(lambda image, text: torch.cat([text, image], dim=1))
    image = unheard_of_input()
    with negtome_guidance(pipe.transformer, threshold=0.1) as handle:
        early, late = pipe(image)
    torch.testing.assert_close(early, negtome(image, threshold=0.1))
    assert torch.equal(late, image)
    assert handle.summary().rows[0].grid == (2, 5)


def test_wrong_registrations_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a Layout"):
        register_layout("Model", {"latents": "x"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="class or its name"):
        register_layout("not a name", Layout())
