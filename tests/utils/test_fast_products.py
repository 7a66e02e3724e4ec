"""Float32 products by oneDNN: float32 in full, and nothing else of torch's settings is touched."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hbll_seq.utils import fast_products as fp
from hbll_seq.utils.fast_products import fast_products

settings = fp._settings()
pytestmark = pytest.mark.skipif(settings is None, reason="this torch has no setting of oneDNN's products")


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(fp, "_is_exact", lambda: True)


def test_products_inside_are_float32():
    generator = torch.Generator().manual_seed(0)
    for n, k, m in ((1, 128, 4096), (33, 7, 129), (256, 4096, 128), (300, 200, 500)):
        a, b = torch.randn(n, k, generator=generator), torch.randn(k, m, generator=generator)
        with fast_products(a):
            product = a @ b
        torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=0, atol=1e-6 * k**0.5 * 5)


def test_the_setting_is_put_back(exact):
    before = settings.fp32_precision
    assert before != "bf16"
    with fast_products(torch.zeros(1)):
        assert settings.fp32_precision == "bf16"
        with fast_products(torch.zeros(1)):
            pass
        assert settings.fp32_precision == "bf16"
    assert settings.fp32_precision == before
    with pytest.raises(KeyError), fast_products(torch.zeros(1)):
        raise KeyError
    assert settings.fp32_precision == before


@pytest.mark.parametrize("like", [torch.zeros(1, dtype=torch.float64), torch.zeros(1, device="meta")])
def test_other_tensors_change_nothing(like, exact):
    before = settings.fp32_precision
    with fast_products(like):
        assert settings.fp32_precision == before


def test_autocast_and_an_older_torch_change_nothing(exact, monkeypatch):
    before = settings.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_products(torch.zeros(1)):
        assert settings.fp32_precision == before
    monkeypatch.setattr(fp, "_settings", lambda: None)
    with fast_products(torch.zeros(1)):
        assert settings.fp32_precision == before


class Rounding(TorchFunctionMode):
    """A processor whose float32 products are of bfloat16 numbers where that is allowed."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.matmul and args[0].dtype == torch.float32 and settings.fp32_precision == "bf16":
            return (args[0].bfloat16() @ args[1].bfloat16()).float()
        return function(*args, **(kwargs or {}))


def test_a_processor_that_rounds_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    before = settings.fp32_precision
    fp._is_exact.cache_clear()
    try:
        with Rounding():
            assert not fp._is_exact()
        with fast_products(torch.zeros(1)):
            assert settings.fp32_precision == before
    finally:
        fp._is_exact.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not fp._is_exact()
    fp._is_exact.cache_clear()
