"""Thoughts among token embeddings: where they lie, and how much of the same room they take."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest

NEIGHBOURS = 5
CELLS = 20  # per side of the grid on which densities are compared
Points = NDArray[np.float64]


@dataclass(frozen=True)
class Cloud:
    """Points in the two first principal components of the tokens that agents say; thoughts do not shape the plane.

    Attributes:
        vocabulary: All token embeddings, [tokens, 2].
        spoken: Those of the distinct tokens that agents said when the same edges carried text, [distinct, 2].
        thoughts: [thoughts, 2].
        explained: Shares of the spoken tokens' variance in the two components.
        coverage: Share of the spoken tokens that have a thought within the distance of their fifth-nearest spoken
            neighbour, in all dimensions (Naeem and others 2020, arXiv 2002.09797, equation 7): how much of what text
            says the thoughts reach.
        overlap: The room that thoughts and spoken tokens have in common, in the plane of the picture: the sum over a
            grid of the smaller of the two densities (overlapping coefficient, Inman and Bradley 1989). Tokens count as
            often as they were said.
        noise_coverage: Coverage by random directions, as many and as long as the thoughts.
        noise_overlap: Overlap with them.
    """

    vocabulary: Points
    spoken: Points
    thoughts: Points
    explained: tuple[float, float]
    coverage: float
    overlap: float
    noise_coverage: float
    noise_overlap: float

    @classmethod
    def of(cls, embeddings: Points, spoken_ids: Sequence[int], thoughts: Points, seed: int = 0) -> "Cloud":
        """Computes everything.

        Args:
            embeddings: The model's input embeddings, [tokens, hidden].
            spoken_ids: Every token that was said, repeated as often as it was.
            thoughts: [thoughts, hidden].
            seed: Of the noise.

        Raises:
            InvalidRequest: If there are no thoughts, or fewer than 6 distinct spoken tokens.
        """
        distinct = sorted(set(spoken_ids))
        if len(distinct) <= NEIGHBOURS or not len(thoughts):
            raise InvalidRequest(
                f"A picture of thoughts takes at least one and more than {NEIGHBOURS} distinct spoken tokens, not "
                f"{len(thoughts)} and {len(distinct)}; ask more questions."
            )
        middle = embeddings[distinct].mean(0)
        _, strengths, axes = np.linalg.svd(embeddings[distinct] - middle, full_matrices=False)
        shares = strengths**2 / (strengths**2).sum()

        def drawn(points: Points) -> Points:
            plane: Points = (points - middle) @ axes[:2].T
            return plane

        noise = np.random.default_rng(seed).standard_normal(thoughts.shape)
        noise *= np.linalg.norm(thoughts, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        said = drawn(embeddings[list(spoken_ids)])
        return cls(
            vocabulary=drawn(embeddings),
            spoken=drawn(embeddings[distinct]),
            thoughts=drawn(thoughts),
            explained=(float(shares[0]), float(shares[1])),
            coverage=coverage(embeddings[distinct], thoughts),
            overlap=overlap(said, drawn(thoughts)),
            noise_coverage=coverage(embeddings[distinct], noise),
            noise_overlap=overlap(said, drawn(noise)),
        )


def coverage(reached: Points, by: Points, neighbours: int = NEIGHBOURS) -> float:
    """Share of `reached` with a point of `by` no further off than their `neighbours`-nearest fellow.

    Args:
        reached: [n, dimensions], more than `neighbours`.
        by: [m, dimensions].
        neighbours: Which fellow.
    """
    reach = np.sort(_distances(reached, reached), axis=1)[:, neighbours]  # the first is the point itself
    return float((_distances(reached, by).min(axis=1) <= reach).mean())


def overlap(ones: Points, others: Points, cells: int = CELLS) -> float:
    """What two densities in the plane have in common: 0 nothing, 1 everything.

    Args:
        ones: [n, 2].
        others: [m, 2].
        cells: Per side of the grid, which spans both.
    """
    low, high = np.minimum(ones.min(0), others.min(0)), np.maximum(ones.max(0), others.max(0))
    spans = [(a, b) if a < b else (a - 0.5, b + 0.5) for a, b in zip(low, high, strict=True)]
    densities = [np.histogram2d(points[:, 0], points[:, 1], cells, spans)[0] / len(points) for points in (ones, others)]
    return float(np.minimum(*densities).sum())


def _distances(ones: Points, others: Points) -> Points:
    squares = (ones**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * ones @ others.T
    distances: Points = np.sqrt(np.maximum(squares, 0))
    return distances
