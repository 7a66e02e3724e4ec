"""The first estimate of adjoints at the ends of segments, from what is told of each segment, is that of all transitions."""

import pytest
import torch

from hbll_seq.engine.linearization.base import Diagonal, Identity, Zero


@pytest.mark.parametrize("composer", [Zero(), Identity(), Diagonal()], ids=lambda composer: composer.name)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n_segments", [1, 2, 4])
def test_ends_of_the_guess(composer, size, n_segments):
    draw = torch.Generator().manual_seed(0)
    shape = (n_segments * size, 2, 3)
    upstream, diagonal = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    given = diagonal if composer.needs_diagonal else None
    expected = composer.guess(upstream, given, size)[size - 1 :: size]
    segments = [t if t is None else t.unflatten(0, (n_segments, size)) for t in (upstream, given)]
    told = composer.told(*segments)
    assert len(told) == n_segments and torch.equal(told[:, 0], upstream[size - 1 :: size])
    torch.testing.assert_close(composer.guess_ends(told), expected, rtol=1e-12, atol=1e-12)
