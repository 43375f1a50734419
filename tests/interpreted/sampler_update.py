"""Triton kernels of the sampler against the references, interpreted or not: run by tests/test_kernels_triton.py."""

import pytest
import torch
import triton
import triton.language as tl

from multibeta import ops
from multibeta.kernels import sampler_update as kernels

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
SEEDS = torch.tensor([3, 2**40 + 5, -1], device=DEVICE)
TOLERANCE = {"rtol": 1e-6, "atol": 2e-6}  # normals to 1e-6; a row sums six terms of size 1


@triton.jit
def _words(seeds_ptr, words_ptr, step, QUADS: tl.constexpr):
    quad = tl.arange(0, QUADS)
    words = kernels.philox(tl.load(seeds_ptr + tl.program_id(0)), quad.to(tl.uint32), tl.cast(step, tl.int64))
    for i in tl.static_range(4):
        tl.store(words_ptr + (tl.program_id(0) * 4 + i) * QUADS + quad, words[i].to(tl.int64))


def test_philox_words_equal_bit_for_bit():
    words = torch.empty(3, 4, 64, dtype=torch.int64, device=DEVICE)
    _words[(3,)](SEEDS, words, 917, QUADS=64)
    expected = ops.philox(SEEDS[:, None], (torch.arange(64, device=DEVICE)[None], 917, 0, 0))
    assert torch.equal(words, torch.stack(expected, dim=1))


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 5, 5), (1, 1, 1)])  # two programs; not a multiple of four; one position
def test_fresh_noise_equals_standard_normal(shape):
    zeros = torch.zeros(3, *shape, device=DEVICE)
    row = torch.tensor([0.0, 0, 0, 1, 0, 0, 0])
    noise = kernels.sampler_update(zeros, zeros, zeros, row, SEEDS, 917)
    torch.testing.assert_close(noise, ops.standard_normal(SEEDS, 917, shape), rtol=0, atol=1e-6)


def test_noise_of_a_sample_is_independent_of_its_batch():
    zeros, row = torch.zeros(3, 4, 9, 9, device=DEVICE), torch.tensor([0.0, 0, 0, 1, 0, 0, 0])
    together = kernels.sampler_update(zeros, zeros, zeros, row, SEEDS, 5)
    alone = kernels.sampler_update(zeros[:1], zeros[:1], zeros[:1], row, SEEDS[1:2], 5)
    assert torch.equal(alone[0], together[1])


def by_channel(row, channels):
    """A row for each channel: `row` times -1 to 1, so that the middle one of three draws no noise."""
    return row[..., None, :] * torch.linspace(-1, 1, channels).to(row)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("fresh", [0.0, 0.7])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_row_reads_the_heads_where_they_lie(dtype, history, fresh, per_channel, nan_empty):
    latent = torch.randn(3, 4, 5, 6, device=DEVICE)
    output = torch.randn(2, 3, 8, 5, 6, device=DEVICE).to(dtype)
    heads, previous = (o.contiguous(memory_format=torch.channels_last).chunk(2, dim=1) for o in output)
    row = torch.tensor([0.9, -0.3, 0.5, fresh, 0.2, -0.4, 0.6], dtype=torch.float64)
    if per_channel:
        row = by_channel(row, 4)
    expected = ops.find("sampler_update").reference(
        latent, *(h.float() for h in heads), row, SEEDS, 7, previous=[p.float() for p in previous] if history else None
    )
    actual = kernels.sampler_update(latent, *heads, row, SEEDS, 7, previous=previous if history else None)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 5, 5), (1, 1, 1)])  # two programs; not a multiple of four; one position
def test_equal_rows_of_the_channels_are_the_one_they_share(shape, nan_empty):
    latent, noise, delta, *previous = torch.randn(5, 3, *shape, device=DEVICE)
    row = torch.tensor([0.9, -0.3, 0.5, 0.7, 0.2, -0.4, 0.6], dtype=torch.float64)
    own = row.expand(shape[0], 7)
    results = [kernels.sampler_update(latent, noise, delta, r, SEEDS, 7, previous=tuple(previous)) for r in (row, own)]
    assert torch.equal(*results)


def step_tensors(shape, dtype, index, per_channel=False, heads=2):
    """The tensors of `ops.sampler_step`; evaluation 0 draws noise, 1 uses history, 2 is the last, which does neither.

    With one head the predictions of the first channel are not clipped.
    """
    rows = torch.tensor([[1.0, -0.3, 0.5, 0.7, 0, 0, 0.6], [1.0, -0.3, 0.5, 0.7, 0.2, -0.4, 0], [0.9, -0.3, 0.5, 0, 0, 0, -0.1]])
    if per_channel:
        rows = by_channel(rows, shape[0])
    output = torch.randn(3, heads * shape[0], *shape[1:]).to(dtype).contiguous(memory_format=torch.channels_last)
    network_input = torch.empty(3, *shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    channel_rows = torch.randn(3, shape[0], 9 if heads == 2 else 10)
    channel_rows[:, 1:, 8:9].abs_()
    channel_rows[:, :1, 8:9] = torch.inf
    tables = (rows, channel_rows, torch.tensor([917, 433, 0]), torch.tensor([index]))
    tensors = (torch.randn(3, *shape), network_input, torch.randn(2, 3, *shape), output, *tables)
    condition = (torch.randn(3, *shape, device=DEVICE),) if heads == 1 else ()
    return (*(t.to(DEVICE) for t in tensors), SEEDS, *condition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 5, 5), (1, 1, 1)])  # two programs; not a multiple of four; one position
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("heads", [2, 1])
def test_a_step_matches_the_reference(shape, index, dtype, per_channel, heads, nan_empty):
    tensors = step_tensors(shape, dtype, index, per_channel, heads)
    actual, expected = ([t.clone() for t in tensors] for _ in range(2))
    kernels.sampler_step(*actual)
    ops.find("sampler_step").reference(*expected)
    for i in (0, 2):
        torch.testing.assert_close(actual[i], expected[i], **TOLERANCE)
    # The interpreter cuts to bfloat16 where the reference rounds: one ulp.
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(actual[1], expected[1], rtol=ulp, atol=2e-5)
    assert all(torch.equal(a, t) for a, t in zip(actual[3:], tensors[3:], strict=True))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("heads", [2, 1])
def test_the_step_is_an_operator_that_says_what_it_mutates(per_channel, heads):
    tensors = step_tensors((3, 5, 5), torch.float32, 1, per_channel, heads)
    torch.library.opcheck(torch.ops.multibeta.sampler_step_triton, (*tensors, None)[:10])


def test_the_step_counts_as_a_change_of_what_it_overwrites():
    tensors = step_tensors((3, 5, 5), torch.float32, 1)
    kernels.sampler_step(*tensors)
    assert [t._version for t in tensors[:3]] == [1, 1, 1]
    with torch.inference_mode():
        kernels.sampler_step(*step_tensors((3, 5, 5), torch.float32, 1))


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_update_is_an_operator(per_channel, history):
    latent, noise, delta, *previous = torch.randn(5, 3, 4, 5, 5, device=DEVICE)
    row = [0.9, -0.3, 0.5, 0.7, 0.2, -0.4, 0.6]
    rows = ([], torch.tensor(row, device=DEVICE).repeat(4, 1)) if per_channel else (row, None)
    arguments = (latent, noise, delta, *(previous if history else (None, None)), *rows, SEEDS, 7)
    torch.library.opcheck(torch.ops.multibeta.sampler_update_triton, arguments)


def test_a_row_on_the_device_is_the_row_by_value():
    latent, noise, delta = torch.randn(3, 3, 4, 5, 5, device=DEVICE)
    row = torch.tensor([0.9, -0.3, 0.5, 0.7, 0, 0, 0.6])
    by_value, table = kernels._row(row, latent)
    assert by_value == row.tolist() and table is None
    meta = torch.empty(7, device="meta")  # stands for a device that reading a value would wait for
    by_value, table = kernels._row(meta, latent.to("meta"))
    assert by_value == [] and table.shape == (4, 7)
    results = [kernels.sampler_update(latent, noise, delta, r, SEEDS, 7) for r in (row, row.to(DEVICE))]
    assert torch.equal(*results)


def test_what_is_not_a_number_is_not_clipped_to_one():
    latent, network_input, _, output, *others = step_tensors((3, 5, 5), torch.float32, 0, heads=1)
    output[1, 2, 3, 4] = torch.nan
    kernels.sampler_step(latent, network_input, torch.zeros(2, 3, 3, 5, 5, device=DEVICE), output, *others)
    assert latent.isnan().sum() == 1 and latent[1, 2, 3, 4].isnan() and network_input[1, 2, 3, 4].isnan()


def test_the_ops_are_served_by_triton_when_asked():
    with ops.backend("triton"):
        for name in ("sampler_update", "sampler_step"):
            for arguments, keywords in ops.find(name).examples():
                moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
                keywords = {k: tuple(t.to(DEVICE) for t in v) for k, v in keywords.items()}
                assert ops.explain(name, *moved, **keywords).startswith(f"{name}: triton")


def test_calls_that_do_not_fit_are_declined_with_a_reason():
    latent, row = torch.randn(3, 4, 5, 5, device=DEVICE), torch.zeros(7)

    def reason(latent):
        return kernels.accepts_sampler_update(latent, latent, latent, row, SEEDS, 1)

    assert reason(latent) is None
    assert "contiguous float32" in reason(latent.double())
    assert "contiguous float32" in reason(latent.contiguous(memory_format=torch.channels_last))
    assert "gradients" in reason(latent.clone().requires_grad_())
    for wrong in (torch.zeros(5), torch.zeros(3, 7)):  # the latent has four channels
        found = kernels.accepts_sampler_update(latent, latent, latent, wrong, SEEDS, 1)
        assert found == f"row must be (7,) or (C, 7), got {tuple(wrong.shape)}"
    tensors = step_tensors((4, 5, 5), torch.float32, 0)
    assert kernels.accepts_sampler_step(*tensors) is None
    wrong = torch.zeros(3, 3, 7, device=DEVICE)
    found = kernels.accepts_sampler_step(*tensors[:4], wrong, *tensors[5:])
    assert found == "rows must be (S, 7) or (S, C, 7), got (3, 3, 7)"
    one_head = step_tensors((4, 5, 5), torch.float32, 0, heads=1)
    assert kernels.accepts_sampler_step(*one_head) is None
    found = kernels.accepts_sampler_step(*tensors, one_head[9])
    assert found == "channel_rows must be (S, C, 10) with a condition, got (3, 4, 9)"
    found = kernels.accepts_sampler_step(*one_head[:9], one_head[9].contiguous(memory_format=torch.channels_last))
    assert found == "history, condition or a table is not contiguous"
    assert "is not float32" in kernels.accepts_sampler_step(*one_head[:9], one_head[9].double())
