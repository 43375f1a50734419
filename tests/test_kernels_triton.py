"""The Triton kernels: their parity, run by Triton's interpreter where there is no GPU, and what they compile to for GPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("runs the interpreter itself, in a process of its own", allow_module_level=True)

from multibeta.kernels import group_norm_act, sampler_update  # noqa: E402

ROOT = Path(__file__).parents[1]


def run_parity(**environment):
    files = [str(path) for path in sorted((ROOT / "tests" / "interpreted").glob("*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, cwd=ROOT / "tests", env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_parity_interpreted():
    run_parity(TRITON_INTERPRET="1")  # before triton is imported, and so in another process


@pytest.mark.gpu
def test_parity_on_the_device():
    run_parity()


@pytest.fixture(scope="module")
def aot():
    spec = importlib.util.spec_from_file_location("aot", ROOT / "bench" / "aot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


U_NET = group_norm_act.EXAMPLES[:13]
WORST = ((1024, 1024), (1536, 256), (2560, 64), (128, 256**2))  # full tiles, padded groups, small maps, split


def check_rows(rows):
    for row in rows:
        assert row["spill_bytes"] == 0, row
        if "join" not in row["kernel"]:  # which reads partial sums, a part in a thousand of the map
            assert row["load_bits"] == 128, row
            assert row["store_bits"] == 128 or row["kernel"] == "block_sums", row  # which stores sums alone


@pytest.mark.parametrize("shape", group_norm_act.EXAMPLES, ids=str)
def test_no_register_spills_and_accesses_are_whole_on_sm_90(shape, aot):
    check_rows(aot.group_norm_act_rows(shape, torch.bfloat16, 90))


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("shape", WORST, ids=str)
def test_no_register_spills_and_accesses_are_whole_on_other_gpus(shape, capability, aot):
    check_rows(aot.group_norm_act_rows(shape, torch.bfloat16, capability))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "channels_last"), (torch.float16, "channels_last"), (torch.bfloat16, "contiguous")],
    ids=str,
)
@pytest.mark.parametrize("shape", WORST, ids=str)
def test_no_register_spills_and_accesses_are_whole_in_other_dtypes_and_layouts(shape, dtype, layout, aot):
    check_rows(aot.group_norm_act_rows(shape, dtype, 90, layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", WORST, ids=str)
def test_no_register_spills_and_accesses_are_whole_in_a_slice(shape, dtype, aot):
    rows = aot.group_norm_act_into_rows(shape, dtype, 90)
    check_rows([row for row in rows if row["kernel"] != "block_moments"])  # which stores moments alone


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
    assert all(row["spill_bytes"] == 0 for row in rows)


@pytest.mark.parametrize("shape", U_NET, ids=str)
def test_every_map_of_the_u_net_is_normalised_in_one_pass(shape):
    plan = group_norm_act.configuration(*shape, 32, 2, "channels_last")
    assert plan.kind == "one-pass"
    row_bytes = plan.chunk * (shape[0] // 32) * 2
    assert row_bytes >= 64 or 2 * plan.chunk * plan.block_pixels * triton.next_power_of_2(shape[0] // 32) > 32768


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU are declined for want of a GPU")
def test_tensors_on_the_cpu_are_declined():
    x, affine = torch.randn(1, 8, 2, 2), torch.ones(8)
    assert group_norm_act.accepts_group_norm_act(x, affine, affine, 2) == "x is on cpu, Triton needs a CUDA device"
    reason = sampler_update.accepts_sampler_update(x, x, x, torch.zeros(6), torch.zeros(1).long(), 1)
    assert reason == "x is on cpu, Triton needs a CUDA device"
