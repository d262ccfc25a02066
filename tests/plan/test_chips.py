"""Names of hardware."""

import pytest

from tda.plan import chips


@pytest.mark.parametrize(
    ("name", "title", "count"),
    [
        ("v5p-256", "128 × TPU v5p (256 TensorCores)", 128),
        ("v4-32", "16 × TPU v4 (32 TensorCores)", 16),
        ("v5px256", "256 × TPU v5p (512 TensorCores)", 256),
        ("v5e-64", "64 × TPU v5e", 64),
        ("v5litepod-64", "64 × TPU v5e", 64),
        ("v6e-256", "256 × TPU v6e", 256),
        ("h200x8", "8 × H200", 8),
        ("H100-8", "8 × H100", 8),
        ("a100-80", "1 × A100 80 GB", 1),
        ("a100-80x16", "16 × A100 80 GB", 16),
        ("a100-40-4", "4 × A100 40 GB", 4),
        ("b200", "1 × B200", 1),
    ],
)
def test_what_a_name_stands_for(name, title, count):
    """A slice of v4 or v5p is named by its TensorCores, two to a chip, one of v5e by its chips."""
    found = chips.parse(name)
    assert (found.title, found.chips) == (title, count)


@pytest.mark.parametrize(
    "name", ["h300x8", "x8", "h200 x8", "h200x", "a100x8", "v5p-", "", "8xh100"]
)
def test_an_unknown_name_is_told_with_those_there_are(name):
    with pytest.raises(ValueError, match="unknown hardware .*v4, v5e, v5p, .*h100, h200, b200"):
        chips.parse(name)


@pytest.mark.parametrize(("name", "counted"), [("v5p-255", "TensorCores"), ("h200x0", "chips")])
def test_an_impossible_number_is_told(name, counted):
    with pytest.raises(ValueError, match=f"'{name}' has .* {counted}.*no such hardware"):
        chips.parse(name)


def test_figures_are_in_plain_units():
    """FLOP/s, bytes, bytes/s: a unit that slipped would be off by a thousand."""
    for chip in chips.CHIPS.values():
        assert 1e14 < chip.bfloat16 < 3e15
        assert chip.bfloat16 / 35 < chip.float32 < chip.bfloat16 / 5
        assert 16 * 2**30 <= chip.memory < 200 * 2**30
        assert 100 <= chip.host.cpus <= 256 and 1.9e11 <= chip.host.memory <= 2e12
    assert chips.CHIPS["v5p"].bfloat16 == 459e12 and chips.CHIPS["v5p"].memory == 95 * 2**30


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_what_jax_calls_a_chip(kind, name):
    assert chips.of_device(kind) is chips.CHIPS[name]


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "cpu", "TPU v5x"])
def test_a_chip_of_other_figures_is_none(kind):
    assert chips.of_device(kind) is None
