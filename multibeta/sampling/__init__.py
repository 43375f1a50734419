"""The one reverse loop, over the coefficient rows of any sampler: plain for any prediction, and as an engine for a U-Net."""

from __future__ import annotations

import collections
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from multibeta import inference, ops
from multibeta.networks import UNet
from multibeta.schedules import SamplerRows, check_floating
from multibeta.seeds import as_seeds

logger = logging.getLogger("multibeta")

Callback = Callable[[int, int, Tensor], None]
Step = Callable[[], None]


def check_latents(latents: Tensor, shape: tuple[int, ...] | None = None, name: str = "latents") -> None:
    """Raise unless `latents` are finite numbers in floating point, (N, C, H, W), or (N, *shape).

    Raises:
        TypeError: No tensor.
        ValueError: Anything else. Whether numbers are finite is not asked while they are transformed or traced.
    """
    wanted = "(N, C, H, W)" if shape is None else f"(N, *{shape})"
    if not isinstance(latents, Tensor):
        raise TypeError(f"{name} must be a tensor {wanted}, got {type(latents).__name__}")
    check_floating(name, latents)
    if latents.dim() != 4 or (shape is not None and tuple(latents.shape[1:]) != shape):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(latents.shape)}")
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or ops.active_transform() is not None
    if not watched and not latents.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~latents.isfinite()).sum())} numbers that are not")


def check_start(rows: SamplerRows, initial: Tensor, seeds: Tensor) -> Tensor:
    """The seeds as int64; ValueError or TypeError unless `initial` are latents that `rows` are for, with a seed for each."""
    check_latents(initial)
    channels = initial.shape[1]
    if rows.coefficients.shape not in ((len(rows), 6), (len(rows), channels, 6)):
        given = tuple(rows.coefficients.shape)
        raise ValueError(f"rows for {channels} channels must be ({len(rows)}, 6) or ({len(rows)}, {channels}, 6), got {given}")
    seeds = as_seeds(seeds)
    if seeds.shape != initial.shape[:1]:
        raise ValueError(f"one seed per sample is needed, got {tuple(seeds.shape)} seeds for {len(initial)} samples")
    return seeds.to(initial.device)


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    rows: SamplerRows,
    initial: Tensor,
    seeds: Tensor,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Walk `initial` along the rows of a sampler.

    Args:
        predict: (latent, step) to (noise_prediction, delta), each (n, C, H, W). step is the grid index the latent stands at;
            delta is the difference over one grid step, f(x, t - tau) - f(x, t): the rows carry the stride.
        rows: See `nonlinear_diffusion.sampler_rows`; (S, 6), or (S, C, 6) with coefficients of each channel's own.
        initial: (n, C, H, W), the latent at the first row's step.
        seeds: (n,), one integer per sample; its noise depends on nothing else.
        callback: Called after each evaluation with (evaluations done, evaluations in total, latent); raise to cancel.

    Returns:
        The latent after the last row, (n, C, H, W), in the dtype of `initial`. On the way, as `predict` and callbacks see it, it
        is float32 at least.

    Raises:
        ValueError: See `check_latents`; rows for other channels, not one seed per sample, predictions of another shape.
    """
    seeds = check_start(rows, initial, seeds)
    latent, previous = initial.to(torch.promote_types(initial.dtype, torch.float32)), None
    coefficients = rows.coefficients
    if coefficients.dim() == 3:  # kernels take a shared row by value, but read rows per channel where the latent lies
        coefficients = coefficients.to(initial.device)
    for index, step in enumerate(rows.steps.tolist()):
        noise_prediction, delta = predict(latent, step)
        row = coefficients[index]
        latent = ops.sampler_update(latent, noise_prediction, delta, row, seeds, step, previous=previous)
        previous = noise_prediction, delta
        if callback is not None:
            callback(index + 1, len(rows), latent)
    return latent.to(initial.dtype)


@dataclass(frozen=True)
class EngineOptions:
    """How `Engine` runs.

    Attributes:
        dtype: Of the network's arithmetic; None for `inference.fast_dtype`. The latent is float32 always.
        compile: Pass the network through torch.compile as well. Slow to start, and little is left to gain.
        capture: Turns one step into what replays it; None for `capture_cuda_graph` on CUDA and the step itself elsewhere. With
            functools.partial(capture_cuda_graph, find_waits=True) a step that waits for the host says where.
        max_steps: Evaluations that fit the tables; a longer schedule makes them grow, and captures anew.
        run_ahead: Replays the host may be ahead of the device: progress is shown and Ctrl-C heard so much later.
    """

    dtype: torch.dtype | None = None
    compile: bool = False
    capture: Callable[[Step, object], Step] | None = None
    max_steps: int = 1024
    run_ahead: int = 8

    def __post_init__(self):
        if self.dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.float64, float32, bfloat16 or float16, or None, got {self.dtype!r}")
        if self.capture is not None and not callable(self.capture):
            raise ValueError(f"capture must turn a step into what replays it, got {self.capture!r}")
        for name, value in (("max_steps", self.max_steps), ("run_ahead", self.run_ahead)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def capture_cuda_graph(step: Step, pool: object, *, find_waits: bool = False) -> Step:
    """`step`, which must not wait for the host, as a CUDA graph on the current device, in memory `pool`; returns its replay.

    Args:
        find_waits: Run `step` once more before, so that a wait raises where it stands, not within a capture that it spoils. This
            sets the synchronisation debug mode of CUDA, which is the whole process's: not beside other threads on the device.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # algorithm searches and lazy compilation happen outside the capture
        for _ in range(2):
            step()
        if find_waits:
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    # The workspaces of cuBLAS belong to a thread and stream: a graph makes its own, in its pool, and nobody else keeps them
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


def _input_columns(head_rows: Tensor) -> list[int]:
    """The columns of rows (S, C, 6 or 10) that make the network's input."""
    return [4, 5] if head_rows.shape[2] == 6 else [4, 5, 9]


class _Searching:
    """How many searches for algorithms are going on, in all threads, and what the process's flag was before the first."""

    def __init__(self):
        self.lock, self.blocks, self.previous = threading.Lock(), 0, False


_searching = _Searching()


@contextmanager
def _searching_algorithms() -> Iterator[None]:
    """cuDNN tries its algorithms and keeps the fastest for a shape, unless determinism was asked for; no other flag is set."""
    cudnn = torch.backends.cudnn
    with _searching.lock:
        if not _searching.blocks:
            _searching.previous = cudnn.benchmark
        _searching.blocks += 1
        cudnn.benchmark |= not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
    try:
        yield
    finally:
        with _searching.lock:
            _searching.blocks -= 1
            if not _searching.blocks:
                cudnn.benchmark = _searching.previous


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or came of, a lack of device memory: within a capture, what ends it raises another."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


class _Host:
    """What the engine asks of the device it runs on: nothing, where work is done when a call returns."""

    def __init__(self, device: torch.device):
        self.device = device

    def new_pool(self) -> object:
        """Memory that graphs share."""
        return None

    def synchronize(self) -> None:
        """Wait for all that was queued."""

    def mark(self) -> torch.cuda.Event | None:
        """A mark behind what is queued now; None where nothing is."""
        return None

    def follow(self, mark: torch.cuda.Event) -> None:
        """Let what is queued from here on wait for what stands before `mark`."""


class _Cuda(_Host):
    """The same of a CUDA device: graphs replay and events are recorded on the stream that is current there."""

    def new_pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def follow(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)


class _Schedule:
    """The tables of a walk at fixed addresses, and the evaluation at hand, which counts on the device."""

    def __init__(self, capacity: int, row: tuple[int, ...], head_row: tuple[int, ...], shift: int, engine: Engine):
        device = engine.device
        self.rows = torch.zeros(capacity, *row, device=device)
        self.head_rows = torch.zeros(capacity, *head_row, device=device)
        self.steps = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.shifts = torch.zeros(capacity, shift, dtype=engine.dtype, device=device)
        self.guidance = torch.zeros(capacity, 2, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """All but the counter."""
        return self.rows, self.head_rows, self.steps, self.shifts, self.guidance

    def fits(self, *tables: Tensor) -> bool:
        """Whether these tables can be written here."""
        pairs = zip(self.tables, tables, strict=True)
        return all(mine.shape[1:] == given.shape[1:] and len(mine) >= len(given) for mine, given in pairs)

    def write(self, *tables: Tensor) -> None:
        """Take these tables, in place."""
        for mine, given in zip(self.tables, tables, strict=True):
            mine[: len(given)] = given.to(mine)


class _State:
    """Buffers of one batch size, at fixed addresses, and the step over them."""

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        in_channels: int,
        dtype: torch.dtype,
        schedule: _Schedule,
        *,
        conditioned: bool,
        guided: bool,
    ):
        (channels, *size), device = shape, schedule.rows.device
        self.schedule = schedule
        self.latent = torch.zeros(count, *shape, device=device)
        self.history = torch.zeros(2, count, *shape, device=device)
        self.seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self.condition = torch.zeros(count, *shape, device=device) if conditioned else None
        padded = torch.zeros((1 + guided) * count, in_channels, *size, device=device, dtype=dtype)
        self.padded_input = padded.to(memory_format=torch.channels_last)
        self.network_input = self.padded_input[:count, :channels]
        self.condition_input = self.padded_input[:count, channels : 2 * channels]
        self.free_input = self.padded_input[count:, :channels]  # beside it the condition stays zero
        self.guided = guided
        self.replay: Step | None = None


class Engine:
    """`sample` for a U-Net, at the speed of the hardware: one prepared step over fixed buffers.

    The step reads its row of every table by a counter on the device, so that on CUDA one captured graph serves any schedule
    with no word between device and host. Batches are padded to a power of two there and share one memory pool. What depends
    on time alone, the embedding and its projections, is a table. Weights are taken anew, in place, whenever those of `network`
    changed (see `inference.Snapshot`); an engine follows its network to another device. One walk runs at a time: threads wait
    for each other, and a walk that a callback starts has tables and buffers of its own. Copies and pickles of an engine take its
    network and options.

    With C channels in the latent, `network` has 2 C outputs, the heads of noise_prediction and delta, or C, from which both
    predictions come; it reads C channels, or 2 C, of which the last C are a condition. See `ops.sampler_step`.

    Args:
        network: Keeps the weights; `inference.prepare` makes the copy that runs.
        options: See `EngineOptions`.
    """

    def __init__(self, network: UNet, options: EngineOptions | None = None):
        self.network, self.options = network, options or EngineOptions()
        self._lock, self._depth = threading.RLock(), 0
        self._settle()

    def __reduce__(self) -> tuple:
        return type(self), (self.network, self.options)

    def _settle(self) -> None:
        """Forget everything made, and belong to the device where the network lies."""
        self.device = next(self.network.parameters()).device
        self._queue = (_Cuda if self.device.type == "cuda" else _Host)(self.device)
        self.dtype = self.options.dtype or inference.fast_dtype(self.device)
        self._prepared = inference.Prepared(self.network, self.dtype, pack=not self.options.compile, tabulate=True)
        self._module: UNet | None = None
        self._capture_reasons: dict[str, str | None] = {}  # by what serves `sampler_step`
        self._states: dict[tuple, _State] = {}
        self._schedules: dict[int, _Schedule] = {}  # by depth: that of a walk, and of those that its callbacks start
        self._shifts: tuple[int, Tensor, Tensor] | None = None
        self._pool = self._queue.new_pool()
        self._finished: torch.cuda.Event | None = None

    def explain(self) -> str:
        """What the engine runs with and what it measured, a line each."""
        lines = [f"dtype: {self.dtype}", f"compile: {self.options.compile}", f"captured: {self._capture_reason or 'yes'}"]
        if self.device.type == "cuda" and self.dtype == torch.float32:
            precision = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
            lines.append("float32, as torch.backends has it: convolutions {}, matrix products {}".format(*precision))
        if self.device.type == "cpu":
            reason = "torch.compile lays them out" if self.options.compile else inference.why_not_packed()
            if self.dtype not in inference.PACKED_DTYPES:
                reason = f"oneDNN packs float32 and bfloat16, not {self.dtype}"
            lines.append(f"packed weights: {f'no: {reason}' if reason else 'yes'}")
        if (reason := inference.why_not_prepared(self.network)) is not None:
            lines.append(f"it does not walk: {reason}")
        return "\n".join(lines + [f"{name}: {choice}" for name, choice in self._prepared.report.items()])

    def _why_not_captured(self) -> str | None:
        if self.options.capture is not None:
            return None
        if self.device.type != "cuda":
            return f"no: graphs are captured on CUDA, the network is on {self.device.type}"
        latent, network_input, history, output, *others = next(iter(ops.find("sampler_step").examples()))[0]
        tensors = (latent, network_input.to(self.dtype), history, output.to(self.dtype), *others)
        served = ops.explain("sampler_step", *(tensor.to(self.device) for tensor in tensors))
        if served.startswith("sampler_step: reference"):  # reads the counter on the host
            logger.warning("sampling runs without a CUDA graph: %s", served)
            return f"no: {served}"
        return None

    @property
    def _capture_reason(self) -> str | None:
        wanted = ops.current_backend("sampler_step")
        if wanted not in self._capture_reasons:
            self._capture_reasons[wanted] = self._why_not_captured()
        return self._capture_reasons[wanted]

    @property
    def _captures(self) -> bool:
        return self._capture_reason is None

    @contextmanager
    def _walking(self) -> Iterator[None]:
        """The engine is the caller's and where its network is: one depth more, what a walk before left done."""
        with self._lock:
            device = next(self.network.parameters()).device
            if device.type == "meta":
                raise ValueError("the network has no weights, they are on the meta device: load them first")
            if (device != self.device or self.network is not self._prepared.network) and not self._depth:
                self._settle()
            with inference.ordinary_tensors(self.device), inference.on_device(self.device):
                self._depth += 1
                try:
                    if self._finished is not None:
                        self._queue.follow(self._finished)
                    yield
                finally:
                    self._finished = self._queue.mark()
                    self._depth -= 1

    def _drop_states(self, keys: Iterable[tuple]) -> None:
        """Forget captured steps. A pool whose graphs are gone may not be captured into again."""
        dropped = [self._states.pop(key) for key in list(keys)]
        if dropped:
            self._queue.synchronize()
            self._pool = self._queue.new_pool()

    def sample(
        self,
        rows: SamplerRows,
        head_rows: Tensor,
        times: Tensor,
        initial: Tensor,
        seeds: Tensor,
        *,
        condition: Tensor | None = None,
        guidance_rows: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Walk `initial` along the rows of a sampler.

        Args:
            rows, initial, seeds, callback: As for `sample`; the latent that a callback gets is a copy.
            head_rows: What stands between the network and the sampler at each row, (S, C, 6) for two heads and (S, C, 10) for
                one: see `ops.sampler_step`. The last columns, of the network's input, are those of the row's own evaluation.
            times: What the network takes as time step at each row, (S,).
            condition: What a network of 2 C input channels reads beside its C channels, (n, C, H, W), in float32 for the sampler.
            guidance_rows: (w, k) at each row, (S, 2): the output is (1 + w) output - w free, with `free` that of the network at
                latent + k condition beside a condition of zeros, in the same batch. None for the output as it is.

        Raises:
            ValueError: As of `sample`; tables or a condition too few or too many, a network that does not predict what is walked.
            RuntimeError: What the prepared step would not follow: see `inference.why_not_prepared`. `sample` does.
            MemoryError: The batch does not fit the device; says which to try.
        """
        seeds = check_start(rows, initial, seeds)
        lengths = {"head_rows": head_rows, "times": times, "guidance_rows": guidance_rows}
        for name, table in lengths.items():
            if table is not None and len(table) != len(rows):
                raise ValueError(f"{name} must have one row for each of {len(rows)} rows of the sampler, got {len(table)}")
        self._check_network(initial, condition, guidance_rows)
        if (reason := inference.why_not_prepared(self.network)) is not None:
            raise RuntimeError(f"the engine cannot walk: {reason}; the plain loop `sampling.sample` can")
        if not len(rows) or not len(initial):
            return initial
        with self._walking():
            count = len(initial)
            try:
                self._take_weights()
                schedule = self._written_schedule(rows, head_rows, times, guidance_rows)
                state = self._state(count, tuple(initial.shape[1:]), schedule, guided=guidance_rows is not None)
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                self._drop_states(self._states)
                smaller = max(count // 2, 1)
                raise MemoryError(f"a batch of {count} does not fit the device; try a batch of {smaller}: {error}") from error
            state.latent[:count] = initial
            state.seeds[:count] = seeds
            if condition is not None:
                state.condition[:count] = condition
                state.condition_input.copy_(state.condition)
            scale, offset, *on_condition = head_rows[0, :, _input_columns(head_rows), None, None].to(state.latent).unbind(1)
            first_input = scale * state.latent + offset
            state.network_input.copy_(first_input + on_condition[0] * state.condition if on_condition else first_input)
            state.history.zero_()
            schedule.counter.zero_()
            self._run(state, count, len(rows), callback)
            return state.latent[:count].to(initial.dtype, copy=True)

    def _check_network(self, initial: Tensor, condition: Tensor | None, guidance_rows: Tensor | None) -> None:
        channels, reads, predicts = initial.shape[1], self.network.down[0][0].in_channels, self.network.conv_out.out_channels
        if (reads, predicts) not in ((channels, 2 * channels), (channels, channels), (2 * channels, channels)):
            raise ValueError(f"no sampler walks {channels} channels by a network from {reads} to {predicts} channels")
        if (condition is not None) != (reads > channels):
            given = "none was" if condition is None else "one was"
            raise ValueError(f"the network reads {reads - channels} channels of a condition, {given} given")
        if condition is not None and condition.shape != initial.shape:
            raise ValueError(f"condition must be like initial {tuple(initial.shape)}, got {tuple(condition.shape)}")
        if guidance_rows is not None and condition is None:
            raise ValueError("guidance needs a network that reads a condition")

    def _run(self, state: _State, count: int, total: int, callback: Callback | None) -> None:
        marks: collections.deque[torch.cuda.Event] = collections.deque()
        for done in range(1, total + 1):
            state.replay()
            if (mark := self._queue.mark()) is not None:
                marks.append(mark)
                if len(marks) > self.options.run_ahead:
                    marks.popleft().synchronize()
            if callback is not None:
                callback(done, total, state.latent[:count].clone())

    def _take_weights(self) -> None:
        """The weights of now; where the layers are others, steps over the old are forgotten."""
        module = self._prepared.get()
        if module is not self._module:
            self._drop_states(self._states)
            self._module = module

    def _written_schedule(self, rows: SamplerRows, head_rows: Tensor, times: Tensor, guidance_rows: Tensor | None) -> _Schedule:
        """The tables of this walk, in place where they are large enough and the rows of the kind they were made for."""
        channel_rows, columns = head_rows.clone(), _input_columns(head_rows)
        channel_rows[:, :, columns] = head_rows[:, :, columns].roll(-1, dims=0)  # each step writes the input of the next
        guidance_rows = torch.zeros(len(rows), 2) if guidance_rows is None else guidance_rows
        tables = rows.coefficients, channel_rows, rows.steps, self._shift_table(times), guidance_rows
        schedule = self._schedules.get(self._depth)
        if schedule is None or not schedule.fits(*tables):
            self._drop_states([key for key in self._states if key[0] == self._depth])
            capacity = max(self.options.max_steps, inference.bucket(len(rows)))
            shapes = tuple(rows.coefficients.shape[1:]), tuple(head_rows.shape[1:]), tables[3].shape[1]
            schedule = self._schedules[self._depth] = _Schedule(capacity, *shapes, self)
        schedule.write(*tables)
        return schedule

    def _shift_table(self, times: Tensor) -> Tensor:
        """The shifts of all blocks at `times` (S,), side by side, (S, channels of all blocks)."""
        version = self._prepared.version
        if self._shifts is None or self._shifts[0] != version or not torch.equal(self._shifts[1], times):
            table = inference.shift_table(self._module, self.network, times.to(self.device, torch.float32))
            self._shifts = version, times.clone(), table.to(self.dtype)
        return self._shifts[2]

    def _state(self, count: int, shape: tuple[int, ...], schedule: _Schedule, *, guided: bool) -> _State:
        batch = inference.bucket(count) if self._captures else count
        served = tuple(ops.current_backend(op.name) for op in ops.all_ops())  # a captured step keeps the kernels it was made of
        key = (self._depth, batch, *shape, guided, served)
        if key not in self._states:
            if not self._captures:
                self._drop_states([other for other in self._states if other[0] == self._depth])
            conditioned = self.network.conv_out.out_channels == shape[0]
            state = _State(batch, shape, self._in_channels, self.dtype, schedule, conditioned=conditioned, guided=guided)
            # cuDNN keeps the first plan it makes for a shape; every bucket is one more compilation of the same code
            with _searching_algorithms(), self._room_to_compile():
                self._build(state)
            self._states[key] = state
        return self._states[key]

    def _room_to_compile(self) -> AbstractContextManager:
        return torch._dynamo.config.patch(recompile_limit=64) if self.options.compile else nullcontext()

    @property
    def _in_channels(self) -> int:
        conv_in = self._module.down[0][0]
        return getattr(conv_in, "in_channels", self.network.down[0][0].in_channels)

    def _build(self, state: _State) -> None:
        """Measure what is chosen by measurement, then compile and capture."""
        schedule = state.schedule
        schedule.counter.zero_()
        size = inference.bucket(len(state.padded_input)), *state.padded_input.shape[1:]
        self._prepared.measure(size, functools.partial(self._forward, self._run_network, state))
        with ops.measuring():
            self._forward(self._run_network, state)
        run = self._run_network
        if self.options.compile:
            mode = "max-autotune-no-cudagraphs" if self.device.type == "cuda" else "default"
            run = torch.compile(run, fullgraph=True, dynamic=False, mode=mode)
            self._forward(run, state)

        def step() -> None:
            output = self._forward(run, state)
            tensors = (state.latent, state.network_input, state.history, output)
            tables = (schedule.rows, schedule.head_rows, schedule.steps, schedule.counter)
            ops.sampler_step(*tensors, *tables, state.seeds, state.condition)
            schedule.counter.add_(1)

        capture = self.options.capture or (capture_cuda_graph if self._captures else None)
        state.replay = step if capture is None else capture(step, self._pool)

    def _forward(self, run: Callable[..., Tensor], state: _State) -> Tensor:
        schedule = state.schedule
        shifts = schedule.shifts.index_select(0, schedule.counter).expand(len(state.padded_input), -1)
        shifts = shifts.split(inference.shift_widths(self.network), dim=1)
        if not state.guided:
            return run(state.padded_input, shifts)
        guidance, on_condition = schedule.guidance.index_select(0, schedule.counter).unbind(1)
        state.free_input.copy_(state.latent + on_condition * state.condition)
        output, free = run(state.padded_input, shifts).float().chunk(2)
        return (1 + guidance) * output - guidance * free

    def _run_network(self, network_input: Tensor, shifts: tuple[Tensor, ...]) -> Tensor:
        return self._module.run(network_input, iter(shifts))
