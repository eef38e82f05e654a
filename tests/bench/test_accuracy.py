"""The rule for accuracy: exact values, what it refuses, and planted faults that it catches in every dtype."""

import math

import pytest
import torch

from dream_fast.bench.accuracy import BLOCK, check, check_fp64, check_together, error, tolerance

MILLION = 1_000_000
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_roundings(exact, dtype):
    """`exact` rounded to `dtype`, and three times its rounded third: equally accurate, with different errors."""
    return (exact / 3).to(dtype).double() * 3, exact.to(dtype)


def test_error_is_the_relative_norm():
    """Up to a block the error is the norm of the deviation over the norm of the exact values."""
    assert error(tensor(3, 4.5), tensor(3, 4)) == 0.5 / 5
    assert error(tensor(3, 4), tensor(3, 4)) == 0


def test_error_of_two_dimensions():
    """Neither the shape nor a transposed layout changes the error."""
    exact = numbers(7, 11)
    got = exact + 0.1 * numbers(7, 11, seed=1)
    assert error(got, exact) == error(got.flatten(), exact.flatten())
    assert error(got.t().contiguous().t(), exact) == error(got, exact)


@pytest.mark.parametrize("size", [BLOCK, BLOCK + 1, 10 * BLOCK + 3])
@pytest.mark.parametrize("at", [0, -1])
def test_error_of_one_element_in_a_block(size, at):
    """Beyond a block, the error of one element depends neither on the number of others nor on its position."""
    exact = torch.ones(size, dtype=torch.float64)
    got = exact.clone()
    got[at] += 0.5
    assert error(got, exact) == 0.5 / math.sqrt(BLOCK)


def test_error_of_zeros_is_absolute():
    """Against zeros the error is the root of the mean square of the deviation."""
    assert error(tensor(0, 0), tensor(0, 0)) == 0
    assert error(tensor(0, 0, 0, 3), tensor(0, 0, 0, 0)) == 1.5


def test_error_of_nothing_is_zero():
    """Empty tensors are equal."""
    assert error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    assert check("empty", *[torch.zeros(0)] * 3) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_error_not_finite(value):
    """A NaN or infinity is never accurate, even with a weight of zero."""
    got = tensor(1, 2, value)
    assert error(got, tensor(1, 2, 3)) == math.inf
    assert error(got, tensor(1, 2, 3), weight=tensor(1, 1, 0)) == math.inf
    with pytest.raises(AssertionError, match="error inf"):
        check("sigma", got, tensor(1, 2, 3), tensor(1, 2, 3))


def test_error_other_shape():
    """A shape that would broadcast, or has the same number of elements, is wrong."""
    assert error(torch.ones(3, 1), torch.ones(3)) == math.inf
    assert error(torch.ones(1), torch.ones(3)) == math.inf
    assert error(torch.ones(0), torch.ones(3)) == math.inf


def test_tolerance_factor_and_floor():
    """The factor and the floor are exact."""
    exact = tensor(3, 4)
    assert tolerance(exact, exact) == 1e-6
    assert tolerance(tensor(3, 4.5), exact) == 2 * 0.1 + 1e-6


def test_check_at_the_tolerance():
    """An error on the border passes, the next number fails."""
    exact, reference = tensor(1, 0), tensor(1, 2.0**-10)
    border = 2 * 2.0**-10 + 1e-6
    assert check("on the border", tensor(1, border), reference, exact) == border
    with pytest.raises(AssertionError, match="beyond: error 0.00195, allowed 0.00195"):
        check("beyond", tensor(1, math.nextafter(border, 1)), reference, exact)


@pytest.mark.parametrize("reference", [tensor(1, math.nan), tensor(1, math.inf), tensor(1, 2, 3)])
def test_tolerance_of_broken_reference(reference):
    """A reference that is not finite or has another shape is refused instead of allowing everything."""
    with pytest.raises(AssertionError, match="reference must be finite"):
        check("sigma", tensor(1, 2), reference, tensor(1, 2))


def test_error_refuses_nan_in_exact():
    """Nothing is compared with NaN, since no error is larger than NaN."""
    with pytest.raises(AssertionError, match="exact and weight must be finite"):
        error(tensor(1, 2), tensor(1, math.nan))
    with pytest.raises(AssertionError, match="exact and weight must be finite"):
        error(tensor(1, 2), tensor(1, 2), weight=tensor(1, math.inf))


def test_error_weighted():
    """A column of weights broadcasts over rows, in the error and in the tolerance."""
    exact, got = torch.tensor([[3.0, 4], [6, 8]]), torch.tensor([[3.0, 4.5], [6, 10]])
    weight = torch.tensor([[1.0], [0.0]])
    assert error(got, exact, weight) == 0.5 / 5
    assert tolerance(got, exact, weight) == 2 * 0.1 + 1e-6
    assert error(got, exact, 2 * weight) == error(got, exact, weight)


def test_weight_of_ill_conditioned_element():
    """Without its weight one near-zero direction of the reference would allow a wrong direction elsewhere."""
    gradient = numbers(100, 3)
    gradient[0] *= 1e-7
    length = gradient.norm(dim=1, keepdim=True)
    exact, noise = gradient / length, 1e-7 * numbers(100, 3, seed=1)
    reference = torch.nn.functional.normalize(gradient + noise)
    wrong = reference.clone()
    wrong[50] = -wrong[50]
    with pytest.raises(AssertionError):
        check("normal", wrong, reference, exact, length)
    other = torch.nn.functional.normalize(gradient + 1e-7 * numbers(100, 3, seed=2))
    check("normal", other, reference, exact, length)


def test_check_fp64_tolerance():
    """An error of 1e-6 passes and a larger one fails; numbers in fp32 are refused, even where they are right."""
    exact = tensor(1, 0)
    assert check_fp64("on the border", tensor(1, 1e-6), exact) == 1e-6
    with pytest.raises(AssertionError, match="beyond: error 1.1e-06, allowed 1e-06"):
        check_fp64("beyond", tensor(1, 1.1e-6), exact)
    with pytest.raises(AssertionError, match="single: got must be float64, is torch.float32"):
        check_fp64("single", exact.float(), exact)


def test_check_together_takes_the_worst():
    """A reference right by luck in one tensor of a result is judged by the others; a wrong tensor still fails."""
    exact = [tensor(1, 0), tensor(2, 0)]
    reference = [tensor(1, 0), tensor(2, 0.02)]
    assert check_together("layers", [tensor(1, 0.01), tensor(2, 0)], reference, exact) == 0.01
    with pytest.raises(AssertionError, match="layers: error 0.03, allowed 0.02"):
        check_together("layers", [tensor(1, 0.03), tensor(2, 0)], reference, exact)


def test_check_together_missing_tensor():
    """A missing tensor is an error instead of being left out."""
    with pytest.raises(ValueError):
        check_together("layers", [tensor(1)], [tensor(1), tensor(2)], [tensor(1), tensor(2)])


def test_weights_reach_every_check():
    """With a weight of 0 every function accepts a wrong element, and a wrong reference allows nothing."""
    exact, wrong, weight = tensor(1, 1), tensor(1, 5), tensor(1, 0)
    assert check_fp64("one", wrong, exact, weight) == 0
    assert check("one", wrong, exact, exact, weight) == 0
    assert check_together("two", [exact, wrong], [exact, exact], [exact, exact], [None, weight]) == 0
    with pytest.raises(AssertionError, match="two: error 1, allowed 1e-06"):
        check_together("two", [exact, tensor(2, 1)], [exact, wrong], [exact, exact], [None, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [100, 3000, MILLION])
def test_check_other_rounding(dtype, size):
    """Two computations of the same numbers in one dtype pass, whichever of them is the reference."""
    for seed in range(20 if size < MILLION else 1):
        exact = numbers(size, seed=seed)
        one, other = two_roundings(exact, dtype)
        check("one", one, other, exact)
        check("other", other, one, exact)


def shifted_element(image):
    image[317, 5, 1] += 0.5


def masked_element(image):
    image[-1, -1, -1] = 0


def one_ray(image):
    image[211, 300] = image[211, 301].clone()


def masked_block(image):
    image[100, 64:128] = 0


def stale_tail(image):
    image[-1, -3:] = image[0, :3].clone()


def scaled(image):
    image *= 1.001


FAULTS = [shifted_element, masked_element, one_ray, masked_block, stale_tail]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_among_a_million(fault, dtype):
    """A wrong element, ray or block of an image of 1.2 million numbers fails, though most of it is right."""
    exact = numbers(640, 640, 3)
    reference, got = two_roundings(exact, dtype)
    fault(got)
    with pytest.raises(AssertionError):
        check(fault.__name__, got, reference, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_planted_factor(dtype):
    """A constant factor of 1.001 fails in the dtypes that round to less (bf16 rounds by 1/512)."""
    exact = numbers(640, 640, 3)
    reference, got = two_roundings(exact, dtype)
    scaled(got)
    with pytest.raises(AssertionError):
        check("scaled", got, reference, exact)
