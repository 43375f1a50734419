"""`sample` for a U-Net, at the speed of the hardware."""

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
from multibeta.basis import from_coefficients, to_coefficients
from multibeta.inference import CudaHost, Host, Step, capture_cuda_graph, is_out_of_memory, searching_algorithms
from multibeta.networks import UNet
from multibeta.sampling.loop import Callback, Predictions, check_start
from multibeta.sampling.state import Schedule, State
from multibeta.schedules import SamplerRows

logger = logging.getLogger("multibeta")


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

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.float64, float32, bfloat16 or float16, or None, got {self.dtype!r}")
        if self.capture is not None and not callable(self.capture):
            raise ValueError(f"capture must turn a step into what replays it, got {self.capture!r}")
        for name, value in (("max_steps", self.max_steps), ("run_ahead", self.run_ahead)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


class Engine:
    """`sample` for a U-Net, at the speed of the hardware: one prepared step over fixed buffers.

    The step reads its row of every table by a counter on the device, so that on CUDA one captured graph serves any schedule
    with no word between device and host. Batches are padded to a power of two there and share one memory pool. What depends
    on time alone, the embedding and its projections, is a table. Weights are taken anew, in place, whenever those of `network`
    changed (see `inference.Snapshot`); an engine follows its network to another device. One trajectory runs at a time: threads
    wait for each other, and one that a callback starts has tables and buffers of its own. Copies and pickles of an engine take
    its network and options.

    In a basis the walk is of coefficients, each a channel of one pixel; the network reads and predicts pixels.

    With C channels in the latent, `network` has 2 C outputs, the heads of noise_prediction and delta, or C, from which both
    predictions come; it reads C channels, or 2 C, of which the last C are a condition. See `ops.sampler_step`.

    Args:
        network: Keeps the weights; `inference.prepare` makes the copy that runs.
        options: See `EngineOptions`.
        basis: As of `sample`; the head rows are then of the C H W coefficients of a latent as well.
    """

    def __init__(self, network: UNet, options: EngineOptions | None = None, basis: Tensor | None = None) -> None:
        self.network, self.options, self.basis = network, options or EngineOptions(), basis
        self._lock, self._depth = threading.RLock(), 0
        self._settle()

    def __reduce__(self) -> tuple:
        return type(self), (self.network, self.options, self.basis)

    def _settle(self) -> None:
        """Forget everything made, and belong to the device where the network lies."""
        self.device = next(self.network.parameters()).device
        self._queue = (CudaHost if self.device.type == "cuda" else Host)(self.device)
        self.dtype = self.options.dtype or inference.fast_dtype(self.device)
        self._matrix = None if self.basis is None else self.basis.to(self.device, torch.float32)
        self._prepared = inference.Prepared(self.network, self.dtype, pack=not self.options.compile, tabulate=True)
        self._module: UNet = self.network  # until a prepared copy takes its place
        self._capture_reasons: dict[str, str | None] = {}  # by what serves `sampler_step`
        self._states: dict[tuple, State] = {}
        self._schedules: dict[int, Schedule] = {}  # by depth: that of a trajectory, and of those that its callbacks start
        self._shifts: tuple[int, Tensor, Tensor] | None = None
        self._pool = self._queue.new_pool()
        self._finished: torch.cuda.Event | None = None

    def explain(self) -> str:
        """What the engine runs with and what it measured, a line each."""
        lines = [f"dtype: {self.dtype}", f"compile: {self.options.compile}", f"captured: {self._capture_reason or 'yes'}"]
        if self.device.type == "cuda" and self.dtype == torch.float32:
            cudnn = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
            precision = cudnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
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
    def _running(self) -> Iterator[None]:
        """The engine is the caller's and where its network is: one depth more, what a trajectory before left done."""
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
        on_predictions: Predictions | None = None,
    ) -> Tensor:
        """Take `initial` through the rows of a sampler.

        Args:
            rows, initial, seeds, callback, on_predictions: As for `sample`; what they get are copies.
            head_rows: What stands between the network and the sampler at each row: packed `ops.TwoHeadRow`s (S, C, 9), with a
                basis (S, C H W, 9), or `ops.OneHeadRow`s (S, C, 10), whose network input is that of the row's own evaluation.
            times: What the network takes as time step at each row, (S,), or with spans (S, 2).
            condition: What a network of 2 C input channels reads next to the latent, (n, C, H, W), in float32 for the sampler.
            guidance_rows: A packed `ops.GuidanceRow` for each row, (S, 2); the free output is computed in the same batch. None
                for the output as it is.

        Raises:
            ValueError: As of `sample`; tables or a condition too few or too many, a network that does not predict it.
            RuntimeError: What the prepared step would not follow: see `inference.why_not_prepared`. `sample` does.
            MemoryError: The batch does not fit the device; says which to try.
        """
        seeds, coefficients = check_start(initial, seeds, self.basis), rows.of_latent(initial.shape[1], self.basis)
        lengths = {"head_rows": head_rows, "times": times, "guidance_rows": guidance_rows}
        for name, table in lengths.items():
            if table is not None and len(table) != len(rows):
                raise ValueError(f"{name} must have one row for each of {len(rows)} rows of the sampler, got {len(table)}")
        self._check_network(initial, condition, guidance_rows)
        if (reason := inference.why_not_prepared(self.network)) is not None:
            raise RuntimeError(f"the engine cannot walk: {reason}; the plain loop `sampling.sample` can")
        if not len(rows) or not len(initial):
            return initial
        with self._running():
            count = len(initial)
            try:
                self._take_weights()
                schedule = self._written_schedule(coefficients, head_rows, rows.steps, times, guidance_rows)
                state = self._state(count, tuple(initial.shape[1:]), schedule, guided=guidance_rows is not None)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._drop_states(self._states)
                smaller = max(count // 2, 1)
                raise MemoryError(f"a batch of {count} does not fit the device; try a batch of {smaller}: {error}") from error
            state.latent[:count] = self._coefficients(initial)
            state.seeds[:count] = seeds
            if condition is not None:
                assert state.condition is not None, "the network predicts from it"
                state.condition[:count] = condition
                state.condition_input.copy_(state.condition)
            first = ops.head_row(head_rows[0, :, None, None].to(state.latent))
            network_input = first.input_from_latent * state.latent + first.input_offset
            if isinstance(first, ops.OneHeadRow):
                assert state.condition is not None, "one head"
                network_input = network_input + first.input_from_condition * state.condition
            state.next_input.copy_(network_input)
            state.history.zero_()
            schedule.counter.zero_()
            self._run(state, count, len(rows), callback, on_predictions)
            return self._pixels(state.latent[:count]).to(initial.dtype, copy=True)

    def _check_network(self, initial: Tensor, condition: Tensor | None, guidance_rows: Tensor | None) -> None:
        channels, reads, predicts = initial.shape[1], self.network.conv_in.in_channels, self.network.conv_out.out_channels
        if (reads, predicts) not in ((channels, 2 * channels), (channels, channels), (2 * channels, channels)):
            raise ValueError(f"no sampler walks {channels} channels by a network from {reads} to {predicts} channels")
        if (condition is not None) != (reads > channels):
            given = "none was" if condition is None else "one was"
            raise ValueError(f"the network reads {reads - channels} channels of a condition, {given} given")
        if condition is not None and condition.shape != initial.shape:
            raise ValueError(f"condition must be like initial {tuple(initial.shape)}, got {tuple(condition.shape)}")
        if condition is not None and self.basis is not None:
            raise ValueError("a condition is of pixels, and this engine walks coefficients in a basis")
        if guidance_rows is not None and condition is None:
            raise ValueError("guidance needs a network that reads a condition")

    def _coefficients(self, maps: Tensor) -> Tensor:
        """What a step walks of float32 maps (N, C, H, W): (N, C H W, 1, 1) in a basis."""
        return maps if self._matrix is None else to_coefficients(maps.to(self._matrix), self._matrix)

    def _pixels(self, walked: Tensor) -> Tensor:
        """The inverse of `_coefficients`."""
        return walked if self._matrix is None else from_coefficients(walked, self._matrix)

    def _run(self, state: State, count: int, total: int, callback: Callback | None, on_predictions: Predictions | None) -> None:
        marks: collections.deque[torch.cuda.Event] = collections.deque()
        for done in range(1, total + 1):
            state.replay()
            if (mark := self._queue.mark()) is not None:
                marks.append(mark)
                if len(marks) > self.options.run_ahead:
                    marks.popleft().synchronize()
            if on_predictions is not None:
                on_predictions(*(self._pixels(maps[:count].clone()) for maps in state.history))
            if callback is not None:
                callback(done, total, self._pixels(state.latent[:count].clone()))

    def _take_weights(self) -> None:
        """The weights of now; where the layers are others, steps over the old are forgotten."""
        module = self._prepared.get()
        if module is not self._module:
            self._drop_states(self._states)
            self._module = module

    def _written_schedule(
        self, rows: Tensor, head_rows: Tensor, steps: Tensor, times: Tensor, guidance_rows: Tensor | None
    ) -> Schedule:
        """The tables of this trajectory, in place where they are large enough and rows of their shape."""
        if guidance_rows is None:
            guidance_rows = ops.pack(ops.GuidanceRow(0, 0), (len(rows),))
        tables = rows, ops.with_next_input(head_rows), steps, self._shift_table(times), guidance_rows
        schedule = self._schedules.get(self._depth)
        if schedule is None or not schedule.fits(*tables):
            self._drop_states([key for key in self._states if key[0] == self._depth])
            capacity = max(self.options.max_steps, inference.bucket(len(rows)))
            shapes = tuple(rows.shape[1:]), tuple(head_rows.shape[1:]), tables[3].shape[1]
            schedule = self._schedules[self._depth] = Schedule(capacity, *shapes, self.device, self.dtype)
        schedule.write(*tables)
        return schedule

    def _shift_table(self, times: Tensor) -> Tensor:
        """The shifts of all blocks at `times` (S,), side by side, (S, channels of all blocks)."""
        version = self._prepared.version
        if self._shifts is None or self._shifts[0] != version or not torch.equal(self._shifts[1], times):
            table = inference.shift_table(self._module, self.network, times.to(self.device, torch.float32))
            self._shifts = version, times.clone(), table.to(self.dtype)
        return self._shifts[2]

    def _state(self, count: int, shape: tuple[int, ...], schedule: Schedule, *, guided: bool) -> State:
        batch = inference.bucket(count) if self._captures else count
        served = tuple(ops.current_backend(op.name) for op in ops.all_ops())  # a captured step keeps the kernels it was made of
        key = (self._depth, batch, *shape, guided, served)
        if key not in self._states:
            if not self._captures:
                self._drop_states([other for other in self._states if other[0] == self._depth])
            conditioned = self.network.conv_out.out_channels == shape[0]
            parted = self.basis is not None
            state = State(
                batch, shape, self._in_channels, self.dtype, schedule, conditioned=conditioned, guided=guided, parted=parted
            )
            # cuDNN keeps the first plan it makes for a shape; every bucket is one more compilation of the same code
            with searching_algorithms(), self._room_to_compile():
                self._build(state)
            self._states[key] = state
        return self._states[key]

    def _room_to_compile(self) -> AbstractContextManager:
        return torch._dynamo.config.patch(recompile_limit=64) if self.options.compile else nullcontext()

    @property
    def _in_channels(self) -> int:
        return getattr(self._module.conv_in, "in_channels", self.network.conv_in.in_channels)

    def _build(self, state: State) -> None:
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
            if state.next_input is not state.network_input:
                state.network_input.copy_(self._pixels(state.next_input))
            output = self._coefficients(self._forward(run, state))
            tensors = (state.latent, state.next_input, state.history, output)
            tables = (schedule.rows, schedule.head_rows, schedule.steps, schedule.counter)
            ops.sampler_step(*tensors, *tables, state.seeds, state.condition)
            schedule.counter.add_(1)

        capture = self.options.capture or (capture_cuda_graph if self._captures else None)
        state.replay = step if capture is None else capture(step, self._pool)

    def _forward(self, run: Callable[..., Tensor], state: State) -> Tensor:
        schedule = state.schedule
        shifts = schedule.shifts.index_select(0, schedule.counter).expand(len(state.padded_input), -1)
        shifts = shifts.split(inference.shift_widths(self.network), dim=1)
        if not state.guided:
            return run(state.padded_input, shifts)
        guidance = ops.GuidanceRow(*schedule.guidance.index_select(0, schedule.counter).unbind(-1))
        assert state.condition is not None, "guidance needs it"
        state.free_input.copy_(state.latent + guidance.latent_from_condition * state.condition)
        output, free = run(state.padded_input, shifts).float().chunk(2)
        return (1 + guidance.weight) * output - guidance.weight * free

    def _run_network(self, network_input: Tensor, shifts: tuple[Tensor, ...]) -> Tensor:
        return self._module.run(network_input, iter(shifts))
