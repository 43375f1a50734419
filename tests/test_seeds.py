import numpy as np
import pytest
import torch

from multibeta.ops import sample_seeds, standard_normal
from multibeta.seeds import as_seed, as_seeds

NO_INTEGERS = (1.5, 1.0, None, "3", True, [3], np.float32(2), np.bool_(True), torch.tensor(2.0), torch.tensor(True), 1j)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, 0),
        (-1, -1),
        (2**63 - 1, 2**63 - 1),
        (2**63, -(2**63)),
        (2**64 - 1, -1),
        (2**64 + 7, 7),
        (-(2**63) - 1, 2**63 - 1),
        (10**30, (10**30 + 2**63) % 2**64 - 2**63),
        (np.int32(5), 5),
        (np.uint64(2**64 - 1), -1),
        (torch.tensor(5), 5),
    ],
)
def test_any_integer_is_a_seed_of_which_64_bits_count(seed, expected):
    assert as_seed(seed) == expected and type(as_seed(seed)) is int
    assert as_seeds([seed]).tolist() == [expected]
    indices = torch.arange(3)
    assert torch.equal(sample_seeds(seed, indices), sample_seeds(expected, indices))


@pytest.mark.parametrize("seed", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused_by_name(seed):
    for take in (as_seed, lambda seed: as_seeds([seed]), lambda seed: sample_seeds(seed, torch.arange(2))):
        with pytest.raises(ValueError, match=r"a seed must be an integer .*got "):
            take(seed)


def test_seeds_of_samples_are_integers_of_any_kind():
    expected = torch.tensor([3, -1, 2**40])
    for seeds in ([3, 2**64 - 1, 2**40], (3, -1, 2**40), np.array([3, -1, 2**40]), expected, iter((3, -1, 2**40))):
        assert torch.equal(as_seeds(seeds), expected)
    assert torch.equal(as_seeds(np.array([2**64 - 1], dtype=np.uint64)), torch.tensor([-1]))
    assert torch.equal(as_seeds(torch.tensor([5], dtype=torch.uint8)), torch.tensor([5]))
    assert as_seeds(range(3)).tolist() == [0, 1, 2] and as_seeds([]).shape == (0,)


@pytest.mark.parametrize("seeds", [torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(2) * 1j], ids=str)
def test_tensors_of_other_numbers_are_refused(seeds):
    with pytest.raises(ValueError, match=f"seeds must be integers, got {seeds.dtype}"):
        as_seeds(seeds)
    with pytest.raises(ValueError, match=f"seeds must be integers, got {seeds.dtype}"):
        standard_normal(seeds, 0, (4,))


def test_one_number_is_no_row_of_seeds():
    with pytest.raises(ValueError, match="seeds must be integers, one for each sample, got 3"):
        as_seeds(3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_noise_does_not_depend_on_the_kind_of_integer(dtype):
    seeds = torch.tensor([3, 77])
    assert torch.equal(standard_normal(seeds.to(dtype), 5, (2, 3)), standard_normal(seeds, 5, (2, 3)))
