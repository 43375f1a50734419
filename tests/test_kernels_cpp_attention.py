"""The C++ attention is the reference in float64 up to rounding, wherever the scores lie."""

import math

import pytest
import torch

from multibeta import ops
from multibeta.kernels import cpp

# a missing compiler is the user's right; with one, a failing build is our fault
if reason := cpp.load():
    if not reason.startswith(("no C++ compiler", "ninja not found", "MULTIBETA_NO_BUILD")):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)

REFERENCE = ops.find("attention").reference

SHAPES = {  # (N, L, heads, head_dim)
    "usual": (2, 64, 4, 32),
    "the head of a small U-Net": (2, 256, 2, 8),
    "odd length over several blocks of queries and keys": (1, 147, 2, 16),
    "odd length within one vector": (2, 7, 3, 8),
    "one key": (2, 1, 2, 16),
    "one head": (2, 33, 1, 40),
    "odd head_dim": (2, 21, 2, 3),
    "odd head_dim beyond a vector": (1, 50, 2, 37),
    "one channel": (1, 19, 2, 1),
    "wide": (1, 17, 1, 256),
    "two key blocks and a tail": (1, 129, 1, 64),
}
DTYPES = (torch.float32, torch.bfloat16)
# measured, of the largest value: 1.2e-6, and 6e-3 from weights and results of 8 bits
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7}


def example(shape, dtype=torch.float32, scale=1.0):
    """Query, key and value as views of one projection, query and key times `scale`."""
    n, length, heads, head_dim = shape
    projected = torch.randn(n, length, 3, heads, head_dim)
    projected[:, :, :2] *= scale
    return projected.to(dtype).unbind(2)


def assert_close(actual, tensors, dtype, factor=1.0):
    exact = REFERENCE(*(tensor.double() for tensor in tensors))
    worst = ((actual.double() - exact).abs().max() / exact.abs().max()).item()
    assert worst <= factor * TOLERANCE[dtype], f"error {worst:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, dtype, nan_empty):
    tensors = example(shape, dtype)
    actual = cpp.attention(*tensors)
    assert cpp.accepts_attention(*tensors) is None
    assert actual.dtype == dtype and actual.shape == shape and actual.is_contiguous()
    assert_close(actual, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_the_other_dimensions(dtype):
    heads_first = torch.randn(3, 2, 3, 37, 8).to(dtype).transpose(2, 3).unbind()
    odd_rows = [torch.randn(2, 37, 3, 11).to(dtype)[..., 1:9] for _ in range(3)]
    for tensors in (heads_first, odd_rows):
        assert cpp.accepts_attention(*tensors) is None
        assert_close(cpp.attention(*tensors), tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [30, 200, 1e4])
def test_large_scores(dtype, score):
    # a score of 1e4 is rounded by up to 5e-4 in float32, and its weight with it
    tensors = example((2, 75, 2, 16), dtype, math.sqrt(score / 4))
    assert_close(cpp.attention(*tensors), tensors, dtype, max(1.0, score / 50) if dtype == torch.float32 else 1.0)


def test_all_scores_low():
    """Softmax does not see a shift of all scores, nor may keys that pad the last tile raise their maximum."""
    query, key, value = example((1, 21, 1, 8))
    query, shift = torch.full_like(query, 30.0), torch.full_like(key, -100.0)
    scores = (query * (key + shift)).sum(-1) / math.sqrt(8)
    assert scores.max() < -5000
    assert_close(cpp.attention(query, key + shift, value), (query, key + shift, value), torch.float32, 100)


def test_equal_keys_average_the_values():
    query, key, value = example((1, 45, 2, 8))
    key = key[:, :1].expand_as(key)
    mean = value.mean(1, keepdim=True).expand_as(value)
    torch.testing.assert_close(cpp.attention(query, key, value), mean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_what_it_should(dtype):
    query, key, value = (tensor.contiguous() for tensor in example((2, 40, 2, 8), dtype))
    query[0, 5, 1, 2] = key[1, 3, 0, 0] = value[1, 7, 1, 4] = math.nan
    expected = torch.zeros(2, 40, 2, 8, dtype=torch.bool)
    expected[0, 5, 1] = True  # its query only
    expected[1, :, 0] = True  # every query of the key's head
    expected[1, :, 1, 4] = True  # every query, in the value's channel
    assert torch.equal(cpp.attention(query, key, value).isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_in_any_batch_and_with_any_threads(dtype):
    tensors = example((3, 150, 2, 16), dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([cpp.attention(*(tensor[n : n + 1] for tensor in tensors)) for n in range(3)])
        results = [cpp.attention(*tensors)]
        torch.set_num_threads(3)
        results.append(cpp.attention(*tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, alone) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(dtype):
    torch.library.opcheck(torch.ops.multibeta.attention_cpp, example((2, 9, 2, 8), dtype))


def test_compiles_whole():
    tensors = example((2, 9, 2, 8))
    compiled = torch.compile(lambda *tensors: cpp.attention(*tensors) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), cpp.attention(*tensors) * 2)


def test_declines_with_a_reason():
    query, key, value = example((2, 9, 2, 8))
    assert "no backward" in cpp.accepts_attention(query.clone().requires_grad_(), key, value)
    with torch.no_grad():
        assert cpp.accepts_attention(query.clone().requires_grad_(), key, value) is None
    assert "float64" in cpp.accepts_attention(query.double(), key, value)
    assert "one dtype" in cpp.accepts_attention(query.bfloat16(), key, value)
    assert "one shape" in cpp.accepts_attention(query, key[:, :3], value[:, :3])
    assert "stride 1" in cpp.accepts_attention(query.transpose(1, 3), key.transpose(1, 3), value.transpose(1, 3))
    assert "at most 256" in cpp.accepts_attention(*example((1, 2, 1, 257)))
    assert "meta" in cpp.accepts_attention(query.to("meta"), key, value)


def test_the_operator_refuses_what_it_cannot_serve():
    query, key, value = example((2, 9, 2, 8))
    with pytest.raises(RuntimeError, match="must be"):
        torch.ops.multibeta.attention_cpp(query, key[:, :3], value)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.multibeta.attention_cpp(query.double(), key.double(), value.double())
    with pytest.raises(RuntimeError, match="head_dim"):
        torch.ops.multibeta.attention_cpp(*example((1, 2, 1, 257)))
