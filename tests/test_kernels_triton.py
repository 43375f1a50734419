"""The Triton kernels: their parity, run by Triton's interpreter where there is no GPU, and what they compile to for GPUs."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("runs the interpreter itself, in a process of its own", allow_module_level=True)

from multibeta.kernels import group_norm_act, sampler_update  # noqa: E402
from multibeta.kernels.columns import SAMPLER_COLUMNS, TWO_HEAD_COLUMNS  # noqa: E402

ROOT = Path(__file__).parents[1]


def run_parity(**environment):
    files = [str(path) for path in sorted((ROOT / "tests" / "interpreted").glob("*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, cwd=ROOT / "tests", env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_parity_interpreted():
    run_parity(TRITON_INTERPRET="1")  # before triton is imported, and so in another process


@pytest.mark.parametrize("module", [group_norm_act, sampler_update])
def test_loops_of_kernels_are_bounded_by_constants(module):
    """Beside numpy 2.4 or newer, the interpreter of Triton 3.6 has no loop over a number on the device."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for kernel in tree.body:
        if isinstance(kernel, ast.FunctionDef) and "triton.jit" in "".join(map(ast.unparse, kernel.decorator_list)):
            loops = [node.iter for node in ast.walk(kernel) if isinstance(node, ast.For)]
            bounds = [name.id for loop in loops for name in ast.walk(loop) if isinstance(name, ast.Name)]
            assert all(name.isupper() or name == "range" for name in bounds)


@pytest.mark.gpu
def test_parity_on_the_device():
    run_parity()


@pytest.fixture(scope="module")
def aot():
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("aot")
    sys.path.remove(str(ROOT / "bench"))


U_NET = group_norm_act.EXAMPLES[:13]
WORST = ((1024, 1024), (1536, 256), (2560, 64), (128, 256**2))  # full tiles, padded groups, small maps, split


def check_rows(rows):
    for row in rows:
        # Triton 3.8 and 3.9 put up to four of the 64 float32 values of a full tile aside, which costs less than a second read.
        allowed = 16 if (row["dtype"], row["layout"]) == ("float32", "channels_last") else 0
        assert row["spill_bytes"] <= allowed, row
        if "join" not in row["kernel"]:  # which reads partial sums, a part in a thousand of the map
            assert row["load_bits"] == 128, row
            assert row["store_bits"] == 128 or row["kernel"] in ("block_sums", "block_moments"), row  # which may store sums alone
        # Five numbers a channel; a thread that holds 64 values in whole accesses holds so many channels at most.
        assert row["narrow_loads"] <= 5 * 64 * (4 if row["dtype"] == "float32" else 2) // 16, row


@pytest.mark.parametrize("shape", group_norm_act.EXAMPLES, ids=str)
def test_no_register_spills_and_accesses_are_whole_on_sm_90(shape, aot):
    check_rows(aot.group_norm_act_rows(shape, torch.bfloat16, 90))


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("shape", WORST, ids=str)
def test_no_register_spills_and_accesses_are_whole_on_other_gpus(shape, capability, aot):
    check_rows(aot.group_norm_act_rows(shape, torch.bfloat16, capability))


FULL = ((512, 1024), (1024, 1024), (256, 64**2))  # tiles at the limit, where contiguous float32 would spill


@pytest.mark.parametrize(
    ("dtype", "layout", "shapes"),
    [
        (torch.float32, "channels_last", (*WORST, (768, 1024))),
        (torch.float16, "channels_last", WORST),
        (torch.bfloat16, "contiguous", WORST),
        (torch.float32, "contiguous", (*WORST, *FULL)),
    ],
    ids=str,
)
def test_no_register_spills_and_accesses_are_whole_in_other_dtypes_and_layouts(dtype, layout, shapes, aot):
    for shape in shapes:
        check_rows(aot.group_norm_act_rows(shape, dtype, 90, layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", WORST, ids=str)
def test_no_register_spills_and_accesses_are_whole_in_a_slice(shape, dtype, aot):
    check_rows(aot.group_norm_act_pair_rows(shape, dtype, 90))


# Sizes of one are compile-time constants to the launcher, which the interpreter does not show.
@pytest.mark.parametrize(("shape", "groups"), [((48, 1), 8), ((1, 1), 1), ((1, 2**16), 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes_of_one_compile(shape, groups, layout, aot):
    assert aot.group_norm_act_rows(shape, torch.float32, 90, groups=groups, layout=layout)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("samples", "shape"), [(8, (4, 32, 32)), (1, (1, 1, 1))])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("heads", [2, 1])
def test_sampler_kernels_compile_without_spills(samples, shape, capability, per_channel, heads, aot):
    rows = aot.sampler_rows(samples, shape, capability, per_channel=per_channel, heads=heads)
    assert [row["kernel"] for row in rows] == ["sampler_update", "sampler_step"]
    for row in rows:
        # Sine and cosine reduce angles beyond 10^5, which never come, in an array of 28 bytes: a stack, on a path not taken.
        # Under Triton 3.8 the step for sm_100, of 48 registers, puts two more words beside it.
        assert row["spill_bytes"] <= (8 if capability == 100 else 0)
        assert row["stack_bytes"] - row["spill_bytes"] in (0, 32)


@pytest.mark.parametrize(("channels", "pixels"), [(256, 64), (128, 256**2)])  # one-pass, split
def test_one_compilation_serves_every_batch(channels, pixels, aot, monkeypatch):
    affine, table = torch.empty(channels), torch.empty(2, 14080)
    monkeypatch.setattr(group_norm_act.launch, "l2_bytes", lambda device: 1)  # rounds that start at any sample
    with aot.compiling(90) as compiled:
        for n in (1, 2, 16, 33):
            x = torch.empty(n, channels, pixels, 1).contiguous(memory_format=torch.channels_last)
            shift = table[:1, 256 : 256 + channels].expand(n, -1) if n > 2 else table[:n, 256 : 256 + channels]
            group_norm_act.infer_sum(x, None, affine, affine, 32, 1e-6, shift, affine, x, "silu")
    kinds = {name for name, _ in compiled}
    assert len({id(kernel) for _, kernel in compiled}) == len(kinds)


def test_one_compilation_of_the_sampler_serves_every_batch(aot):
    with aot.compiling(90) as compiled:
        for n in (1, 2, 16, 33):
            latent, history = torch.zeros(n, 4, 32, 32), torch.zeros(2, n, 4, 32, 32)
            tables = (
                torch.zeros(7, SAMPLER_COLUMNS),
                torch.zeros(7, 4, TWO_HEAD_COLUMNS),
                torch.zeros(7).long(),
                torch.zeros(1).long(),
            )
            output = torch.empty(n, 8, 32, 32).contiguous(memory_format=torch.channels_last)
            sampler_update.sampler_step(latent, torch.empty_like(latent), history, output, *tables, torch.zeros(n).long())
            for step in (1, 7, 16):
                sampler_update.sampler_update(latent, latent, latent, torch.zeros(SAMPLER_COLUMNS), torch.zeros(n).long(), step)
    assert len({id(kernel) for _, kernel in compiled}) == 2


LAUNCHES = """
import launch_cost
rows = launch_cost.measured(repetitions=1, calls=2)
print({name: row["launches"] for name, row in rows.items()})
"""


def test_launches_of_each_call():
    path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-P", "-c", LAUNCHES]
    run = subprocess.run(command, cwd=ROOT / "bench", env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    launches = ast.literal_eval(run.stdout)
    forward = {name: count for name, count in launches.items() if "backward" not in name}
    norms = {"one-pass": 1, "split": 3, "pair": 2}
    with_sums = {f"{name}, x_bias and residual": count for name, count in norms.items()}
    assert forward == norms | with_sums | {"sampler_step": 1, "sampler_update": 1}
    assert launches["one-pass, with backward"] == 2 and launches["split, with backward"] == 6


@pytest.mark.parametrize("shape", U_NET, ids=str)
def test_every_map_of_the_u_net_is_normalised_in_one_pass(shape):
    plan = group_norm_act.configuration(*shape, 32, 2, "channels_last")
    assert plan.kind == "one-pass"
    row_bytes = plan.chunk * (shape[0] // 32) * 2
    assert row_bytes >= 32 or 2 * plan.chunk * plan.block_pixels * triton.next_power_of_2(shape[0] // 32) > 32768


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU are declined for want of a GPU")
def test_tensors_on_the_cpu_are_declined():
    x, affine = torch.randn(1, 8, 2, 2), torch.ones(8)
    assert group_norm_act.accepts_group_norm_act(x, affine, affine, 2) == "x is on cpu, Triton needs a CUDA device"
    reason = sampler_update.accepts_sampler_update(x, x, x, torch.zeros(6), torch.zeros(1).long(), 1)
    assert reason == "x is on cpu, Triton needs a CUDA device"


def test_fake_tensors_reach_no_launch(monkeypatch):
    def launched(self, *args, **kwargs):
        raise AssertionError("a launch")

    monkeypatch.setattr(type(group_norm_act._one_pass_forward), "run", launched)
    with FakeTensorMode():
        x = torch.empty(2, 64, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        affine, shift = torch.empty(2, 128), torch.empty(2, 64)
        part = affine[:, :64]
        for large in (x, torch.empty(2, 64, 256, 256)):
            y, total = group_norm_act.group_norm_act(large, *part, 8, shift=shift, x_bias=part[0], residual=large)
            assert y.stride() == total.stride() == large.stride()
            leaf = large.detach().requires_grad_()
            y, total = group_norm_act.group_norm_act(leaf, *part, 8, residual=large)
            assert torch.autograd.grad(y.sum() + total.sum(), leaf)[0].stride() == large.stride()
        y, total = group_norm_act.group_norm_act_pair(x, x, *affine, 8, residual=x)
        assert y.shape == (2, 128, 8, 8) and total.shape == x.shape

        latent, index = torch.empty(2, 4, 8, 8), torch.empty(2, dtype=torch.int64)
        row = torch.empty(4, SAMPLER_COLUMNS)
        update = sampler_update.sampler_update(latent, latent, latent, row, index, 7, previous=(latent, latent))
        assert update.shape == latent.shape
        output = torch.empty(2, 8, 8, 8)
        tables = (row[None], torch.empty(1, 4, TWO_HEAD_COLUMNS), index[:1], index[:1])
        sampler_update.sampler_step(latent, latent, torch.empty(2, *latent.shape), output, *tables, index)
