import contextlib
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import multibeta
from multibeta import ops
from multibeta.ops import Kernel, backend, philox, registry, sample_seeds, standard_normal


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def no_kernels(monkeypatch):
    for op in ops.all_ops():
        monkeypatch.setattr(op, "kernels", [])
        monkeypatch.setattr(op, "pins", {})


@pytest.fixture
def toy_kernel(no_kernels):
    """A registered "triton" attention that returns zeros and declines odd lengths."""
    ops.register(
        "attention",
        Kernel(
            "triton",
            lambda query, key, value: torch.zeros_like(value),
            lambda query, key, value: "lengths must be even" if query.shape[1] % 2 else None,
        ),
    )


class TestNoise:
    @pytest.mark.parametrize(
        ("key", "counter", "words"),
        [
            (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                0x299F31D0_A4093822,
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    def test_philox_equals_the_published_vectors(self, key, counter, words):
        assert tuple(int(word) for word in philox(torch.tensor(key), counter)) == words

    def test_noise_is_the_box_muller_transform_of_philox(self):
        seed, step, stream = torch.tensor([-9]), 3, 2
        noise = standard_normal(seed, step, (2, 4), stream=stream).view(2, 4)
        for block in range(2):
            u = [(int(word) >> 8) / 2**24 for word in philox(seed[0], (block, step, stream, 0))]
            for radius, angle, pair in ((u[0], u[1], noise[block, :2]), (u[2], u[3], noise[block, 2:])):
                length = math.sqrt(-2 * math.log(radius + 2**-24))
                expected = [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
                assert pair.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)

    def test_noise_of_a_sample_does_not_depend_on_its_batch(self):
        seeds = torch.tensor([3, -5, 2**62, 7, 0])
        together = standard_normal(seeds, 41, (2, 3, 5))
        for index in range(len(seeds)):
            assert torch.equal(standard_normal(seeds[index : index + 1], 41, (2, 3, 5))[0], together[index])

    def test_noise_at_a_position_does_not_depend_on_the_shape(self):
        seeds = torch.arange(3)
        whole = standard_normal(seeds, 1, (4, 3, 3))
        assert torch.equal(standard_normal(seeds, 1, (10,)), whole.flatten(1)[:, :10])

    @pytest.mark.parametrize("changed", [{"seed": 1}, {"seed": 2**32}, {"step": 1}, {"stream": 1}])
    def test_noise_of_other_seeds_steps_and_streams_is_uncorrelated(self, changed):
        def noise(seed=0, step=0, stream=0):
            return standard_normal(torch.tensor([seed]), step, (100_000,), stream=stream)[0].double()

        a, b = noise(), noise(**changed)
        assert not torch.equal(a, b)
        for power in (1, 2):
            correlation = torch.corrcoef(torch.stack([a**power, b**power]))[0, 1]
            assert abs(correlation) < 4 / math.sqrt(len(a))

    def test_noise_is_standard_normal_and_independent_over_positions(self):
        noise = standard_normal(torch.arange(1000), 5, (1000,)).double()
        count = noise.numel()
        assert abs(noise.mean()) < 4 * math.sqrt(1 / count)
        assert abs(noise.square().mean() - 1) < 4 * math.sqrt(2 / count)
        assert abs(noise.pow(3).mean()) < 4 * math.sqrt(15 / count)
        assert abs(noise.pow(4).mean() - 3) < 4 * math.sqrt(96 / count)
        for lag in (1, 2, 3, 4):  # within a Philox block and across
            products = noise[:, lag:] * noise[:, :-lag]
            assert abs(products.mean()) < 4 / math.sqrt(products.numel())
            energies = (noise[:, lag:].square() - 1) * (noise[:, :-lag].square() - 1)
            assert abs(energies.mean()) < 4 * 2 / math.sqrt(energies.numel())

    def test_every_sample_has_its_own_seed(self):
        seeds = sample_seeds(0, torch.arange(100_000))
        assert len(seeds.unique()) == len(seeds)
        assert torch.equal(sample_seeds(0, torch.arange(7, 10)), seeds[7:10])
        assert not torch.isin(sample_seeds(-3, torch.arange(1000)), seeds).any()


class TestGroupNormAct:
    @pytest.mark.parametrize("activation", ["sigmoid", "silu", "none"])
    @pytest.mark.parametrize("shifted", [True, False])
    def test_equals_the_composition_of_torch_functions(self, activation, shifted):
        x, shift, weight, bias = rand(2, 6, 3, 5), rand(2, 6, seed=1), rand(6, seed=2), rand(6, seed=3)
        pointwise = {"sigmoid": torch.sigmoid, "silu": F.silu, "none": lambda h: h}[activation]
        moved = x + shift[:, :, None, None] if shifted else x
        groups = moved.reshape(2, 3, -1)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True)
        normalised = ((groups - mean) / (variance + 1e-3).sqrt()).reshape(x.shape)
        expected = pointwise(normalised * weight[:, None, None] + bias[:, None, None])
        result = ops.group_norm_act(x, weight, bias, 3, 1e-3, shift=shift if shifted else None, activation=activation)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("activation", ["sigmoid", "silu", "none"])
    def test_all_gradients_are_right(self, activation):
        inputs = [rand(2, 4, 2, 3), rand(4, seed=1), rand(4, seed=2), rand(2, 4, seed=3)]
        for tensor in inputs:
            tensor.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, weight, bias, shift: ops.group_norm_act(x, weight, bias, 2, shift=shift, activation=activation),
            inputs,
        )

    def test_the_embedding_acts_before_the_norm(self):
        x, weight, bias = rand(1, 4, 3, 3), torch.ones(4).double(), torch.zeros(4).double()
        plain = ops.group_norm_act(x, weight, bias, 1, activation="none")
        for scale in (3.0, 1e6):  # a shift common to a whole group is normalised away
            shifted = ops.group_norm_act(x, weight, bias, 1, shift=torch.full((1, 4), scale), activation="none")
            torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-8)

    def test_keeps_the_dtype(self):
        x = rand(1, 4, 3, 3, dtype=torch.bfloat16)
        weight, bias = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)
        assert ops.group_norm_act(x, weight, bias, 2, shift=torch.ones(1, 4)).dtype == torch.bfloat16

    def test_is_traced_without_graph_breaks(self):
        x, weight, bias = rand(1, 4, 3, 3, dtype=torch.float32), torch.ones(4), torch.zeros(4)
        compiled = torch.compile(ops.group_norm_act, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, weight, bias, 2), ops.group_norm_act(x, weight, bias, 2))

    def test_unknown_activation_and_impossible_groups(self):
        x, affine = rand(1, 6, 2, 2), torch.ones(6)
        with pytest.raises(ValueError, match=r"sigmoid, silu, none, got 'relu'"):
            ops.group_norm_act(x, affine, affine, 3, activation="relu")
        with pytest.raises(ValueError, match="6 channels and 4 groups"):
            ops.group_norm_act(x, affine, affine, 4)


def test_a_pair_is_normalised_as_its_concatenation():
    x, beside, weight, bias, shift = (
        rand(2, 4, 3, 5),
        rand(2, 2, 3, 5, seed=1),
        rand(6, seed=2),
        rand(6, seed=3),
        rand(2, 6, seed=4),
    )
    for groups in (1, 2, 3):  # with two groups one lies across the boundary
        result = ops.group_norm_act_pair(x, beside, weight, bias, groups, shift=shift, activation="silu")
        whole = ops.group_norm_act(torch.cat([x, beside], dim=1), weight, bias, groups, shift=shift, activation="silu")
        torch.testing.assert_close(result, whole, rtol=1e-12, atol=1e-12)


def test_attention_equals_scaled_dot_product_attention():
    query, key, value = (rand(2, 7, 3, 5, dtype=torch.float32, seed=s) for s in range(3))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)
    torch.testing.assert_close(ops.attention(query, key, value), expected, rtol=1e-5, atol=1e-6)


def test_attention_survives_scores_beyond_the_range_of_exp():
    query, key, value = (rand(1, 4, 1, 8, dtype=torch.float32, seed=s) for s in range(3))
    assert ops.attention(1e4 * query, key, value).isfinite().all()


def test_sampler_update_is_one_row():
    latent, noise, delta, old_noise, old_delta = rand(5, 2, 1, 2, 3)
    row, seeds = torch.tensor([0.9, -0.3, 5, 0.1, 0.2, -2.0, 0.6], dtype=torch.float64), torch.tensor([4, 9])
    fresh = standard_normal(seeds, 17, (1, 2, 3)).double()
    expected = 0.9 * latent - 0.3 * noise + 5 * delta + 0.1 * fresh + 0.2 * old_noise - 2 * old_delta + 0.6
    result = ops.sampler_update(latent, noise, delta, row, seeds, 17, previous=(old_noise, old_delta))
    torch.testing.assert_close(result, expected)
    first = ops.sampler_update(latent, noise, delta, row * torch.tensor([1, 1, 1, 0, 0, 0, 0]), seeds, 17)
    torch.testing.assert_close(first, 0.9 * latent - 0.3 * noise + 5 * delta)


def test_sampler_update_by_channel_is_a_row_for_each():
    latent, noise, delta, old_noise, old_delta = rand(5, 2, 3, 4, 5)
    rows, seeds = rand(3, 7, seed=1), torch.tensor([4, 9])
    rows[1, 3] = 0  # one channel without fresh noise
    fresh = standard_normal(seeds, 17, (3, 4, 5)).double()
    terms = (latent, noise, delta, fresh, old_noise, old_delta, torch.ones_like(latent))
    expected = sum(rows[:, k, None, None] * term for k, term in enumerate(terms))
    result = ops.sampler_update(latent, noise, delta, rows, seeds, 17, previous=(old_noise, old_delta))
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)  # normals to 1e-6


def test_sampler_step_of_one_head_clips_around_the_condition():
    latent, network_input, output, condition = rand(4, 2, 3, 4, 5, dtype=torch.float32)
    history, seeds, counter = torch.zeros(2, 2, 3, 4, 5), torch.tensor([4, 9]), torch.tensor([1])
    rows, channel_rows = torch.zeros(2, 7), torch.full((2, 3, 10), torch.nan)
    rows[1] = ops.pack(ops.SamplerRow(latent=0, noise_prediction=0, delta=1), ())  # the next latent is the clipped prediction
    row = ops.OneHeadRow(
        noise_from_output=1,
        noise_from_latent=0,
        noise_offset=0,
        delta_from_noise=-0.5,
        delta_from_latent=2,
        delta_from_condition=1,
        delta_limit=torch.tensor([0.7, 0.7, torch.inf]),
        input_from_latent=1,
        input_offset=0,
        input_from_condition=-3,
    )
    channel_rows[1] = ops.pack(row, (3,))
    whole = 2 * latent - 0.5 * output
    clipped = (whole + condition).clamp(-0.7, 0.7) - condition
    clipped[:, 2] = whole[:, 2]
    assert ((whole - clipped)[:, :2].abs() > 1e-3).float().mean() > 0.5
    ops.sampler_step(latent, network_input, history, output, rows, channel_rows, torch.tensor([9, 8]), counter, seeds, condition)
    torch.testing.assert_close(latent, clipped, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(history, torch.stack([output, clipped]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network_input, clipped - 3 * condition, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend_name", ["reference", "cpp"])
def test_what_is_not_a_number_is_not_clipped_to_one(backend_name):
    for arguments, _ in list(ops.find("sampler_step").examples())[-2:]:
        latent, network_input, _, output, *_ = arguments = [argument.clone() for argument in arguments]
        output[1, 0, 1, 2] = torch.nan
        with backend(backend_name):
            if backend_name == "cpp" and ops.find("sampler_step").kernel_for(*arguments) is None:
                pytest.skip(ops.explain("sampler_step", *arguments))
            ops.sampler_step(*arguments)
        assert latent.isnan().sum() == 1 and latent[1, 0, 1, 2].isnan() and network_input[1, 0, 1, 2].isnan()


class Device:
    """Stands for a CUDA device and its stream: what is queued, and when the device comes to it."""

    def __init__(self, monkeypatch, seconds_per_call):
        self.queue, self.seconds_per_call = [], seconds_per_call
        for name in ("synchronize", "_sleep", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name.strip("_")))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def synchronize(self):
        self.queue.append("synchronize")

    def sleep(self, cycles):
        self.queue.append(cycles)

    def device(self, index):
        self.queue.append(index)
        return contextlib.nullcontext()

    def call(self):
        time.sleep(0.002)  # Python
        self.queue.append("call")


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.device.queue.append(self)

    def elapsed_time(self, last):
        first, last = self.device.queue.index(self), self.device.queue.index(last)
        return 1e3 * self.device.seconds_per_call * self.device.queue[first:last].count("call")


def test_latency_on_cuda_is_that_of_the_device(monkeypatch):
    """The host is slower than the device: it has queued the call before the device wakes up and starts the clock."""
    device = Device(monkeypatch, seconds_per_call=1e-5)
    assert ops.latency_ms(device.call, torch.device("cuda:1"), repetitions=3) == pytest.approx(0.01)
    assert device.queue[:5] == ["call", "call", torch.device("cuda:1"), "synchronize", "call"]
    assert device.queue[-1] == "synchronize"
    rounds = [device.queue[start : start + 4] for start in range(5, 17, 4)]
    for cycles, first, call, last in rounds:
        assert cycles / ops.CYCLES_PER_SECOND >= 0.004  # twice what Python takes
        assert call == "call" and type(first) is type(last) is Event and first is not last


def test_latency_of_a_call_that_waits_does_not_sleep_long(monkeypatch):
    device = Device(monkeypatch, seconds_per_call=1)
    monkeypatch.setattr(time, "perf_counter", iter(range(100)).__next__)  # a second each
    ops.latency_ms(device.call, torch.device("cuda"), repetitions=1)
    assert max(entry for entry in device.queue if isinstance(entry, int)) == ops.MAX_SLEEP_SECONDS * ops.CYCLES_PER_SECOND


class TestBackend:
    def test_nests_and_restores(self, toy_kernel):
        qkv = rand(3, 1, 4, 1, 2)
        reference = ops.find("attention").reference(*qkv)
        assert not ops.attention(*qkv).any()
        with backend("reference"):
            torch.testing.assert_close(ops.attention(*qkv), reference)
            with backend("triton"):
                assert not ops.attention(*qkv).any()
            torch.testing.assert_close(ops.attention(*qkv), reference)
        assert not ops.attention(*qkv).any()

    def test_restores_after_an_exception(self, toy_kernel):
        with pytest.raises(KeyError), backend("reference"):
            raise KeyError
        assert not ops.attention(*rand(3, 1, 4, 1, 2)).any()

    def test_is_a_plain_switch_too(self, toy_kernel):
        switch = multibeta.backend("reference")
        try:
            assert ops.attention(*rand(3, 1, 4, 1, 2)).any()
        finally:
            switch.__exit__()
        assert not ops.attention(*rand(3, 1, 4, 1, 2)).any()

    def test_blocks_of_threads_end_in_any_order(self):
        first, second = backend("reference"), multibeta.backend("cpp", attention="sdpa")
        first.__exit__()
        assert ops.current_backend() == "cpp" and ops.current_backend("attention") == "sdpa"
        with backend(sampler="reference") as third:
            second.__exit__()
            found = [ops.current_backend(name) for name in (None, "attention", "sampler_step")]
            assert found == ["auto", "auto", "reference"]
            third.__exit__()
            assert ops.current_backend("sampler_step") == "auto"
        assert ops.current_backend() == "auto" and not registry._choices

    def test_a_block_takes_back_the_switches_within_it(self):
        with backend("reference"):
            backend("cpp")
            assert ops.current_backend() == "cpp"
        assert ops.current_backend() == "auto" and not registry._choices

    def test_threads(self):
        begun, goes_on = threading.Event(), threading.Event()

        def earlier():
            with backend("reference"):
                begun.set()
                goes_on.wait()

        thread = threading.Thread(target=earlier)
        thread.start()
        begun.wait()
        with backend("cpp"):
            goes_on.set()
            thread.join()
            assert ops.current_backend() == "cpp"
        assert ops.current_backend() == "auto"

    def test_many_threads_leave_nothing(self):
        def work(index):
            for _ in range(200):
                with backend("reference"), backend(attention=("reference", "auto")[index % 2]), ops.measuring():
                    assert ops.current_backend("standard_normal") == "reference" and registry._measuring

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(8)))
        assert ops.current_backend() == ops.current_backend("standard_normal") == "auto"
        assert not registry._choices and not registry._measuring

    def test_an_object_for_several_blocks(self):
        choice = backend("reference")
        for _ in range(2):
            with choice:
                with choice:
                    assert ops.current_backend() == "reference"
                assert ops.current_backend() == "reference"
            assert ops.current_backend() == "auto"

    def test_switches_take_no_room(self):
        try:
            for _ in range(10):
                backend("reference")
                backend(attention="sdpa")
            assert len(registry._choices) < 4
            with backend("auto"):
                assert ops.current_backend() == "auto"
            assert ops.current_backend() == "reference" and ops.current_backend("attention") == "sdpa"
        finally:
            registry._choices.clear()
            registry._choose()

    def test_a_block_in_a_compiled_function(self, toy_kernel):
        def function(q, k, v):
            with backend("reference"):
                inside = ops.attention(q, k, v)
            return inside, ops.attention(q, k, v)

        inside, outside = torch.compile(function, backend="eager", fullgraph=True)(*rand(3, 1, 4, 1, 2))
        assert inside.any() and not outside.any() and ops.current_backend() == "auto"

    def test_measuring_blocks_of_threads_end_in_any_order(self):
        first, second = ops.measuring(), ops.measuring()
        first.__enter__(), second.__enter__()
        first.__exit__()
        assert registry._measuring
        second.__exit__()
        assert not registry._measuring

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="auto, reference, triton, cpp, sdpa, xformers, got 'cuda'"):
            backend("cuda")
        with pytest.raises(ValueError, match=r"attention must be one of auto, .* xformers, got 'flash'"):
            backend("auto", attention="flash")

    @pytest.mark.parametrize("name", ["triton", "cpp"])
    def test_asking_an_op_for_a_backend_nobody_registered_for_it_raises(self, no_kernels, name):
        with backend(attention=name), pytest.raises(RuntimeError, match=f"'{name}' cannot run attention: no {name} kernel"):
            ops.attention(*rand(3, 1, 4, 1, 2))

    def test_a_backend_for_all_leaves_ops_without_a_kernel_of_it_on_auto_and_says_so(self, caplog):
        qkv = rand(3, 1, 4, 1, 2, dtype=torch.float32)
        norm = next(iter(ops.find("group_norm_act").examples()))
        with caplog.at_level("INFO", "multibeta"), backend("sdpa"):
            served = {op.name: ops.current_backend(op.name) for op in ops.all_ops()}
            assert served.pop("attention") == "sdpa" and set(served.values()) == {"auto"}
            assert ops.current_backend() == "sdpa"
            assert "auto, backend 'sdpa' has no kernel for it" in ops.explain("group_norm_act", *norm[0], **norm[1])
            assert ops.explain("attention", *qkv).startswith("attention: sdpa (")
            ops.group_norm_act(*norm[0], **norm[1])
            torch.testing.assert_close(ops.attention(*qkv), ops.find("attention").reference(*qkv))
        (record,) = caplog.records
        left = "group_norm_act, group_norm_act_pair, sampler_update, sampler_step, standard_normal"
        assert record.getMessage() == f"backend 'sdpa' has no kernel for {left}: left on auto"

    def test_each_family_of_ops_is_chosen_by_its_own_name(self, caplog):
        families = {"group_norm": "cpp", "attention": "reference", "sampler": "triton", "noise": "auto"}
        with caplog.at_level("INFO", "multibeta"), backend("cpp", **families):
            for op in ops.all_ops():
                assert ops.current_backend(op.name) == families[op.family]
        assert {op.family for op in ops.all_ops()} == set(families) == set(ops.FAMILIES)
        assert {ops.current_backend(op.name) for op in ops.all_ops()} == {"auto"} and not caplog.records

    def test_what_is_not_named_stays_as_it_is(self):
        with backend("reference", attention="sdpa"):
            with backend(sampler="cpp"):
                found = [ops.current_backend(name) for name in ("group_norm_act", "attention", "sampler_step")]
                assert found == ["reference", "sdpa", "cpp"]
            with backend("cpp"):  # names all anew
                assert ops.current_backend("attention") == "cpp"
            assert ops.current_backend("sampler_step") == "reference" and ops.current_backend("attention") == "sdpa"

    def test_an_op_chosen_by_name_that_cannot_serve_says_why_and_no_other(self, toy_kernel):
        with backend("reference", attention="triton"), pytest.raises(RuntimeError) as raised:
            ops.attention(*rand(3, 1, 5, 1, 2))
        assert str(raised.value) == "backend 'triton' cannot run attention: triton: lengths must be even"

    def test_a_compiled_call_follows_the_choice_for_its_op(self, toy_kernel):
        qkv = rand(3, 1, 4, 1, 2)
        compiled = torch.compile(ops.attention, fullgraph=True, backend="eager")
        for _ in range(2):
            assert not compiled(*qkv).any()
            with backend("auto", attention="reference"):
                assert compiled(*qkv).any()
            with backend("reference", attention="triton"):
                assert not compiled(*qkv).any()

    def test_auto_takes_the_kernel_that_accepts(self, toy_kernel):
        even, odd = rand(3, 1, 4, 1, 2), rand(3, 1, 5, 1, 2)
        assert not ops.attention(*even).any()
        torch.testing.assert_close(ops.attention(*odd), ops.find("attention").reference(*odd))
        assert ops.explain("attention", *even) == "attention: triton"
        assert ops.explain("attention", *odd) == "attention: reference (triton: lengths must be even)"

    def test_measuring_pins_the_fastest_for_a_shape(self, no_kernels):
        def slow(query, key, value):
            time.sleep(0.002)
            return value

        calls = []
        ops.register("attention", Kernel("cpp", slow, lambda *qkv: None))
        ops.register("attention", Kernel("sdpa", lambda *qkv: calls.append(0) or qkv[2], lambda *qkv: None))
        qkv, other = rand(3, 1, 4, 1, 2), rand(3, 1, 5, 1, 2)
        assert ops.explain("attention", *qkv) == "attention: cpp"  # the order of registration
        with ops.measuring():
            ops.attention(*qkv)
        assert ops.explain("attention", *qkv).startswith("attention: sdpa (cpp: ") and " ms" in ops.explain("attention", *qkv)
        assert ops.explain("attention", *other) == "attention: cpp"
        before = len(calls)
        ops.attention(*qkv)
        assert len(calls) == before + 1
        with backend("cpp"):
            ops.attention(*qkv)
        assert len(calls) == before + 1

    def test_a_candidate_that_fails_on_the_shape_is_passed_over_with_its_reason(self, no_kernels):
        def fails(query, key, value):
            raise RuntimeError("no engine for this shape\nand a trace")

        def without_gradients(query, key, value):
            return "no backward" if torch.is_grad_enabled() else None

        ops.register("attention", Kernel("sdpa", fails, lambda *qkv: None, name="sdpa-a"))
        qkv = rand(3, 1, 4, 1, 2)
        with ops.measuring():
            result = ops.attention(*qkv)
        torch.testing.assert_close(result, ops.find("attention").reference(*qkv))
        failed = "sdpa-a: failed on this shape, no engine for this shape"
        assert ops.explain("attention", *qkv) == f"attention: reference ({failed})"
        ops.register("attention", Kernel("cpp", lambda *qkv: qkv[2], without_gradients))
        ops.register("attention", Kernel("sdpa", lambda *qkv: qkv[0], lambda *qkv: None))
        ops.find("attention").pins.clear()
        with torch.no_grad(), ops.measuring():
            ops.attention(*qkv)
            assert ops.explain("attention", *qkv).endswith(f" ms; {failed})")
        ops.find("attention").kernels[1:] = [Kernel("cpp", lambda *qkv: qkv[2], lambda *qkv: "declined now")]
        assert failed in ops.explain("attention", *qkv)

    def test_nothing_is_measured_where_calls_are_recorded_or_pretended(self, toy_kernel):
        qkv = rand(3, 1, 4, 1, 2).unbind()
        with ops.measuring():
            torch.compile(ops.attention, fullgraph=True, backend="eager")(*qkv)
            torch.jit.trace(ops.attention, qkv, check_trace=False)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(tensor) for tensor in qkv]
                ops.attention(*fakes)
            ops.attention(*fakes)
            torch.func.vmap(ops.attention)(*(tensor[None] for tensor in qkv))
            assert not ops.find("attention").pins
            ops.attention(*qkv)
        assert len(ops.find("attention").pins) == 1

    def test_a_pin_measured_without_gradients_does_not_serve_training(self):
        qkv = rand(3, 2, 16, 2, 8, dtype=torch.float32)
        with torch.no_grad(), ops.measuring():
            ops.attention(*qkv)
        leaf = qkv.clone().requires_grad_()
        ops.attention(*leaf).square().sum().backward()
        expected = qkv.clone().requires_grad_()
        ops.find("attention").reference(*expected).square().sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-5)

    def test_an_explicit_kernel_that_declines_raises_its_reason(self, toy_kernel):
        odd = rand(3, 1, 5, 1, 2)
        with backend("triton"):
            with pytest.raises(RuntimeError, match="lengths must be even"):
                ops.attention(*odd)
            assert "lengths must be even" in ops.explain("attention", *odd)

    def test_explain_says_when_there_is_nothing_to_choose(self, no_kernels):
        assert ops.explain("attention", *rand(3, 1, 4, 1, 2)) == "attention: reference (no kernel is registered)"

    def test_unknown_op_names_those_that_exist(self):
        with pytest.raises(
            KeyError, match="attention, group_norm_act, group_norm_act_pair, sampler_step, sampler_update, standard_normal"
        ):
            ops.find("softmax")

    @pytest.mark.parametrize("name", ["sampler_update", "sampler_step"])
    def test_examples_of_the_sampler_have_shared_rows_and_rows_per_channel(self, name):
        row = {"sampler_update": 3, "sampler_step": 4}[name]
        assert len({args[row].dim() for args, _ in ops.find(name).examples()}) == 2

    @pytest.mark.parametrize("name", ["group_norm_act", "attention", "sampler_update"])
    def test_examples_run_on_the_reference(self, name):
        op = ops.find(name)
        results = [op.reference(*args, **kwargs) for args, kwargs in op.examples()]
        assert results and all(result.isfinite().all() for result in results)
