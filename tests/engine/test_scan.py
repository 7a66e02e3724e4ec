"""The associative scan against one map after the other."""

import pytest
import torch

from hbll_seq.engine.scan import affine_scan, sequential_scan


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 15, 16, 17, 63, 64, 65, 137, 700])
@pytest.mark.parametrize("kind", ["zero", "identity", "diagonal"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_scan_is_the_sequence(kind, length, with_initial, reverse, dtype, tolerance):
    torch.manual_seed(length)
    b = torch.randn(length, 2, 3, dtype=torch.float64)
    a = {"zero": 0.0, "identity": 1.0, "diagonal": torch.rand(length, 2, 3, dtype=torch.float64)}[kind]
    initial = torch.randn(2, 3, dtype=torch.float64) if with_initial else None
    rounded = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in (b, a, initial)]
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in rounded]
    result = affine_scan(*rounded, reverse=reverse)
    expected = sequential_scan(*exact, reverse=reverse)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def test_bad_factors_are_named():
    with pytest.raises(ValueError, match="a=0.5"):
        affine_scan(torch.zeros(3, 2), 0.5)
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(3, 2\)"):
        affine_scan(torch.zeros(3, 2), torch.zeros(3, 1))
