"""The cost of nudging: the filters where nothing is flagged, and one retry with each method.

All variants are timed in interleaved rounds on the embedded model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....nudging import CallableFilter, ReferenceBank, generate_with_nudging, judge
from ...intervals import bootstrap
from ...scores import triple
from ..study import Study, StudyRun
from ..tables import markdown
from .drawing import call_arguments
from .subjects import FEW_DESIRED, METHODS, PLAIN, RetryMethod, Subject, desired, subjects

_ROUNDS = 25
_FEW_ROUNDS = 2
_ORDINARY, _MEMORISED = "a pixel art person", "captain red"
"""Prompts of which the filters flag no image, and every image."""

Work = dict[str, Callable[[], None]]


def run(run: StudyRun) -> dict[str, Any]:
    """Time the filters alone against the whole loop, and a plain generation against each retry."""
    images = run.sizes.images
    jobs = _Jobs(subjects(run.sampler, quick=True)[0], images, run.sizes.steps)
    rounds = _FEW_ROUNDS if run.sizes.quick else _ROUNDS
    untriggered = interleaved({"filters alone": jobs.filters_alone, "loop": jobs.loop}, rounds)
    triggered = interleaved({PLAIN: jobs.plain, **jobs.retries()}, max(2, rounds // 3))
    return {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "untriggered": added(untriggered, "filters alone", images),
        "triggered": added(triggered, PLAIN, images),
    }


class _Jobs:
    """The jobs that are timed, all with the same seeds."""

    def __init__(self, subject: Subject, images: int, steps: int) -> None:
        self._subject, self._images = subject, images
        self._call = {
            **call_arguments(steps), "num_images_per_prompt": images, "negative_prompt": "",
        }  # fmt: skip
        self._desired = desired(subject, [_MEMORISED], FEW_DESIRED)[_MEMORISED]
        self._first = self._generate(_MEMORISED)

    def _generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(self._images)]

    def _generate(self, prompt: str) -> Tensor:
        images: Tensor = self._subject.pipe(
            prompt, generator=self._generators(), **self._call
        ).images
        return images

    def filters_alone(self) -> None:
        """Generate and judge images that pass."""
        rows = judge(self._subject.filters, self._generate(_ORDINARY))
        assert not any(verdicts[-1].triggered for verdicts in rows)

    def loop(self) -> None:
        """Run the whole loop on images that pass."""
        result = generate_with_nudging(
            self._subject.pipe,
            _ORDINARY,
            filters=self._subject.filters,
            undesired=self._subject.bank,
            desired=self._desired,
            generator=self._generators(),
            **self._call,
        )
        assert all(result.passed)

    def plain(self) -> None:
        """Generate memorised images without a retry."""
        self._generate(_MEMORISED)

    def retries(self) -> Work:
        """Return one retry with each method."""
        always = CallableFilter(lambda images: [1.0] * len(images), 0.5, "always")

        def retry(method: RetryMethod, desired: ReferenceBank | None) -> Callable[[], None]:
            def work() -> None:
                generate_with_nudging(
                    self._subject.pipe,
                    _MEMORISED,
                    filters=[always],
                    undesired=self._subject.bank,
                    desired=desired,
                    method=method.method,
                    negtome=method.negtome,
                    generator=self._generators(),
                    first=self._first,
                    max_attempts=2,
                    **self._call,
                )

            return work

        return {
            name: retry(method, self._desired if method.desired else None)
            for name, method in METHODS.items()
            if name != "away"
        }


def interleaved(work: Work, rounds: int) -> dict[str, list[float]]:
    """Return seconds of each job in every round; every other round runs backward.

    One more round comes first and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name in list(work) if number % 2 else list(reversed(work)):
            began = time.perf_counter()
            work[name]()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def added(times: dict[str, list[float]], base: str, images: int) -> dict[str, Any]:
    """Return each job's median seconds per image, and its share added to `base`.

    The share is the median over paired rounds, with its interval.
    """
    found: dict[str, Any] = {}
    for name, own in times.items():
        ratios = torch.tensor([a / b - 1 for a, b in zip(own, times[base], strict=True)])
        found[name] = {"seconds_per_image": round(statistics.median(own) / images, 5)}
        if name != base:
            found[name]["added"] = triple(bootstrap(_median, ratios.double()))
    return found


def _median(values: Any) -> float:
    return float(torch.as_tensor(values).quantile(0.5))


def table_cost(result: dict[str, Any]) -> str:
    """Return Markdown with a row for each job."""
    rows = []
    for case, label in (("untriggered", "nothing is flagged"), ("triggered", "one retry")):
        for name, one in result[case].items():
            words = "-"
            if "added" in one:
                middle, low, high = one["added"]
                words = f"{middle:+.1%} [{low:+.1%}, {high:+.1%}]"
            shown = METHODS[name].label if name in METHODS else name
            rows.append([label, shown, f"{one['seconds_per_image']:.3f}", words])
    note = (
        f"Medians of {result['rounds']} interleaved rounds ({max(2, result['rounds'] // 3)} of "
        f"retries) of {result['sizes']['images']} images, {result['sizes']['steps']} steps, "
        f"{result['threads']} thread(s), and 95% intervals of paired rounds; added to the first "
        f"row of each case. {result['date'][:10]}, torch {result['versions']['torch']}. Made by "
        f"`{result['command']}`, which needs a machine that does nothing else."
    )
    return markdown(["case", "what", "seconds an image", "added"], rows) + "\n\n" + note


COST = Study(
    "nudging-cost",
    "time of nudging where nothing is flagged and of a retry, on a quiet machine",
    2,
    run,
    table_cost,
    lambda result: {},
)
