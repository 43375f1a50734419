"""Flow maps: where they stand, the trajectories that they learn from, their training."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from processes import in_processes
from test_flow_map_spans import generator, map_of, teacher_of
from test_nonlinear_diffusion import STEPS, rand

from multibeta import distribution
from multibeta.draws import PieceGenerator
from multibeta.flow_map import FlowMapConfig, FlowMapObjective, Starts, Trajectories, drawn_indices, spread
from multibeta.flow_map.network import flat_path
from multibeta.spans import Spanned
from multibeta.training import Batch, TrainingOptions, train
from multibeta.training.batches import batch_indices


class TestPath:
    CHOSEN = FlowMapConfig(num_steps=STEPS, paths=((35,), (40, 15)), noise_paths=((35, 40), (40, 45, 25, 30)))

    def test_of_the_map_alone_it_takes_equal_steps(self):
        path = FlowMapConfig(num_steps=STEPS).path
        assert path("map", 1, 50) == path("map_noise", 1, 50) == [(50, 0, 0)]
        assert path("map", 5, 50) == [(50, 40, 40), (40, 30, 30), (30, 20, 20), (20, 10, 10), (10, 0, 0)]

    def test_with_noise_it_goes_lower_and_comes_back(self):
        path = FlowMapConfig(num_steps=STEPS).path
        assert path("map_noise", 5, 50) == [(50, 35, 40), (40, 25, 30), (30, 15, 20), (20, 5, 10), (10, 0, 0)]

    def test_it_goes_where_was_chosen_for_so_many_evaluations(self):
        path = self.CHOSEN.path
        assert path("map", 3, 50) == [(50, 40, 40), (40, 15, 15), (15, 0, 0)]
        assert path("map_noise", 2, 50) == [(50, 35, 40), (40, 0, 0)]
        assert path("map_noise", 3, 50) == [(50, 40, 45), (45, 25, 30), (30, 0, 0)]
        assert path("map_noise", 2, 20) == [(20, 14, 16), (16, 0, 0)]

    @pytest.mark.parametrize(("power", "lift"), [(0.25, 0.2), (1.0, 0.1), (2.0, 0.2), (2.5, 0.05)])
    def test_more_evaluations_have_the_shape_of_the_last_that_were_chosen(self, power, lift):
        """However fine the grid, so that rounding is all that may differ."""
        last = 10**6
        chosen = [tuple(flat_path(each, last, few, power, lift) for few in (2, 3, 4)) for each in ("map", "map_noise")]
        config = FlowMapConfig(num_steps=last, paths=chosen[0], noise_paths=chosen[1])
        for start in (last, last // 2):
            for sampler, lifted in (("map", 0.0), ("map_noise", lift)):
                path = config.path(sampler, 9, start)
                expected = spread(start, 9, power, lifted)
                assert len(path) == 9 and path[0][0] == start and path[-1][1:] == (0, 0)
                assert torch.tensor([pair for _, *pair in path[:-1]]).sub(torch.tensor(expected)).abs().max() <= 3

    def test_where_the_grid_is_too_short_for_a_shape_the_steps_are_equal(self):
        early = replace(self.CHOSEN, paths=((49,), (49, 40)), noise_paths=((45, 49),))
        for sampler in ("map", "map_noise"):
            assert early.path(sampler, 2, 4) == FlowMapConfig(num_steps=STEPS).path(sampler, 2, 4)
            assert early.path(sampler, 9, 10) == FlowMapConfig(num_steps=STEPS).path(sampler, 9, 10)

    @pytest.mark.parametrize("sampler", ["map", "map_noise"])
    def test_from_anywhere_it_falls_to_the_end(self, sampler):
        for start, steps in itertools.product(range(1, STEPS + 1), range(1, 8)):
            path = self.CHOSEN.path(sampler, min(steps, start), start)
            assert len(path) == min(steps, start) and path[0][0] == start and path[-1][1:] == (0, 0)
            assert all(low <= to < here for here, low, to in path)
            assert all(to == here for (_, _, to), (here, _, _) in itertools.pairwise(path))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"paths": ((50,),)}, "paths must hold grid indices, 1 for 2 evaluations, falling from 50, got (50,)"),
            ({"paths": ((20,), (20, 30))}, "paths must hold grid indices, 2 for 3 evaluations, falling from 50, got (20, 30)"),
            (
                {"noise_paths": ((40, 35),)},
                "2 for 2 evaluations, pairs (low, to), low <= to and to falling from 50, got (40, 35)",
            ),
            ({"noise_paths": ((35, 40, 10, 20),)}, "grid indices, 2 for 2 evaluations, pairs"),
            ({"noise_paths": ((35, 40), (35, 40, 10))}, "grid indices, 4 for 3 evaluations, pairs"),
            ({"noise_paths": ((35, 51),)}, "pairs (low, to), low <= to and to falling from 50, got (35, 51)"),
            ({"noise_paths": ((35.5, 40),)}, "pairs (low, to), low <= to and to falling from 50, got (35.5, 40)"),
            (
                {"noise_paths": ((35, 40), (20, 30, 30, 40))},
                "low <= to and to falling from 50, got (20, 30, 30, 40)",
            ),
            ({"deviation": 0.0}, "deviation must be finite and above 0, got 0.0"),
            ({"velocities": (1.0, 0.0)}, "velocities must be finite and above 0, got 0.0"),
            ({"span_channels": 0}, "span_channels must be"),
            ({"num_steps": 0}, "num_steps must be"),
        ],
    )
    def test_a_config_that_cannot_be(self, fields, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            replace(FlowMapConfig(num_steps=STEPS), **fields)


class TestDrawnIndices:
    def test_fall_from_noise_to_data_each_once(self):
        for num_steps, count in ((1000, 24), (50, 24), (50, 50), (50, 1), (2, 2)):
            for seed in range(20):
                indices = drawn_indices(num_steps, count, generator(seed))
                assert indices[0] == num_steps and indices[-1] == 0 and len(indices) <= count + 1
                assert all(high > low for high, low in itertools.pairwise(indices))

    def test_are_denser_at_both_ends_and_jittered(self):
        drawn = torch.tensor([drawn_indices(1000, 24, generator(seed)) for seed in range(200)]).double()
        strides = -drawn.diff(dim=1).mean(0)
        assert strides[1] < 0.8 * strides[12] and strides[-2] < 0.8 * strides[12]
        assert drawn[:, 12].std() > 5 and len(drawn[:, 12].unique()) > 20

    def test_shares_say_where_they_are_dense(self):
        even = drawn_indices(1000, 24, generator(), torch.full((1000,), 3.0))
        assert even == drawn_indices(1000, 24, generator())
        shares = torch.ones(1000)
        shares[500:600] = 9.0  # half of the way is there
        indices = torch.tensor(drawn_indices(1000, 24, generator(), shares))
        assert 9 <= ((indices > 500) & (indices <= 600)).sum() <= 12


def told(seeds, of):
    """Trajectories that tell whose they are: latents hold their seed and their step."""
    steps = torch.tensor([50, 30, 20, 10, 0])
    latents = (seeds % 1_000_003).double() + steps[:, None] / 100
    return Trajectories(steps, latents[..., None, None, None], 2 * latents[..., None, None, None])


def whose(latents):
    return latents.flatten().long().tolist()


class TestStarts:
    COUNT, CHUNK, USES, BATCH = 24, 4, 3, 9  # batches run across the ends of epochs

    def starts(self, *key, uses=USES, walk=told):
        return Starts(walk, self.COUNT, self.CHUNK, uses, *(key or (7,)))

    def batch(self, starts, step):
        """Whose trajectories a step of a training sees."""
        indices = batch_indices(step, self.COUNT, self.BATCH, 0)
        spanned = starts.spans(indices, torch.zeros(self.BATCH), torch.ones(self.BATCH), step * self.BATCH)
        return whose(spanned.latents)

    def test_each_trajectory_serves_its_spans_and_no_more(self):
        starts, steps = self.starts(), 9 * self.COUNT // self.BATCH
        seen = [one for step in range(steps) for one in self.batch(starts, step)]
        counts = {one: seen.count(one) for one in seen}
        first, last = set(seen[: self.COUNT]), set(seen[-self.COUNT :])
        assert all(count == self.USES for one, count in counts.items() if one not in first | last)
        assert sorted(counts[one] for one in first) == sorted([1, 2, 3] * (self.COUNT // 3))  # chunks turn over one after another
        assert len(counts) >= 3 * self.COUNT

    def test_none_is_made_twice(self):
        made = []
        starts = self.starts(walk=lambda seeds, of: made.append(int(seeds[0])) or told(seeds, of))
        for step in range(60):
            self.batch(starts, step)
        assert len(made) == len(set(made))

    def test_which_one_a_step_sees_depends_on_the_key_and_the_step_alone(self):
        went = self.starts()
        walked = [self.batch(went, step) for step in range(30)]
        for step in (29, 4, 17):
            assert self.batch(self.starts(), step) == walked[step]
        assert not set(self.batch(self.starts(8), 4)) & set(walked[4])

    def test_those_that_are_held_out_stay(self):
        starts, indices = self.starts(uses=None), torch.arange(self.COUNT)
        ends = torch.zeros(self.COUNT), torch.ones(self.COUNT)
        first, later = (starts.spans(indices, *ends, before) for before in (0, 1000))
        assert torch.equal(first.latents, later.latents) and len(set(whose(first.latents))) == self.COUNT
        assert starts.generation(3, 10**6) == 0

    def test_spans_are_pieces_of_trajectories(self):
        starts, indices = self.starts(uses=None), torch.tensor([23, 0, 5, 5, 9, 2])
        first = torch.tensor([0.0, 0.0, 0.3, 0.3, 0.999, 0.6])
        second = torch.tensor([1.0, 0.01, 1.0, 0.4, 0.5, 0.0])
        found = starts.spans(indices, first, second)
        assert found.starts.tolist() == [50, 50, 30, 30, 10, 20]
        assert found.ends.tolist() == [0, 30, 0, 10, 0, 20]
        for end, latents in ((found.starts, found.latents), (found.ends, found.later)):
            torch.testing.assert_close(latents.flatten() % 1, end / 100.0, check_dtype=False)
        torch.testing.assert_close(found.noise_moved, 2 * (found.later - found.latents))
        assert found.condition is None and whose(found.latents) == whose(found.later)
        alone = [whose(starts.spans(indices[i : i + 1], first[:1], second[:1]).latents)[0] for i in range(6)]
        assert whose(found.latents) == alone and len(set(alone)) == 5

    def test_what_is_read_besides_comes_along(self):
        def walk(seeds, of):
            whole = told(seeds, of)
            return Trajectories(whole.steps, whole.latents, condition=whole.latents[0])

        found = self.starts(walk=walk).spans(torch.tensor([9, 2]), torch.full((2,), 0.5), torch.ones(2))
        assert whose(found.condition) == whose(found.latents) and found.noise_moved is None

    def test_the_last_chunk_may_be_short(self):
        starts = Starts(told, 10, 4, 2, 0)
        spanned = starts.spans(torch.arange(10), torch.zeros(10), torch.ones(10))
        assert len(set(whose(spanned.latents))) == 10 and len(starts.images(torch.arange(10))) == 10


def shared_walks():
    """What this process finds in a training of 8 steps, whose batches run across the ends of epochs, and what it made of it."""
    made = []
    starts = Starts(lambda seeds, of: made.append(int(seeds[0])) or walks(seeds, of), 22, 4, 2, 7)
    objective, seen = TestObjective().objective(), []
    objective.starts = starts
    starts.fill(0, progress=False)
    filled, first = len(made), [walk.latents for _, walk in starts._made.values()]
    for step in range(8):
        own, before = distribution.world().share(9), step * 9
        indices = batch_indices(step, 22, 9, 0)[own.start : own.stop]
        batch = Batch(torch.empty(len(own), 0, 1, 1), indices, step, 0.0, own.start, before=before + own.start)
        spanned = objective.spanned(batch, PieceGenerator.of(0, step, own.start, 9))
        seen.append(distribution.gather_rows(spanned.latents))
    return first, seen, filled, len(made)


def test_processes_share_the_making_of_trajectories(tmp_path):
    """Each makes its half, and all see what one process would see, also where trajectories are made anew."""
    first, seen, filled, in_all = shared_walks()
    assert filled == 6 and in_all > 12
    told = in_processes(2, shared_walks, folder=tmp_path)
    for others_first, others_seen, *_ in told:
        assert all(map(torch.equal, others_first, first)) and all(map(torch.equal, others_seen, seen))
    assert [filled for *_, filled, _ in told] == [3, 3] and max(count for *_, count in told) < 0.8 * in_all


def walks(seeds, of):
    """Trajectories of no teacher: any three latents."""
    steps, each = torch.tensor([STEPS, 20, 0]), [rand(3, 4, 4, 4, seed=int(seed)) for seed in seeds]
    latents = torch.stack(each, dim=1)
    return Trajectories(steps, latents, 0.5 * latents)


class TestObjective:
    def objective(self, **fields):
        diffusion, starts = teacher_of("residual", "cosine"), [Starts(walks, 16, 8, None, key) for key in (0, 1)]
        return FlowMapObjective(map_of(diffusion), diffusion, *starts, **fields)

    def batch(self, count=16, **fields):
        return Batch(torch.empty(count, 0, 1, 1), torch.arange(count) % 16, 0, 0.0, **fields)

    def test_spans_are_of_five_kinds(self):
        """Deviations of shares of 20,000 are at most 0.0035."""
        objective = self.objective(shares=(0.3, 0.2, 0.15, 0.25))
        objective.starts = objective.held_out = Starts(told, 16, 16, None, 0)
        found = objective.spanned(self.batch(20_000), generator())
        from_noise, to_data, none = found.starts == 50, found.ends == 0, found.starts == found.ends
        inner = 1 / 4  # of spans from anywhere begin at each place, and of those from noise to anywhere end there
        for each, expected in (
            (none, 0.1),
            (from_noise & ~none, 0.3 + 0.2 * inner + 0.15 + 0.25 * inner),
            (from_noise & to_data, 0.3 + 0.2 * inner + 0.15 * inner + 0.25 * inner**2),
        ):
            assert float(each.float().mean()) == pytest.approx(expected, abs=0.012)

    def test_as_built_nothing_is_left_to_learn_where_there_is_no_span(self):
        loss, scalars = self.objective(shares=(0.0, 0.0, 0.0, 0.0))(self.batch(), generator())
        assert loss.item() < 1e-8 and scalars["map_error"].item() < 1e-8

    def test_the_loss_is_the_error_of_the_map_and_of_its_heads(self):
        objective = self.objective(head_weight=0.3, huber=0.0)
        spanned = objective.spanned(self.batch(), generator())
        targets = objective.teacher.span_targets(spanned)
        output = objective.module(targets.network_input, objective.teacher.span_times(spanned.starts, spanned.ends))
        v, u = (objective.teacher.coefficients(head) for head in output.chunk(2, dim=1))
        of_v, of_u = v - targets.outputs[0], u - targets.outputs[1]
        of_map = targets.counts[0] * of_v + targets.counts[1] * of_u
        of_heads, of_map = (sum(error.square().mean((1, 2, 3)) for error in each) for each in ((of_v, of_u), (of_map,)))
        loss, scalars = objective(self.batch(), generator())
        torch.testing.assert_close(loss, (of_map + 0.3 * of_heads).mean())
        torch.testing.assert_close((scalars["map_error"], scalars["head_error"]), (of_map.mean(), of_heads.mean() / 2))
        robust, _ = self.objective(head_weight=0.3, huber=0.5)(self.batch(), generator())
        torch.testing.assert_close(robust, ((of_map + 0.3 * of_heads + 0.25).sqrt() - 0.5).mean())

    def test_validation_sees_other_trajectories(self):
        objective = self.objective()
        seen, held_out = (objective.spanned(self.batch(held_out=each), generator()) for each in (False, True))
        assert torch.equal(seen.starts, held_out.starts) and torch.equal(seen.ends, held_out.ends)
        assert not torch.isclose(seen.latents, held_out.latents).any(1).any()

    def test_pieces_of_a_batch_see_the_same_spans(self, tmp_path, monkeypatch):
        options = TrainingOptions(steps=3, batch_size=10, precision="fp32")  # the second crosses the end of an epoch
        seen = {1: [], 3: []}
        for pieces, batches in seen.items():
            objective = self.objective()
            objective.starts, spanned = Starts(walks, 16, 8, 1, 0), objective.spanned

            def record(batch, of, batches=batches, spanned=spanned):
                batches.append((batch.before, spanned(batch, of)))
                return batches[-1][1]

            monkeypatch.setattr(objective, "spanned", record)
            train(objective, objective.starts, replace(options, accumulate=pieces), tmp_path / str(pieces), progress=False)
        assert [[before for before, _ in batches] for batches in seen.values()] == [
            [0, 10, 20],
            [0, 4, 7, 10, 14, 17, 20, 24, 27],
        ]
        for name in ("starts", "ends", "latents", "later"):
            whole, pieced = (torch.cat([getattr(each, name) for _, each in batches]) for batches in seen.values())
            assert torch.equal(whole, pieced)

    @pytest.mark.parametrize(
        "fields",
        [{"shares": (0.5, 0.5, 0.1, 0)}, {"shares": (-0.1, 0, 0, 0)}, {"shares": (1.0,)}, {"head_weight": -0.1}, {"huber": -1.0}],
    )
    def test_options_that_cannot_be(self, fields):
        with pytest.raises(ValueError, match=next(iter(fields))):
            self.objective(**fields)

    def test_spans_move_with_their_latents(self):
        latents = rand(2, 4, 4, 4)
        moved = Spanned(torch.tensor([5, 6]), torch.tensor([0, 2]), latents, latents, latents).to(torch.device("meta"))
        assert moved.latents.is_meta and moved.later.is_meta and moved.noise_moved.is_meta
        assert not moved.starts.is_meta and moved.condition is None
