import threading
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import vmap

from multibeta.kernels import attention
from multibeta.kernels.probes import constant, first_line, probe


@pytest.fixture
def kind():
    """A probe of a number: the types of tensors that it met."""

    @probe
    def kind(number: int) -> str:
        kind.asked.append(number)
        tensor = torch.ones(number) + 1
        assert tensor.tolist() == [2] * number and tensor.dtype == torch.float32
        return type(tensor).__name__

    kind.asked = []
    return kind


def test_is_asked_once_for_each_arguments(kind):
    assert [kind(1), kind(2), kind(1)] == ["Tensor"] * 3
    assert kind.asked == [1, 2]
    kind.cache_clear()
    assert kind(1) == "Tensor" and kind.asked == [1, 2, 1]


def test_meets_real_tensors_whatever_the_mode_of_the_caller(kind):
    answers = []
    with FakeTensorMode():
        answers.append(kind(1))
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        answers.append(kind(2))
    vmap(lambda x: answers.append(kind(3)) or x)(torch.ones(2))
    compiled = torch.compile(lambda x: x + 1 if kind(4) == "Tensor" else x, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1
    assert answers == ["Tensor"] * 3 and kind.asked == [1, 2, 3, 4]


def test_an_error_is_raised_and_not_remembered():
    asked = []

    @probe
    def fails() -> None:
        asked.append(threading.current_thread())
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            fails()
    assert len(asked) == 2 and threading.current_thread() not in asked


def test_a_constant_method_may_change_what_is_traced_after_it():
    class Late:
        value = None

        @constant
        def load(self) -> None:
            self.value = 3

    late = Late()

    def run(x):
        late.load()
        return x * late.value

    assert torch.compile(run, fullgraph=True, backend="eager")(torch.ones(1)).item() == 3


def test_the_first_line_of_an_error():
    assert first_line(RuntimeError("\nfirst\nsecond")) == "first"
    assert first_line(NotImplementedError()) == "NotImplementedError"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA has reasons")
def test_libraries_for_cuda_have_a_reason_where_there_is_none():
    with FakeTensorMode():
        query = torch.empty(1, 16, 1, 8, device="cuda")
        reasons = [attention.pinned_sdpa(name)[1](query, query, query) for name in attention.SDPA_BACKENDS]
        assert all(reasons) and attention.accepts_xformers(query, query, query)
        assert attention.accepts_sdpa(query, query, query) is None


def test_what_serves_attention_is_asked_for_each_kind_of_call():
    """Backends differ in head dimension and dtype, which autocast changes; cuDNN cannot take one position alone."""
    device = torch.device("cpu")

    def case(length, dtype=torch.float32, wants_gradient=False, autocast=False):
        query = torch.empty(1, length, 1, 20, dtype=dtype, requires_grad=wants_gradient)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return attention._case(query, query, query)

    assert case(16) == case(64) == (device, torch.float32, 20, True, False)
    assert case(1) == (device, torch.float32, 20, False, False)
    assert case(16, torch.float16) == (device, torch.float16, 20, True, False)
    assert case(16, wants_gradient=True, autocast=True) == (device, torch.bfloat16, 20, True, True)
    assert case(16, torch.float64, autocast=True) == (device, torch.float64, 20, True, False)
    with torch.no_grad():
        assert case(16, wants_gradient=True) == case(16)


@pytest.mark.filterwarnings("error")
def test_a_backend_is_asked_for_gradients_where_they_are_wanted_and_torch_does_not_warn():
    def attention_without_gradients(query, key, value):
        warnings.warn("why not, in several lines", stacklevel=1)
        assert not query.requires_grad, "no gradients\nmore"
        return query

    asked = (torch.device("cpu"), torch.float32, 8, True)
    assert attention._failure(attention_without_gradients, *asked, False) is None
    assert attention._failure(attention_without_gradients, *asked, True).startswith("no gradients")
