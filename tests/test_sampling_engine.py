"""The engine walks as the plain loop does, over one captured step for any schedule."""

import contextlib
import copy
import functools
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import multibeta
from multibeta import diffusion_vae, inference, ops
from multibeta.blocks import Conv2d
from multibeta.diffusion_vae import FORMS, ConditionalDiffusion, ConditionalDiffusionConfig
from multibeta.inference import Host, bucket
from multibeta.networks import UNet
from multibeta.nonlinear_diffusion import PROCESS_SAMPLERS, DiffusionConfig, NonlinearDiffusion, sampler_rows
from multibeta.sampling import Engine, EngineOptions, capture_cuda_graph, sample

STEPS = 40
CONFIG = {
    "latent_channels": 3,
    "latent_resolution": 8,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "num_groups": 4,
    "num_steps": STEPS,
}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["v", "residual", "literal", "v, a sigma per channel", "residual, cosine"])
def diffusion(request):
    parameterization, *more = request.param.split(", ")
    basis = "cosine" if "cosine" in more else "pixel"
    return build(parameterization, sigma_per_channel="a sigma per channel" in more, basis=basis)


def build(parameterization="v", **changes):
    config = DiffusionConfig(parameterization=parameterization, **(CONFIG | changes))
    diffusion = NonlinearDiffusion(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in diffusion.unet.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1, generator=generator)
    table = tuple(diffusion.latent_mean.shape)
    statistics = (0.3 * torch.randn(table, generator=generator) for _ in range(3))
    mean, deviation, rms = statistics
    sigmas = torch.linspace(0.05, 1, STEPS + 1)
    if config.sigma_per_channel:
        sigmas = torch.stack([sigmas, sigmas**0.2, sigmas.square()], dim=1)
    diffusion.set_process(sigmas, mean, 0.5 + deviation.abs(), 0.5 + rms.abs())
    return diffusion


class Recorder:
    """A stand-in for graph capture: counts, and checks that every replay finds its tensors where they were."""

    def __init__(self):
        self.captures = self.replays = 0
        self.pools = []

    def __call__(self, step, pool):
        self.captures += 1
        self.pools.append(pool)

        def replay():
            self.replays += 1
            step()

        return replay


def engine(diffusion, dtype=torch.float32, **options):
    return Engine(diffusion.unet, EngineOptions(dtype=dtype, **options), getattr(diffusion, "cosines", None))


def walk(engine, diffusion, sampler="ode2", steps=5, count=3, callback=None, **kwargs):
    rows = diffusion.sampler_rows(sampler, steps, **kwargs)
    initial, seeds = rand(max(count, 8), 3, 8, 8)[:count], torch.arange(10, 10 + count)
    times, head_rows = rows.steps * (1000 / STEPS), diffusion.head_rows(rows.steps, of_data=rows.of_data)
    return engine.sample(rows, head_rows, times, initial, seeds, callback=callback)


def walk_plainly(diffusion, sampler="ode2", steps=5, count=3, **kwargs):
    rows = diffusion.sampler_rows(sampler, steps, **kwargs)
    initial, seeds = rand(max(count, 8), 3, 8, 8)[:count], torch.arange(10, 10 + count)
    with multibeta.backend("reference"):
        predict = diffusion.predict_data if rows.of_data else diffusion.predict
        return sample(predict, rows, initial, seeds, basis=diffusion.cosines)


def assert_close(result, expected, tolerance=1e-4):
    assert (result - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("sampler", PROCESS_SAMPLERS)
def test_equals_the_plain_loop(diffusion, sampler):
    if sampler not in diffusion.samplers:
        pytest.skip("an encoding that is not normalised")
    seen = []
    last = walk(engine(diffusion), diffusion, sampler, callback=lambda done, total, latent: seen.append(latent))
    assert_close(last, walk_plainly(diffusion, sampler))
    assert torch.equal(seen[-1], last)


def test_a_basis_is_of_the_size_of_latents_and_takes_no_condition():
    diffusion = build("residual", basis="cosine")
    rows, seeds = diffusion.sampler_rows("ode", 5), torch.arange(2)
    with pytest.raises(ValueError, match=r"the size of the basis, \(8, 8\), got \(4, 4\)"):
        engine(diffusion).sample(rows, diffusion.head_rows(rows.steps), rows.steps, rand(2, 3, 4, 4), seeds)
    with pytest.raises(ValueError, match=r"the size of the basis, \(8, 8\), got \(4, 4\)"):
        sample(diffusion.predict, rows, rand(2, 3, 4, 4), seeds, basis=diffusion.cosines)
    conditioned, latents = diffusion.config.build_unet(6, 3, 8), rand(2, 3, 8, 8)
    head_rows = ops.pack(ops.OneHeadRow(*[0.0] * 10), (5, 192))
    with pytest.raises(ValueError, match="walks coefficients in a basis"):
        Engine(conditioned, basis=diffusion.cosines).sample(rows, head_rows, rows.steps, latents, seeds, condition=latents)


def test_walks_up_and_part_of_the_way():
    diffusion = build()
    for part in ({"start": 0, "stop": STEPS}, {"start": 25}):
        assert_close(walk(engine(diffusion), diffusion, **part), walk_plainly(diffusion, **part))


def test_half_precision_stays_within_two_percent():
    diffusion = build()
    assert_close(walk(engine(diffusion, torch.bfloat16), diffusion, steps=20), walk_plainly(diffusion, steps=20), 0.02)


def test_one_capture_serves_every_schedule_and_every_batch_of_its_bucket():
    diffusion, recorder = build(), Recorder()
    captured = engine(diffusion, capture=recorder)
    for sampler, steps, count in (("ode2", 5, 3), ("ancestral", 9, 4), ("heun", 2, 3), ("ode", STEPS, 3)):
        assert_close(walk(captured, diffusion, sampler, steps, count), walk_plainly(diffusion, sampler, steps, count))
    assert recorder.captures == 1
    assert recorder.replays == 5 + 9 + 3 + STEPS
    walk(captured, diffusion, count=5)
    walk(captured, diffusion, count=2)
    walk(captured, diffusion, count=4)
    assert recorder.captures == 3  # buckets of 8 and 2; 4 was there


def test_a_captured_step_keeps_its_addresses():
    diffusion = build()
    captured = engine(diffusion, capture=Recorder())
    walk(captured, diffusion)

    def addresses():
        (state,) = captured._states.values()
        tensors = (state.latent, state.history, state.padded_input, state.seeds, state.schedule.counter, *state.schedule.tables)
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    diffusion.unet.conv_out.weight.mul_(2)
    walk(captured, diffusion, "heun", 7)
    assert addresses() == before


def test_a_longer_schedule_makes_the_tables_grow():
    diffusion, recorder = build(), Recorder()
    captured = engine(diffusion, capture=recorder, max_steps=8)
    for steps in (5, 20, 8):
        assert_close(walk(captured, diffusion, "ode", steps), walk_plainly(diffusion, "ode", steps))
    assert recorder.captures == 2


def test_rows_of_the_other_kind_make_the_tables_anew():
    shared, recorder = build(), Recorder()
    own = build(sigma_per_channel=True)
    own.unet = shared.unet
    captured = engine(shared, capture=recorder)
    for captures, diffusion in enumerate((shared, own, shared), start=1):
        for sampler in ("ancestral", "ode2"):
            assert_close(walk(captured, diffusion, sampler), walk_plainly(diffusion, sampler))
        assert recorder.captures == captures


@pytest.mark.parametrize("sampler", PROCESS_SAMPLERS)
def test_equal_curves_walk_as_the_one_they_share(sampler):
    shared, own = build(), build(sigma_per_channel=True)
    own.unet = shared.unet
    own.sigmas.copy_(shared.sigmas[:, None])
    assert torch.equal(walk(engine(own), own, sampler), walk(engine(shared), shared, sampler))


def test_follows_new_weights():
    diffusion = build()
    running = engine(diffusion)
    first = walk(running, diffusion)
    for parameter in diffusion.unet.parameters():
        parameter.mul_(1.1)
    second = walk(running, diffusion)
    assert (first - second).norm() > 0.01 * first.norm()
    assert_close(second, walk_plainly(diffusion))


def test_a_sample_does_not_depend_on_its_batch():
    diffusion = build()
    running = engine(diffusion)
    alone, together = walk(running, diffusion, "ancestral", count=1), walk(running, diffusion, "ancestral", count=8)
    assert_close(alone, together[:1], 1e-5)


def test_padding_is_thrown_away():
    diffusion = build()
    captured = engine(diffusion, capture=Recorder())
    walk(captured, diffusion, count=4)
    (state,) = captured._states.values()
    state.latent.fill_(torch.nan)
    state.padded_input.fill_(torch.nan)
    assert_close(walk(captured, diffusion, count=3), walk_plainly(diffusion, count=3))


def test_the_network_part_of_a_step_never_waits_for_the_host(monkeypatch):
    """A captured step must not read a tensor on the host."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
            return function(*args, **(kwargs or {}))

    def capture(step, pool):
        with NoReads():
            step()
        return step

    monkeypatch.setattr(ops, "sampler_step", lambda *tensors: None)
    diffusion = build()
    walk(engine(diffusion, capture=capture), diffusion)


def test_progress_counts_evaluations_and_shows_the_latent():
    diffusion, seen = build(), []
    walk(engine(diffusion, capture=Recorder()), diffusion, "heun", 3, callback=lambda *call: seen.append(call))
    assert [(done, total) for done, total, _ in seen] == [(k, 5) for k in range(1, 6)]
    assert all(latent.shape == (3, 3, 8, 8) for _, _, latent in seen)


def test_can_be_cancelled_and_used_again():
    diffusion = build()
    running = engine(diffusion)

    def cancel(done, total, latent):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(running, diffusion, callback=cancel)
    assert_close(walk(running, diffusion), walk_plainly(diffusion))


def test_results_are_not_overwritten_by_the_next_walk():
    diffusion = build()
    running = engine(diffusion)
    first = walk(running, diffusion)
    kept = first.clone()
    walk(running, diffusion, "ancestral")
    assert torch.equal(first, kept)


def test_a_batch_too_large_names_the_one_to_try():
    def capture(step, pool):
        raise torch.OutOfMemoryError("out of memory")

    diffusion = build()
    running = engine(diffusion, capture=capture)
    with pytest.raises(MemoryError, match="batch of 6 does not fit the device; try a batch of 3"):
        walk(running, diffusion, count=6)
    assert not running._states


def test_an_error_that_came_of_a_lack_of_memory_is_one():
    """What ends a capture raises an error of its own over the one within."""

    def capture(step, pool):
        try:
            raise torch.OutOfMemoryError("out of memory")
        except torch.OutOfMemoryError:
            raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")  # noqa: B904

    diffusion = build()
    with pytest.raises(MemoryError, match="try a batch of 1: operation would"):
        walk(engine(diffusion, capture=capture), diffusion)
    broken = engine(diffusion, capture=lambda step, pool: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        walk(broken, diffusion)


def test_a_pool_is_not_captured_into_after_its_graphs_are_gone(monkeypatch):
    diffusion, recorder = build(), Recorder()
    monkeypatch.setattr(Host, "new_pool", lambda self: object())
    captured = engine(diffusion, capture=recorder, max_steps=8)
    for steps, count in ((5, 3), (5, 8), (20, 3), (20, 8), (8, 3)):  # two buckets share a pool; tables grow: another
        assert_close(walk(captured, diffusion, "ode", steps, count), walk_plainly(diffusion, "ode", steps, count))
    first, second, third, fourth = recorder.pools
    assert first is second and third is fourth and first is not third


def test_capture_is_private(monkeypatch):
    """The order of what is done to CUDA, told by a recorder in its place."""
    calls, depth = [], []

    class Stream:
        def wait_stream(self, other):
            calls.append("wait")

    @contextlib.contextmanager
    def scope(name, *args, **kwargs):
        calls.append((name, kwargs.get("pool"), kwargs.get("stream") is stream if name == "graph" else None))
        depth.append(name)
        yield
        depth.pop()

    stream = Stream()
    graph = SimpleNamespace(replay="the replay")
    for name, stub in {
        "Stream": lambda: stream,
        "current_stream": Stream,
        "CUDAGraph": lambda: graph,
        "stream": functools.partial(scope, "stream"),
        "graph": functools.partial(scope, "graph"),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: calls.append(f"debug mode {mode}"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    clear = lambda: calls.append("clear workspaces")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    step = lambda: calls.append(f"step in {depth[-1]}")  # noqa: E731
    capture = ["clear workspaces", ("graph", "pool", True), "step in graph", "clear workspaces"]
    warm = ["wait", ("stream", None, None), "step in stream", "step in stream"]
    assert capture_cuda_graph(step, "pool") == "the replay"
    assert calls == [*warm, "wait", *capture]
    calls.clear()
    capture_cuda_graph(step, "pool", find_waits=True)
    assert calls == [*warm, "debug mode error", "step in stream", "debug mode 0", "wait", *capture]


def test_the_flags_of_the_user_stay(monkeypatch):
    cudnn, seen = torch.backends.cudnn, []

    def capture(step, pool):
        seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.enabled, cudnn.allow_tf32))
        return step

    diffusion = build()
    for benchmark, deterministic, allow_tf32 in itertools.product((False, True), repeat=3):
        with cudnn.flags(enabled=False, benchmark=benchmark, deterministic=deterministic, allow_tf32=allow_tf32):
            walk(engine(diffusion, capture=capture), diffusion)
            assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (benchmark, deterministic, allow_tf32)
        assert seen.pop() == (benchmark or not deterministic, deterministic, False, allow_tf32)


def test_threads_take_turns():
    diffusion = build()
    running = engine(diffusion, capture=Recorder())
    calls = [("ode2", 5, 3), ("ancestral", 9, 4), ("heun", 4, 3), ("ode", STEPS, 2)] * 3
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda call: walk(running, diffusion, *call), calls))
    for call, result in zip(calls, results, strict=True):
        assert_close(result, walk_plainly(diffusion, *call))


def test_a_callback_may_walk():
    diffusion, inner = build(), []
    running = engine(diffusion, capture=Recorder())

    def callback(done, total, latent):
        if done in (2, 3):
            inner.append(walk(running, diffusion, "ancestral", 9))

    assert_close(walk(running, diffusion, callback=callback), walk_plainly(diffusion))
    assert len(inner) == 2
    for result in inner:
        assert_close(result, walk_plainly(diffusion, "ancestral", 9))


def test_what_a_callback_gets_is_its_own():
    diffusion, kept = build(), []
    walk(engine(diffusion), diffusion, callback=lambda done, total, latent: kept.append(latent))
    plainly = []
    rows = sampler_rows(diffusion.sigmas, "ode2", 5)
    with multibeta.backend("reference"):
        keep = lambda done, total, latent: plainly.append(latent)  # noqa: E731
        sample(diffusion.predict, rows, rand(8, 3, 8, 8)[:3], torch.arange(10, 13), callback=keep)
    for mine, expected in zip(kept, plainly, strict=True):
        assert_close(mine, expected)


def test_the_host_is_ahead_by_so_many_steps_and_walks_follow_each_other(monkeypatch):
    """On a queue that says what it is asked: a mark behind each step, a walk behind the mark of the one before."""
    told, diffusion = [], build()

    class Mark:
        def __init__(self):
            self.number = sum(entry.startswith("mark") for entry in told)
            told.append(f"mark {self.number}")

        def synchronize(self):
            told.append(f"host waits for {self.number}")

    monkeypatch.setattr(Host, "mark", lambda self: Mark())
    monkeypatch.setattr(Host, "follow", lambda self, mark: told.append(f"queue waits for {mark.number}"))
    running = engine(diffusion, run_ahead=2)
    walk(running, diffusion, "ode", 4)
    assert told == ["mark 0", "mark 1", "mark 2", "host waits for 0", "mark 3", "host waits for 1", "mark 4"]
    told.clear()
    walk(running, diffusion, "ode", 1)
    assert told == ["queue waits for 4", "mark 0", "mark 1"]


def test_the_device_of_the_network_is_the_current_one(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def current(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    with inference.on_device(torch.device("cuda", 1)), inference.on_device(torch.device("cpu")):
        assert entered == [torch.device("cuda", 1)]
    entered.clear()
    diffusion, devices = build(), []
    monkeypatch.setattr(inference, "on_device", lambda device: current(device))
    walk(engine(diffusion, capture=lambda step, pool: devices.extend(entered) or step), diffusion)
    assert devices == [torch.device("cpu")]


def test_a_network_that_moves_is_followed_and_one_without_weights_refused():
    diffusion = build()
    running = engine(diffusion)
    walk(running, diffusion)
    kept = copy.deepcopy(diffusion.unet)
    diffusion.unet.to("meta")
    with pytest.raises(ValueError, match="has no weights, they are on the meta device"):
        walk(running, diffusion)
    running.network = diffusion.unet = kept
    assert_close(walk(running, diffusion), walk_plainly(diffusion))


def test_a_first_walk_in_inference_mode_and_the_next_outside():
    diffusion = build()
    running = engine(diffusion)
    with torch.inference_mode():
        first = walk(running, diffusion)
    diffusion.unet.conv_out.weight.mul_(1.1)
    assert_close(walk(running, diffusion), walk_plainly(diffusion))
    with torch.inference_mode():
        assert_close(walk(running, diffusion), walk_plainly(diffusion))
    assert (first - walk_plainly(diffusion)).norm() > 1e-3


@pytest.mark.parametrize("how", ["data", "assign", "other layers"])
def test_weights_that_change_without_a_trace_are_followed(how):
    diffusion, recorder = build(), Recorder()
    running = engine(diffusion, capture=recorder)
    walk(running, diffusion)
    for _ in range(2):
        if how == "data":
            for parameter in diffusion.unet.parameters():
                parameter.data.mul_(1.1)
        elif how == "assign":
            state = {name: 1.1 * value for name, value in diffusion.unet.state_dict().items()}
            diffusion.unet.load_state_dict(state, assign=True)
        else:
            diffusion.unet.conv_out = Conv2d(16, 6, 1).requires_grad_(False)
        assert_close(walk(running, diffusion), walk_plainly(diffusion))
    assert recorder.captures == (3 if how == "other layers" else 1)


def test_copies_and_pickles_walk_alike():
    diffusion = build()
    running = engine(diffusion)
    expected = walk(running, diffusion)
    for copied in (copy.deepcopy(running), pickle.loads(pickle.dumps(running))):
        assert copied.network is not diffusion.unet
        assert_close(walk(copied, diffusion), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype):
    diffusion = build()
    assert_close(walk(engine(diffusion, dtype), diffusion), walk_plainly(diffusion), 1e-4 if dtype == torch.float64 else 1e-2)


def test_options_that_mean_nothing():
    for options, message in (
        ({"dtype": torch.int8}, "dtype must be torch.float64, float32, bfloat16 or float16, or None, got torch.int8"),
        ({"dtype": "bf16"}, "got 'bf16'"),
        ({"capture": 3}, "capture must turn a step into what replays it, got 3"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"run_ahead": 1.5}, "run_ahead must be an integer of at least 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineOptions(**options)


def test_preparing_draws_no_random_numbers():
    diffusion = build()
    torch.manual_seed(5)
    walk(engine(diffusion), diffusion)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_compiled_network():
    diffusion = build(channel_multipliers=(1,), attention_resolutions=())  # a minute less of compilation
    compiled = engine(diffusion, compile=True, capture=Recorder())
    assert_close(walk(compiled, diffusion, steps=2), walk_plainly(diffusion, steps=2))


def test_every_bucket_compiles(monkeypatch):
    """torch.compile gives up after eight compilations of one function unless told otherwise; buckets of 1 to 256 are nine."""
    diffusion = build(channel_multipliers=(1,), attention_resolutions=(), base_channels=8)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = engine(diffusion, compile=True, capture=Recorder())
    for exponent in range(9):
        assert walk(compiled, diffusion, "ode", 1, 2**exponent).isfinite().all()


def test_explains_itself():
    diffusion = build()
    running = engine(diffusion)
    walk(running, diffusion)
    text = running.explain()
    for part in ("dtype: torch.float32", "captured: no: graphs are captured on CUDA", "packed weights: ", "up.1.2 at batch 4: "):
        assert part in text


@pytest.mark.parametrize("name", ops.BACKENDS)
def test_the_network_runs_and_walks_under_every_backend(name):
    diffusion = build()
    latents, steps = rand(2, 3, 8, 8), torch.tensor([3, STEPS])
    with multibeta.backend("reference"):
        expected = diffusion.unet(latents, steps)
    walked = walk_plainly(diffusion, "ancestral")
    norm, attention = (next(iter(ops.find(op).examples())) for op in ("group_norm_act", "attention"))
    with multibeta.backend(name):
        served = ops.explain("group_norm_act", *norm[0], **norm[1]), ops.explain("attention", *attention[0])
        if any("cannot run" in one for one in served):
            assert name in ("triton", "xformers", "cpp")
            with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run"):
                diffusion.unet(latents, steps)
            pytest.skip("; ".join(served))
        assert_close(diffusion.unet(latents, steps), expected)
        assert_close(walk(engine(diffusion), diffusion, "ancestral"), walked)
        rows = sampler_rows(diffusion.sigmas, "ancestral", 5)
        assert_close(sample(diffusion.predict, rows, rand(8, 3, 8, 8)[:3], torch.arange(10, 13)), walked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_walks_in_any_dtype_and_says_what_is_packed(dtype):
    diffusion = build()
    running = engine(diffusion, dtype)
    assert_close(walk(running, diffusion), walk_plainly(diffusion), 3e-2)
    packed = inference.packs(torch.device("cpu"), dtype)
    assert ("packed weights: yes" in running.explain()) == packed
    assert packed or "packed weights: no: oneDNN" in running.explain()


def test_a_captured_step_is_made_anew_for_another_choice():
    diffusion, recorder = build(), Recorder()
    running = engine(diffusion, capture=recorder)
    expected = walk(running, diffusion)
    for name in ({"attention": "sdpa"}, {"sampler": "reference"}, {}):
        with multibeta.backend("auto", **name):
            assert_close(walk(running, diffusion), expected)
    assert recorder.captures == 3


def test_nothing_to_walk_returns_the_latent():
    diffusion = build()
    assert torch.equal(walk(engine(diffusion), diffusion, start=5, stop=5), rand(8, 3, 8, 8)[:3])
    assert walk(engine(diffusion), diffusion, count=0).shape == (0, 3, 8, 8)


def test_a_missing_seed():
    diffusion = build()
    rows = sampler_rows(diffusion.sigmas, "ode", 2)
    with pytest.raises(ValueError, match=r"got \(1,\) seeds for 2 samples"):
        engine(diffusion).sample(rows, diffusion.head_rows(rows.steps), rows.steps, rand(2, 3, 8, 8), torch.arange(1))


def test_tables_latents_and_seeds_that_do_not_fit():
    diffusion = build()
    rows, initial, seeds = sampler_rows(diffusion.sigmas, "ode", 5), rand(2, 3, 8, 8), torch.arange(2)
    head_rows, times = diffusion.head_rows(rows.steps), rows.steps.float()
    for arguments, message in (
        ((head_rows[:2], times, initial, seeds), "head_rows must have one row for each of 5 rows of the sampler, got 2"),
        ((head_rows, times[:2], initial, seeds), "times must have one row for each of 5"),
        ((head_rows, times, initial[0], seeds), r"latents must have shape \(N, C, H, W\), got \(3, 8, 8\)"),
        ((head_rows, times, initial * torch.nan, seeds), "latents must be finite, got 384 numbers that are not"),
        ((head_rows, times, initial, [0, 1.5]), r"a seed must be an integer .*got 1\.5"),
        ((head_rows, times, initial.long(), seeds), "latents must be of floating point, got torch.int64"),
        ((head_rows, times, initial, seeds.float()), "seeds must be integers, got torch.float32"),
        ((head_rows, times, initial, seeds[:, None]), r"got \(2, 1\) seeds for 2 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(diffusion).sample(rows, *arguments)


def test_what_a_prepared_step_would_not_follow_is_refused():
    diffusion = build()
    running = engine(diffusion)
    hook = diffusion.unet.middle[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"the engine cannot walk: middle.0 has hooks, which a copy would not call"):
        walk(running, diffusion)
    assert "it does not walk: middle.0 has hooks" in running.explain()
    hook.remove()
    assert_close(walk(running, diffusion), walk_plainly(diffusion))


def test_a_network_with_a_forward_of_its_own_is_not_walked():
    class Mine(UNet):
        def forward(self, latent, step):
            return 2 * super().forward(latent, step)

    diffusion = build()
    diffusion.unet.__class__ = Mine
    with pytest.raises(RuntimeError, match="Mine has a forward of its own"):
        walk(engine(diffusion), diffusion)


def test_convolutions_of_other_geometries_walk_alike():
    """Skips that are no 1x1 convolutions, padding that is not of zeros: prepared in another form, or not at all."""
    diffusion = build()
    for block in diffusion.unet.res_blocks:
        if isinstance(block.skip, Conv2d):
            block.skip = Conv2d(block.skip.in_channels, block.skip.out_channels, 3, padding=1).requires_grad_(False)
    conv_in = diffusion.unet.down[0][0]
    conv_in.padding_mode, conv_in._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    assert_close(walk(engine(diffusion), diffusion), walk_plainly(diffusion))


def test_a_walk_under_autocast_leaves_float32_behind():
    diffusion = build()
    running = engine(diffusion)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = walk(running, diffusion)
    assert_close(within, walk_plainly(diffusion), 1e-5)
    assert_close(walk(running, diffusion), walk_plainly(diffusion), 1e-5)


class TestOneHead:
    """A network of one head beside a condition: the second stage of DiffusionVAE."""

    CONFIG = ConditionalDiffusionConfig(
        resolution=8,
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_heads=2,
        num_groups=4,
    )
    every_form = pytest.mark.parametrize("form", FORMS)

    def build(self, **changes):
        """A model none of whose layers is zero: its predictions of x_0 leave [-1, 1] by far."""
        torch.manual_seed(0)
        diffusion = ConditionalDiffusion(replace(self.CONFIG, **changes)).eval().requires_grad_(False)
        for parameter in diffusion.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return diffusion

    def arguments(self, diffusion, sampler="ddpm", steps=10, count=3, **options):
        shape = (8, 3, diffusion.config.resolution, diffusion.config.resolution)
        rows = diffusion_vae.sampler_rows(diffusion.process.alpha_bars, sampler, steps, **options)
        return rows, rand(*shape)[:count], torch.arange(10, 10 + count), rand(*shape, seed=1)[:count].clamp(-1, 1)

    def walk(self, engine, diffusion, *sampler, guidance=0.0, clip=True, callback=None, **options):
        rows, initial, seeds, condition = self.arguments(diffusion, *sampler, **options)
        return engine.sample(
            rows,
            diffusion.head_rows(rows.steps, clip=clip),
            rows.steps,
            initial,
            seeds,
            condition=condition if diffusion.config.conditional else None,
            guidance_rows=diffusion.guidance_rows(rows.steps, guidance) if guidance else None,
            callback=callback,
        )

    def walk_plainly(self, diffusion, *sampler, guidance=0.0, clip=True, **options):
        rows, initial, seeds, condition = self.arguments(diffusion, *sampler, **options)
        with multibeta.backend("reference"):
            return sample(diffusion.predictor(condition, guidance=guidance, clip=clip), rows, initial, seeds)

    @every_form
    @pytest.mark.parametrize("guidance", [0.0, 1.5])
    def test_equals_the_plain_loop(self, form, guidance):
        diffusion = self.build(form=form)
        running = engine(diffusion)
        for sampler, options in (
            ("ddpm", {}),
            ("ddpm", {"variance": "fixedlarge"}),
            ("ddim", {}),
            ("ddim", {"eta": 0.7}),
            ("ddim", {"start": 599}),
            ("ddpm", {"clip": False}),
        ):
            expected = self.walk_plainly(diffusion, sampler, guidance=guidance, **options)
            assert_close(self.walk(running, diffusion, sampler, guidance=guidance, **options), expected)

    @every_form
    def test_clipping_bites_at_the_image(self, form):
        """x_0, not r_0, lies in [-1, 1], to the last bits: beside x_hat in bfloat16 the bound would be missed."""
        diffusion = self.build(form=form)
        *_, condition = self.arguments(diffusion)
        running = engine(diffusion, torch.bfloat16)
        clipped, free = (diffusion.process.image(self.walk(running, diffusion, clip=c), condition) for c in (True, False))
        assert free.abs().max() > 10
        assert clipped.abs().max() <= 1 + 1e-6 and (clipped.abs() > 1 - 1e-6).float().mean() > 0.1

    def test_half_precision_stays_within_two_percent(self):
        diffusion = self.build(form="eq7")
        for guidance in (0.0, 1.5):
            expected = self.walk_plainly(diffusion, guidance=guidance)
            assert_close(self.walk(engine(diffusion, torch.bfloat16), diffusion, guidance=guidance), expected, 0.02)

    def test_without_a_condition_it_is_a_ddpm(self):
        diffusion = self.build(conditional=False)
        assert_close(self.walk(engine(diffusion), diffusion), self.walk_plainly(diffusion))

    @pytest.mark.parametrize("guidance", [0.0, 1.5])
    def test_a_sample_does_not_depend_on_its_batch(self, guidance):
        diffusion = self.build(form="eq7")
        running = engine(diffusion)
        alone, together = (self.walk(running, diffusion, guidance=guidance, count=count) for count in (1, 8))
        assert_close(alone, together[:1], 1e-5)

    def test_one_capture_serves_every_schedule_condition_and_guidance(self):
        diffusion, recorder = self.build(form="eq7"), Recorder()
        captured = engine(diffusion, capture=recorder)
        for guidance in (0.0, 1.5, 0.5, 0.0):
            for sampler, steps, count in (("ddpm", 10, 3), ("ddim", 20, 4)):
                expected = self.walk_plainly(diffusion, sampler, steps, guidance=guidance, count=count)
                assert_close(self.walk(captured, diffusion, sampler, steps, guidance=guidance, count=count), expected)
        assert recorder.captures == 2  # with guidance, without

    @pytest.mark.parametrize("resolution", [16, 12])  # usual; maps of 12 and 6, which no vector divides
    def test_other_resolutions_and_widths(self, resolution):
        diffusion = self.build(resolution=resolution, attention_resolutions=(), base_channels=12, image_channels=1)
        rows, initial, seeds, condition = (
            diffusion_vae.sampler_rows(diffusion.process.alpha_bars, "ddim", 5),
            rand(2, 1, resolution, resolution),
            torch.arange(2),
            rand(2, 1, resolution, resolution, seed=1),
        )
        with multibeta.backend("reference"):
            expected = sample(diffusion.predictor(condition), rows, initial, seeds)
        schedule = rows, diffusion.head_rows(rows.steps), rows.steps
        assert_close(engine(diffusion).sample(*schedule, initial, seeds, condition=condition), expected)

    @every_form
    def test_head_rows_are_predictor(self, form, monkeypatch):
        diffusion, residual, output = self.build(form=form), rand(2, 3, 8, 8), rand(2, 3, 8, 8, seed=1)
        condition, seen = rand(2, 3, 8, 8, seed=2).clamp(-1, 1), []
        monkeypatch.setattr(diffusion.unet, "forward", lambda x, steps: seen.append(x) or output)
        for step in (0, 500, 999):
            noise_prediction, clean = diffusion.predictor(condition, guidance=0.5)(residual, step)
            steps = torch.tensor([step])
            row = ops.OneHeadRow(*diffusion.head_rows(steps)[0, :, None, None].unbind(-1))
            guidance = ops.GuidanceRow(*diffusion.guidance_rows(steps, 0.5)[0])
            assert guidance.weight == 0.5 and (row.noise_from_output == 1).all()
            assert not row.noise_from_latent.any() and not row.noise_offset.any()
            torch.testing.assert_close(noise_prediction, output, rtol=1e-6, atol=1e-6)
            centre = row.delta_from_condition * condition
            whole = row.delta_from_noise * noise_prediction + row.delta_from_latent * residual + centre
            clipped = whole.clamp(-row.delta_limit, row.delta_limit) - centre
            torch.testing.assert_close(clipped.float(), clean, rtol=1e-4, atol=1e-4)
            network_input = row.input_from_latent * residual + row.input_offset + row.input_from_condition * condition
            torch.testing.assert_close(network_input.float(), seen[0][:, :3], rtol=1e-6, atol=1e-6)
            free = residual + guidance.latent_from_condition * condition
            torch.testing.assert_close(free.float(), seen[1][:, :3], rtol=1e-6, atol=1e-6)
            assert torch.equal(seen[0][:, 3:], condition) and not seen[1][:, 3:].any()
            seen.clear()

    def test_calls_that_do_not_fit_the_network(self):
        conditional, free, two_heads = self.build(), self.build(conditional=False), build()
        rows, initial, seeds, condition = self.arguments(conditional)
        schedule = rows, conditional.head_rows(rows.steps), rows.steps
        guidance_rows = conditional.guidance_rows(rows.steps, 1.0)
        for diffusion, options, message in (
            (conditional, {}, "reads 3 channels of a condition, none was given"),
            (free, {"condition": condition}, "reads 0 channels of a condition, one was given"),
            (two_heads, {"condition": condition}, "reads 0 channels of a condition, one was given"),
            (conditional, {"condition": condition[:1]}, r"condition must be like initial \(3, 3, 8, 8\), got \(1, 3, 8, 8\)"),
            (free, {"guidance_rows": guidance_rows}, "guidance needs a network that reads a condition"),
        ):
            with pytest.raises(ValueError, match=message):
                engine(diffusion).sample(*schedule, initial, seeds, **options)
        with pytest.raises(ValueError, match="no sampler walks 2 channels by a network from 6 to 3 channels"):
            engine(conditional).sample(*schedule, initial[:, :2], seeds, condition=condition[:, :2])


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_buckets_are_powers_of_two(count, size):
    assert bucket(count) == size


def test_head_rows_are_the_affine_maps_of_predict(diffusion, monkeypatch):
    latent, output = rand(2, 3, 8, 8), rand(2, 6, 8, 8, seed=1)
    seen = []
    monkeypatch.setattr(diffusion.unet, "forward", lambda x, step: seen.append(x) or output)
    for step in (1, 17, STEPS):
        noise_prediction, delta = diffusion.predict(latent, step)
        head_rows = diffusion.head_rows(torch.tensor([step]))[0]
        row = ops.TwoHeadRow(*head_rows.view(3, -1 if len(head_rows) == 3 else 8, len(head_rows) // 24 or 1, 9).unbind(-1))
        here, first, second = map(diffusion.coefficients, (latent, *output.chunk(2, dim=1)))
        expected = [diffusion.pixels(prediction).float() for prediction in row.predictions(here, first, second)]
        torch.testing.assert_close(expected, [noise_prediction, delta], rtol=1e-4, atol=1e-5)
        network_input = diffusion.pixels(row.input_from_latent * here + row.input_offset)
        torch.testing.assert_close(network_input.float(), seen.pop(), rtol=1e-4, atol=1e-5)
