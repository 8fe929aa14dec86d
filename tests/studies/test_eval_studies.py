"""Sampling into a store, the studies in their smallest size, their files, and the report."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from negtome_fast.cli import build_parser, main
from negtome_fast.config import NegToMeConfig
from negtome_fast.studies import frontier, report
from negtome_fast.studies.conditions import Condition, Group, batches_of, groups_of
from negtome_fast.studies.measures import contrast
from negtome_fast.studies.rivals import SPELL, IntervalGuidance
from negtome_fast.studies.sampler import Sampler, balanced_avatars
from negtome_fast.studies.scores import MEASURES, Real, change, record, scores_of
from negtome_fast.studies.studies import STUDIES
from negtome_fast.studies.studies.applications import common, sharpen
from negtome_fast.studies.studies.study import Sizes, StudyRun, load, perform

for needed in ("diffusers", "dicebear", "matplotlib", "efficientnet_lite_pytorch"):
    pytest.importorskip(needed, reason="the extras 'demo' and 'eval' are not installed")

PROMPTS = ("a pixel art person", "a voxel art person")
STEPS = 2
TINY = Sizes(images=16, group=2, steps=STEPS, real=16, decoded=16, quick=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def sampler(store: Path) -> Sampler:
    return Sampler(store, batch=4)


@pytest.fixture(scope="module")
def larger(sampler: Sampler, store: Path) -> Sampler:
    """The same instruments with larger batches, for whole studies."""
    larger = Sampler(store, batch=16)
    vars(larger).update(pipe=sampler.pipe, features=sampler.features, reader=sampler.reader)
    return larger


def groups(images: int = 4) -> list[Group]:
    return groups_of(PROMPTS, images, size=2)


def condition(**changes: object) -> Condition:
    base = Condition("base", steps=STEPS, negtome=NegToMeConfig(reference="others", t_end=0))
    return replace(base, **changes)  # type: ignore[arg-type]


def test_a_larger_plan_begins_with_the_smaller_one() -> None:
    assert groups(8)[: len(groups(4))] == groups(4)
    seeds = [seed for group in groups(8) for seed in group.seeds]
    assert len(set(seeds)) == len(seeds)
    sizes = [[len(g.seeds) for g in batch] for batch in batches_of(groups(8), 4)]
    assert sizes == [[2, 2]] * 4
    with pytest.raises(ValueError, match="divide into groups of 8"):
        groups_of(PROMPTS, 12)
    with pytest.raises(ValueError, match="does not know 'dog'"):
        groups_of(("a dog",), 8)


def test_identity_has_what_decides_the_images_and_nothing_else() -> None:
    def identity(**changes: object) -> str:
        return json.dumps(condition(**changes).to_dict(), sort_keys=True)

    same = identity()
    assert identity(name="other") == same
    assert identity(negtome=NegToMeConfig(reference="others", t_end=0, groups=4)) == same
    different = [
        identity(guidance_scale=1.5),
        identity(steps=STEPS + 1),
        identity(negative_prompt="a voxel art person"),
        identity(negtome=None),
        identity(negtome=NegToMeConfig(reference="others", t_end=0, alpha=0.5)),
        identity(negtome=NegToMeConfig(reference="others", t_end=0, blocks=("attn",))),
        identity(negtome=NegToMeConfig(reference="first", t_end=0)),
        identity(baseline=SPELL(20.0)),
        identity(baseline=SPELL(21.0)),
        identity(baseline=IntervalGuidance()),
    ]
    assert len({same, *different}) == 1 + len(different)


def test_identity_has_the_pixels_the_mask_and_the_settings_of_references() -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    from negtome_fast import Reference

    grey = np.full((64, 64, 3), 128, np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    kinds = [
        Reference(grey),
        Reference(grey + 1),
        Reference(grey, mask=mask),
        Reference(grey, mask=~mask),
        Reference(grey, alpha=1.0),
        Reference(grey, noise=False),
    ]
    found = [json.dumps(condition(references=(kind,)).to_dict()) for kind in kinds]
    assert len(set(found)) == len(kinds)
    assert json.dumps(condition(references=(Reference(grey.copy()),)).to_dict()) == found[0]
    with pytest.raises(ValueError, match="references need settings"):
        condition(references=(kinds[0],), negtome=None)


def test_images_depend_on_their_seeds_and_groups_not_on_their_batch() -> None:
    """A group drawn alone is the group drawn beside another, up to the rounding of the batch."""
    sampler = Sampler(None, batch=4)
    first, second = groups()[:2]
    together, _ = sampler.draw(condition(), [first, second])
    alone, _ = sampler.draw(condition(), [second])
    torch.testing.assert_close(together[2:], alone, atol=2e-3, rtol=0)
    assert (together[:2] - together[2:]).abs().max() > 0.1


def test_a_killed_run_goes_on_and_ends_with_the_same_results(
    sampler: Sampler, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Sampler(None, batch=4).sample(condition(), groups())
    calls = []

    def draw(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    original = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(condition(), groups())
    assert sampler.missing(condition(), groups()) == 4
    assert not list(store.rglob("*.part"))
    resumed = sampler.sample(condition(), groups())
    assert len(calls) == 3, "the first batch was drawn again"
    assert (resumed.images == whole.images).all()
    assert (resumed.features == whole.features).all()
    assert (resumed.indices == whole.indices).all()
    assert resumed.prompts == whole.prompts and resumed.seeds == whole.seeds
    assert sampler.missing(condition(), groups()) == 0
    again = sampler.sample(condition(name="renamed"), groups())
    assert len(calls) == 3 and (again.images == whole.images).all()
    assert sampler.missing(condition(guidance_scale=1.0), groups()) == 8


def test_scores_are_those_of_the_images(sampler: Sampler) -> None:
    sizes = 8
    plan = groups(sizes)
    drawn = sampler.sample(condition(), plan)
    plain = sampler.sample(condition(negtome=None), plan)
    real = Real(sampler.real_features(16), sampler.real_features(16, decoded=True))
    scores, base = scores_of({"a": drawn, "b": plain}, real, sampler.features.logits).values()
    found = record(scores, base)
    assert found["images"] == len(found["samples"]["skin"]) == 2 * sizes
    assert found["pushed"] > 0 and record(base)["pushed"] is None
    for name in MEASURES:
        estimate, low, high = found["measures"][name]
        assert low <= estimate <= high
    precision = found["samples"]["inside"].count("1") / (2 * sizes)
    assert found["measures"]["precision"][0] == pytest.approx(precision, abs=1e-3)
    likeness = sum(found["samples"]["likeness"]) / (2 * sizes)
    assert found["measures"]["cosine"][0] == pytest.approx(likeness, abs=2e-3)
    assert change(scores, scores, "cosine").estimate == 0
    other = sampler.sample(condition(), groups(4))
    with pytest.raises(ValueError, match="different seeds, prompts"):
        change(scores, replace(base, samples=other), "cosine")


def test_more_images_than_real_ones_are_refused_before_they_are_drawn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["eval", "diversity", "--samples", "8192"]) == 2
    assert "more than the 4096 real ones" in capsys.readouterr().err


def test_real_images_are_balanced_over_styles_and_begin_with_the_fewer(sampler: Sampler) -> None:
    some, more = sampler.real_features(8), sampler.real_features(16)
    assert more.shape == (16, 1280)
    torch.testing.assert_close(more[:8], some, atol=1e-4, rtol=1e-3)
    styles = [avatar.style for avatar in balanced_avatars(8)]
    assert sorted(styles) == sorted(2 * list(dict.fromkeys(styles)))
    with pytest.raises(ValueError, match="do not divide into 4 styles"):
        sampler.real_features(6)


def test_frontier_of_known_points() -> None:
    quality, diversity = np.array([[0.8], [0.4]]), np.array([[0.2], [1.0]])

    def at(level: float) -> float:
        return float(frontier.at(quality, diversity, np.array([level]))[0])

    assert at(0.8) == pytest.approx(0.2)
    assert at(0.6) == pytest.approx(0.6)
    assert at(0.4) == pytest.approx(1.0)
    assert at(0.1) == pytest.approx(1.0)
    assert np.isnan(at(0.9))
    # A point that another beats in both has no part in it.
    better = frontier.at(
        np.append(quality, [[0.5]], 0), np.append(diversity, [[0.1]], 0), np.array([0.5])
    )
    assert float(better[0]) == pytest.approx(0.8)


def test_frontier_against_itself_gains_nothing(sampler: Sampler) -> None:
    drawn = sampler.sample(condition(), groups(8))
    real = Real(sampler.real_features(16), sampler.real_features(16, decoded=True))
    scores = scores_of({"": drawn}, real, sampler.features.logits)[""]
    found = frontier.matched(scores, [scores])
    assert found.method == found.base
    assert found.ratio is None or found.ratio.corrected == pytest.approx(1)
    same = frontier.compared([scores], [scores], found.level)
    assert same.method == same.rival == found.base
    above = frontier.compared([scores], [scores], found.level + 0.5)
    assert np.isnan(above.method) and above.ratio is None


@pytest.mark.parametrize(
    "name",
    ["diversity", "conventions", "hyperparameters", "rivals", "protected", "applications"],
)
def test_study_writes_scores_table_figures_and_sheets(
    name: str, larger: Sampler, tmp_path: Path
) -> None:
    study = STUDIES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tight_layout|constrained_layout.*")
        result = perform(study, StudyRun(larger, TINY, tmp_path, progress=False))
    assert load(tmp_path / f"{name}.json") == json.loads(json.dumps(result))
    assert result["command"] == f"negtome-fast eval {name} --quick"
    assert {"cpu", "versions", "commit", "sizes", "date"} <= result.keys()
    table = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert table.count("\n|") >= 3 and "nan" not in table
    assert result["command"] in table
    figures = study.figures(result)
    for figure in figures:
        assert (tmp_path / f"{name}-{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("*.png"))) >= len(figures) >= 1
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(list(tmp_path.glob("*.png")))
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page needs something else"
    assert "A rehearsal" in page


def test_sharpening_goes_away_from_the_blurred_copy_of_each_image_itself(
    sampler: Sampler, tmp_path: Path
) -> None:
    from negtome_fast import Reference

    base = sampler.sample(condition(negtome=None), groups()).only([0, 3])
    copies = sharpen.blurred_copies(base)
    assert copies.images.shape == base.images.shape
    sharp, soft = (contrast(one.pixels()) for one in (base, copies))
    assert (soft < 0.8 * sharp).all()

    def away(item: int) -> Condition:
        picture = copies.images[item].transpose(1, 2, 0)
        return condition(negtome=NegToMeConfig(t_end=0), references=(Reference(picture),))

    run = StudyRun(sampler, TINY, tmp_path, progress=False)
    found = common.own_references(run, base, "own", away)
    assert (found.prompts, found.seeds) == (base.prompts, base.seeds)
    assert found.groups.tolist() == base.groups.tolist()
    for item, (prompt, seed) in enumerate(zip(base.prompts, base.seeds, strict=True)):
        alone = sampler.sample(away(item), [Group(prompt, (seed,))])
        assert (found.images[item] == alone.images[0]).all()
        swapped = sampler.sample(away(1 - item), [Group(prompt, (seed,))])
        assert (found.images[item] != swapped.images[0]).any(), "its reference does not matter"


def test_contrast_is_the_mean_step_between_neighbours() -> None:
    stripes = torch.zeros(1, 3, 8, 8)
    stripes[..., ::2] = 1
    assert contrast(stripes).tolist() == [255 / 2]
    assert contrast(stripes.mT).tolist() == [255 / 2]
    assert contrast(torch.full((2, 3, 8, 8), 0.5)).tolist() == [0, 0]


def test_applications_compare_image_by_image(sampler: Sampler) -> None:
    base = sampler.sample(condition(negtome=None), groups())
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=len(base)))
    found = common.measured({"a": values + 0.25, "b": values}, {"a": values, "b": values}, base)
    assert found["differences"]["a"] == [0.25, 0.25, 0.25, "higher"]
    assert found["differences"]["b"] == [0, 0, 0, "no change seen"]
    estimate, low, high = found["measured"]["a"]
    assert low < estimate < high, "the values differ more than their pairs do"
    assert "differences" not in common.measured({"a": values}, None, base)


def test_result_is_the_same_when_drawn_again_from_the_store(
    larger: Sampler, tmp_path: Path
) -> None:
    study = STUDIES["hyperparameters"]
    changing = {"date", "seconds_of_this_run", "changed_files", "commit"}
    first, again = (
        perform(study, StudyRun(larger, TINY, tmp_path / name, progress=False))
        for name in ("a", "b")
    )
    assert first.keys() > changing
    for key in first.keys() - changing:
        assert first[key] == again[key], key


def test_every_study_is_a_word_of_the_command_line() -> None:
    for name in (*STUDIES, "report"):
        assert build_parser().parse_args(["eval", name]).study == name


def test_report_of_nothing_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "report", "--out", str(tmp_path)]) == 2
    assert "no results of studies" in capsys.readouterr().err
    (tmp_path / "diversity.json").write_text("[]", encoding="utf-8")
    assert main(["eval", "report", "--out", str(tmp_path)]) == 2
    assert "is not the result of a study" in capsys.readouterr().err


def test_bad_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--out", str(tmp_path), "--store", str(tmp_path)]
    assert main(["eval", "diversity", "--samples", "100", *where]) == 2
    assert "must be a multiple of" in capsys.readouterr().err
    assert main(["eval", "diversity", "--samples", "64", "--quick", *where]) == 2
    assert main(["eval", "diversity", "--threads", "0", *where]) == 2
    assert not (tmp_path / "diversity.json").exists()


def test_page_has_the_committed_results() -> None:
    from bench.results import FOLDER
    from docs.render.pages import render

    page = FOLDER.parents[1] / "docs" / "evaluation.md"
    text = page.read_text(encoding="utf-8")
    assert render("docs/evaluation.md", text) == text, "run make pages"
    assert "not measured" not in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    sizes = [path.stat().st_size for path in (FOLDER / "eval").glob("*.json")]
    assert sizes and max(sizes) < 1_000_000


def test_page_without_results_says_so(tmp_path: Path) -> None:
    from docs.render.pages import render

    page, mark = "docs/evaluation.md", "<!-- begin: diversity -->\nold\n<!-- end: diversity -->"
    assert "not measured" in render(page, mark, tmp_path)
    assert "old" not in render(page, mark, tmp_path)
    with pytest.raises(ValueError, match="marks 'dogs'"):
        render(page, mark.replace("diversity", "dogs"), tmp_path)
