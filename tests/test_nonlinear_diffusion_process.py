import math
from types import SimpleNamespace

import pytest
import torch
from processes import in_processes
from torch import Tensor

from multibeta import checkpoints
from multibeta.nonlinear_diffusion import (
    DiffusionConfig,
    NonlinearDiffusion,
    NonlinearDiffusionObjective,
    between,
    encoding_table,
    interval_of,
    table_nodes,
    table_statistics,
)
from multibeta.schedules import BetaGrid, stratified_steps

STEPS = 40
SIGMAS = torch.exp(torch.linspace(-4, 0, STEPS + 1))
GRID = BetaGrid(STEPS)
MIXING = torch.randn(3, 3, generator=torch.Generator().manual_seed(9))


class Images:
    """Images (N, 3, 4, 4) as a dataset."""

    resolution, channels = 4, 3

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Tensor) -> Tensor:
        return self.pixels[torch.as_tensor(indices)]


IMAGES = Images(torch.randint(0, 256, (96, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))


def encode(images: Tensor, beta: float | Tensor) -> Tensor:
    """Curved in beta, other in every channel, and gone at beta = 1."""
    t = torch.as_tensor(beta, dtype=torch.float32).expand(len(images)).view(-1, 1, 1, 1)
    return (1 - t**2) * (images + 0.5) + t * (1 - t) * torch.einsum("dc,nchw->ndhw", MIXING, images)


def build(**fields) -> NonlinearDiffusion:
    torch.manual_seed(0)
    config = DiffusionConfig(
        latent_channels=3, latent_resolution=4, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
        attention_resolutions=(), head_channels=8, num_groups=4, num_steps=STEPS, **fields,
    )  # fmt: skip
    return NonlinearDiffusion(config)


def made(intervals: int) -> tuple[Tensor, Tensor]:
    nodes = table_nodes(STEPS, intervals)
    return nodes, encoding_table(encode, IMAGES, nodes, GRID, progress=False)


def linear(nodes: Tensor, table: Tensor, step: int) -> Tensor:
    """f(x, t) by what the words say: on the line between the nodes around a step."""
    right = next(k for k in range(1, len(nodes)) if nodes[k] >= step)
    low, high = int(nodes[right - 1]), int(nodes[right])
    return table[:, right - 1].float() * (high - step) / (high - low) + table[:, right].float() * (step - low) / (high - low)


def shared_table(folder):
    """The table that this process gets, of which it encodes its turns of 20 images, and how many images it has encoded."""
    nodes, seen = table_nodes(STEPS, 2), []

    def counted(images, beta):
        seen.append(len(images))
        return encode(images, beta)

    def compute():
        return {"table": encoding_table(counted, IMAGES, nodes, GRID, at_once=20, progress=False)}

    found = [checkpoints.stored(folder / "kept", {"nodes": 2}, compute, together=True)["table"] for _ in range(2)]
    return torch.equal(*found), found[0], sum(seen) // len(nodes)


def test_processes_share_the_table_and_keep_it_once(tmp_path):
    _, expected, whole = shared_table(tmp_path / "one")
    assert whole == 96
    (tmp_path / "two").mkdir()
    told = in_processes(2, shared_table, tmp_path / "two", folder=tmp_path)
    assert all(alike and torch.equal(table, expected) for alike, table, _ in told)
    assert [seen for *_, seen in told] == [56, 40]


def test_the_table_holds_the_encodings_at_its_nodes():
    nodes, table = made(7)
    assert nodes.tolist() == [0, 6, 11, 17, 23, 29, 34, 40] and table.shape == (96, 8, 3, 4, 4)
    images = IMAGES.images(range(96)) / 127.5 - 1
    for k, node in enumerate(nodes.tolist()):
        torch.testing.assert_close(table[:, k].float(), encode(images, node / STEPS), rtol=1e-3, atol=1e-3)
    assert table_nodes(3, 100).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("step", [1, 6, 7, 11, 39, 40])
def test_between_its_nodes_the_process_is_linear(step):
    nodes, table = made(7)
    steps = torch.full((96,), step)
    interval, _ = interval_of(nodes, steps)
    rows = torch.arange(96)
    encoding, previous = between(nodes, steps, table[rows, interval], table[rows, interval + 1])
    torch.testing.assert_close(encoding, linear(nodes, table, step))
    torch.testing.assert_close(previous, linear(nodes, table, step - 1), rtol=1e-4, atol=1e-5)


def test_the_statistics_are_those_of_the_process_at_every_step():
    nodes, table = made(7)
    mean, deviation, rms = table_statistics(table, nodes)
    assert mean.shape == deviation.shape == rms.shape == (STEPS + 1, 3)
    for step in range(1, STEPS + 1):
        encoding, previous = linear(nodes, table, step), linear(nodes, table, step - 1)
        torch.testing.assert_close(mean[step], encoding.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deviation[step], encoding.std((0, 2, 3), correction=0).clamp(min=1e-4), rtol=1e-3, atol=1e-4)
        velocity = ((previous - encoding) * STEPS).square().mean((0, 2, 3)).sqrt()
        torch.testing.assert_close(rms[step], velocity, rtol=1e-3, atol=1e-3)


def test_still_encodings_divide_nothing_by_zero():
    _, deviation, rms = table_statistics(torch.zeros(4, 8, 3, 4, 4), table_nodes(STEPS, 7))
    assert (deviation > 0).all() and (rms > 0).all()


class TestObjective:
    def objective(self, table: Tensor | None, **fields) -> NonlinearDiffusionObjective:
        nodes, values = made(7)
        diffusion = build()
        diffusion.set_process(SIGMAS, *table_statistics(values, nodes))
        return NonlinearDiffusionObjective(diffusion, encode, nodes=7, table=table, **fields)

    def batch(self, held_out: bool = False) -> SimpleNamespace:
        indices = torch.arange(96).flip(0)
        return SimpleNamespace(images=IMAGES.images(indices) / 127.5 - 1, indices=indices, progress=0.0, held_out=held_out)

    def test_the_table_changes_nothing_but_the_time(self):
        losses = [self.objective(table)(self.batch(), torch.Generator().manual_seed(0))[0].item() for table in (None, made(7)[1])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] == pytest.approx(2, abs=0.2)

    def test_held_out_images_are_not_looked_up(self):
        poisoned = torch.full_like(made(7)[1], torch.nan)
        objective = self.objective(poisoned)
        assert objective(self.batch(held_out=True), torch.Generator().manual_seed(0))[0].isfinite()
        assert not objective(self.batch(), torch.Generator().manual_seed(0))[0].isfinite()

    def test_a_table_of_other_nodes_is_refused(self):
        with pytest.raises(ValueError, match="a table of 6 nodes needs nodes=5, got 7"):
            self.objective(made(5)[1])


class TestWhichTimes:
    def test_a_process_of_the_cosine_schedule_turns_evenly(self):
        diffusion = build()
        angle = torch.linspace(0.01, math.pi / 2 - 0.01, STEPS + 1)
        deviation = angle.cos()[:, None].expand(-1, 3)
        diffusion.set_process(angle.sin(), torch.zeros(STEPS + 1, 3), deviation, torch.ones(STEPS + 1, 3))
        turn = (math.pi / 2 - 0.02) / STEPS
        torch.testing.assert_close(diffusion.turns(), torch.full((STEPS, 3), turn), rtol=1e-3, atol=0)

    def test_steps_have_the_probability_of_their_weights(self):
        weights = torch.tensor([0.5, 0.0, 0.125, 0.375], dtype=torch.float64)
        steps = stratified_steps(4000, 1, 4, torch.Generator().manual_seed(0), weights)
        assert (torch.bincount(steps, minlength=5) - torch.tensor([0, 2000, 0, 500, 1500])).abs().max() <= 1

    def test_an_even_share_is_the_uniform_draw(self):
        even = stratified_steps(500, 1, STEPS, torch.Generator().manual_seed(3), torch.full((STEPS,), 1 / STEPS).double())
        assert (even - stratified_steps(500, 1, STEPS, torch.Generator().manual_seed(3))).abs().max() <= 1
