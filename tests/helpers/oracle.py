"""Check a backend's result against the fp64 oracle, under the index rule.

A backend may choose another token than the oracle only where the two cosines differ by less than
the rounding of an fp32 dot product. Given its own choices, its output must be right to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from negtome_fast import naive as oracle
from negtome_fast.arguments import check_problem
from negtome_fast.call import Call

NOTHING = float("-inf")


def cosine_tolerance(channels: int, dtype: torch.dtype) -> float:
    """Bound on the rounding of one cosine: a few units in the last place, growing as sqrt(D)."""
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return unit * (8.0 + 4.0 * channels**0.5)


def bits(values: Tensor) -> Tensor:
    """Bit patterns, so that NaN equals NaN."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.contiguous().view(width)


def _wide(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1)


class Problem:
    """The arguments of one call in canonical form, upcast, with all cosines known."""

    def __init__(self, x: Tensor, arguments: dict[str, Any]) -> None:
        self.x = x.detach().cpu()
        arguments = {
            k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()
        }
        self.matching = arguments.get("matching", "paper")
        self.combine = arguments.get("combine", "nearest")
        groups = arguments.get("groups", 1)
        checked = check_problem(
            self.x,
            arguments.get("reference", "first"),
            arguments.get("reference_mask"),
            self.matching,
            groups,
        )
        target = self.x if checked.reference is None else checked.reference
        self.mask, self.pairing = checked.mask, checked.pairing
        slots = self.pairing.slots
        self.alpha = _wide(arguments.get("alpha", 0.9)).expand(slots)
        self.threshold = _wide(arguments.get("threshold", 0.65)).expand(slots)
        source_mask = arguments.get("source_mask")
        shape = self.x.shape[:2]
        self.source_mask = (
            torch.ones(shape, dtype=torch.bool)
            if source_mask is None
            else source_mask.expand(shape)
        )
        self.wide, self.reference = self._upcast(self.x), self._upcast(target)
        call = Call(self.wide, self.reference, self.pairing, self.mask, self.matching)
        self.best, self.index = oracle.match(call)
        self.tolerance = cosine_tolerance(self.x.shape[2], self.x.dtype)

    def _upcast(self, values: Tensor) -> Tensor:
        """Convert to fp64; tokens whose norm overflows the backends' arithmetic become infinite."""
        dtype = oracle.compute_dtype(values.dtype)
        wide = values.double()
        return torch.where(oracle.is_finite(values.to(dtype))[..., None], wide, torch.inf)

    def cosines(self, item: int, slot: int) -> Tensor:
        """fp64 cosines `(N, M)` of one pair."""
        other = self.pairing.reference_item(item, slot)
        return F.normalize(self.wide[item], dim=-1) @ F.normalize(self.reference[other], dim=-1).T

    def check_match(self, similarity: Tensor, index: Tensor) -> None:
        """Check similarity and index, `(B, slots, N)` each, under the index rule."""
        similarity, index = similarity.cpu().double(), index.cpu()
        assert index.dtype == torch.int64
        nothing = self.index < 0
        assert torch.equal(index < 0, nothing), (
            "a match where none is allowed, or none where one is"
        )
        assert torch.all(similarity[nothing] == NOTHING)
        for item in self.pairing.sources:
            for slot in range(self.pairing.slots):
                found = ~nothing[item, slot]
                cosines = self.cosines(item, slot)
                if self.matching == "official":
                    cosines = cosines.T
                chosen = cosines.gather(1, index[item, slot].clamp_min(0)[:, None])[:, 0]
                lost = (self.best[item, slot] - chosen)[found]
                assert torch.all(lost <= self.tolerance), f"worse match, by {lost.max():.2e}"
                error = (similarity[item, slot] - chosen)[found].abs()
                assert torch.all(error <= self.tolerance), f"wrong cosine, by {error.max():.2e}"

    def check_guide(self, y: Tensor, similarity: Tensor, pushed: Tensor) -> None:
        """Check similarity and decision under the index rule, then the output up to rounding."""
        y, similarity, pushed = y.cpu(), similarity.cpu().double(), pushed.cpu()
        assert y.dtype == self.x.dtype and y.shape == self.x.shape
        if self.combine == "nearest":
            best = self.best.amax(dim=1, keepdim=True)
        else:
            best = self.best
        assert similarity.shape == best.shape == pushed.shape
        nothing = best == NOTHING
        assert torch.equal(similarity == NOTHING, nothing)
        error = (similarity - best)[~nothing].abs()
        assert torch.all(error <= self.tolerance), f"wrong similarity, by {error.max():.2e}"

        chosen = torch.full_like(pushed, -1)
        tokens = self.reference.shape[1]
        expected = self.wide.clone()
        size = torch.zeros(self.x.shape[:2], dtype=torch.float64)
        for item in range(len(self.x)):
            for row in range(pushed.shape[1]):
                self._check_decision(item, row, pushed[item, row])
                moves = pushed[item, row] >= 0
                chosen[item, row] = pushed[item, row]
                slot, token = pushed[item, row][moves] // tokens, pushed[item, row][moves] % tokens
                at = [self.pairing.reference_item(item, int(s)) for s in slot]
                r = self.reference[at, token]
                step = self.alpha[slot][:, None] * (self.wide[item, moves] - r)
                expected[item, moves] += step
                size[item, moves] += step.abs().amax(dim=-1)
                size[item, moves] += self.wide[item, moves].abs().amax(dim=-1) + r.abs().amax(
                    dim=-1
                )
        untouched = (chosen < 0).all(dim=1)
        assert torch.equal(bits(y)[untouched], bits(self.x)[untouched]), "an unmoved token changed"
        unit = torch.finfo(oracle.compute_dtype(y.dtype)).eps
        rounding = expected.abs() * torch.finfo(y.dtype).eps * 0.5001 + 4 * unit * size[..., None]
        largest = torch.finfo(y.dtype).max
        error = (y.double() - expected.clamp(-largest, largest)).abs()
        # Not "greater": a comparison with NaN is false.
        wrong = ~(error <= rounding + torch.finfo(y.dtype).tiny) & ~untouched[..., None]
        assert not torch.any(wrong), f"{int(wrong.sum())} values beyond rounding"
        assert torch.all(y[~untouched].isfinite()), "a pushed token is not finite"

    def _check_decision(self, item: int, row: int, pushed: Tensor) -> None:
        """Check that tokens above the threshold are pushed; near it, either way is right."""
        tokens = self.reference.shape[1]
        moves = pushed >= 0
        assert not torch.any(moves & ~self.source_mask[item]), "a token moved that may not"
        cosine = torch.full(self.best[item].shape, NOTHING, dtype=torch.float64)
        for slot in range(self.pairing.slots):
            here = moves & (pushed // tokens == slot)
            table = self.cosines(item, slot) if item in self.pairing.sources else None
            assert table is not None or not torch.any(here), "a reference item moved"
            if table is not None:
                table = table.T if self.matching == "official" else table
                at = pushed.remainder(tokens).clamp_min(0)[:, None]
                cosine[slot, here] = table.gather(1, at)[here, 0]
                lost = (
                    self.best[item]
                    if self.combine == "nearest"
                    else self.best[item, slot : slot + 1]
                )
                assert torch.all((lost.amax(0) - cosine[slot])[here] <= self.tolerance), (
                    "worse match"
                )
                above = cosine[slot, here] - self.threshold[slot]
                assert torch.all(above > -self.tolerance), "pushed below the threshold"
        if self.combine == "nearest":
            # Any slot whose best cosine ties within rounding may decide; only if all exceed their
            # thresholds must the token move.
            near = self.best[item] >= self.best[item].amax(0) - self.tolerance
            must = ((self.best[item] > self.threshold[:, None] + self.tolerance) | ~near).all(0)
            must &= self.best[item].amax(0) > NOTHING
        else:
            must = self.best[item, row] > self.threshold[row] + self.tolerance
        assert torch.all(moves[must & self.source_mask[item]]), (
            "a token above the threshold was left"
        )
