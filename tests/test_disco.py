import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multibeta.disco import (
    Contrastor,
    DisCo,
    DisCoObjective,
    Navigator,
    contrastive_loss,
    direction_indices,
    dominance_entropy,
    flipped_labels,
    shift_strengths,
    variations,
)
from multibeta.latents import manipulate
from multibeta.networks import ToyDecoder, ToyEncoder
from multibeta.training import Batch, TrainingOptions, train


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_rotation(dimensions):
    return torch.linalg.qr(torch.randn(dimensions, dimensions)).Q


def empty_batch():
    return Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64), 0, 0.0)


def prior(count, *shape):
    return lambda batch, generator: torch.randn(count, *shape, generator=generator)


def fit(objective, parameters, steps, learning_rate):
    """Scalars of every step, with the loss, of Adam on the objective."""
    optimizer, generator, record = torch.optim.Adam(parameters, learning_rate), seeded(), []
    for _ in range(steps):
        loss, scalars = objective(empty_batch(), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record.append({"loss": loss.item(), **{name: value.item() for name, value in scalars.items()}})
    return record


def quadrants(rotation):
    """Decoder of a rotated latent (N, 4) whose every factor is the grey value of its own quadrant of 8 x 8 pixels."""

    def decode(latents):
        grey = torch.tanh(latents @ rotation).view(-1, 1, 2, 2)
        return F.interpolate(grey, scale_factor=4)

    return decode


class TestNavigator:
    def test_orthogonal_directions_have_norm_one_and_right_angles(self):
        directions = Navigator((3, 2, 2), 5).directions()
        assert directions.shape == (5, 3, 2, 2)
        flat = directions.flatten(1)
        torch.testing.assert_close(flat @ flat.T, torch.eye(5), rtol=0, atol=1e-5)

    def test_in_a_basis_they_are_unit_vectors_of_its_coordinates(self):
        basis = torch.randn(4, 3, 2, 2)
        for kind in ("ortho", "linear"):
            navigator = Navigator((3, 2, 2), 3, kind, basis)
            coordinates = torch.linalg.lstsq(basis.flatten(1).T, navigator.directions().detach().flatten(1).T).solution
            torch.testing.assert_close(coordinates.norm(dim=0), torch.ones(3))
        assert Navigator((3, 2, 2), basis=basis).num_directions == 4
        torch.testing.assert_close(Navigator((3, 2, 2), 3, basis=basis).directions(), basis[:3])  # where it begins
        with pytest.raises(ValueError, match=r"basis must be \(d, 3, 2, 2\), got \(4, 12\)"):
            Navigator((3, 2, 2), basis=basis.flatten(1))

    def test_they_keep_them_under_autocast(self):
        navigator = Navigator((32,))
        with torch.autocast("cpu", torch.bfloat16):
            directions = navigator.directions()
        torch.testing.assert_close(directions @ directions.T, torch.eye(32), rtol=0, atol=1e-5)

    def test_they_keep_them_while_they_learn(self):
        module = DisCo(Navigator((4,)), Contrastor(1, 8, width=4))
        before = module.navigator.directions().detach()
        fit(DisCoObjective(module, quadrants(torch.eye(4)), prior(16, 4)), module.parameters(), steps=5, learning_rate=0.1)
        after = module.navigator.directions().detach()
        assert (after - before).abs().max() > 0.01
        torch.testing.assert_close(after @ after.T, torch.eye(4), rtol=0, atol=1e-5)

    def test_fewer_directions_are_the_first_columns(self):
        navigator, fewer = Navigator((6,)), Navigator((6,), 2)
        fewer.load_state_dict(navigator.state_dict())
        torch.testing.assert_close(fewer.directions(), navigator.directions()[:2])

    @pytest.mark.parametrize("kind", ["ortho", "linear"])
    def test_a_shift_has_the_norm_and_the_sign_of_its_strength(self, kind):
        navigator = Navigator((4, 1, 1), kind=kind)
        indices, strengths = torch.tensor([0, 0, 3]), torch.tensor([-2.0, 0.5, 6.0])
        shifts = navigator(indices, strengths)
        torch.testing.assert_close(shifts.flatten(1).norm(dim=1), strengths.abs())
        torch.testing.assert_close(shifts[0], -4 * shifts[1])
        moved = manipulate(torch.zeros(1, 4, 1, 1), navigator.directions()[3], 6.0)
        torch.testing.assert_close(moved[0], shifts[2])

    def test_linear_directions_may_outnumber_the_dimensions(self):
        assert Navigator((3,), 7, kind="linear").directions().shape == (7, 3)

    def test_says_what_is_possible(self):
        with pytest.raises(ValueError, match="at least 2 and at most 4, got 5"):
            Navigator((4,), 5)
        with pytest.raises(ValueError, match="at least 2, got 1"):
            Navigator((4,), 1, kind="linear")
        with pytest.raises(ValueError, match="'ortho' or 'linear', got 'free'"):
            Navigator((4,), kind="free")


class TestContrastor:
    def test_has_the_published_layers(self):
        weights = [tuple(p.shape) for p in Contrastor().parameters() if p.dim() > 1]
        convolutions = [(64, 3, 7, 7), (128, 64, 4, 4), (256, 128, 4, 4), (256, 256, 4, 4), (256, 256, 4, 4)]
        assert weights == [*convolutions, (256, 4096), (256, 256), (64, 256)]

    def test_sees_black_as_zero(self):
        assert not Contrastor(3, 16, width=4)(-torch.ones(2, 3, 16, 16)).any()  # and its biases begin at zero

    @pytest.mark.parametrize("resolution", [8, 32])
    def test_the_code_does_not_grow_with_the_image(self, resolution):
        assert Contrastor(1, resolution, 10, width=4)(torch.rand(2, 1, resolution, resolution)).shape == (2, 10)

    def test_says_what_is_possible(self):
        with pytest.raises(ValueError, match="4 times a power of two and at least 8, got 48"):
            Contrastor(resolution=48)
        with pytest.raises(ValueError, match=r"shape \(N, 3, 16, 16\), got \(2, 1, 16, 16\)"):
            Contrastor(3, 16, width=4)(torch.zeros(2, 1, 16, 16))


class TestLoss:
    def test_variations_forget_sign_and_strength(self):
        codes, change = torch.randn(5, 8), torch.randn(5, 8)
        found = variations(codes, codes + change)
        torch.testing.assert_close(found, variations(codes, codes - 3 * change))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(5))

    def test_only_logits_above_the_threshold_are_flipped(self):
        logits = torch.tensor([[0.0, 0.94, 0.95, 0.96, 1.0]], requires_grad=True)
        labels = flipped_labels(logits)
        torch.testing.assert_close(labels, torch.tensor([[0.0, 0.0, 0.0, 0.96, 1.0]]))
        assert not labels.requires_grad

    def test_is_the_mean_over_all_pairs(self):
        queries, positives, negatives = (F.normalize(torch.rand(count, 6), dim=1) for count in (2, 3, 5))
        terms = []
        for query in queries:
            terms += [-F.logsigmoid(query @ positive) for positive in positives]
            terms += [-F.logsigmoid(-query @ negative) for negative in negatives]
        torch.testing.assert_close(contrastive_loss(queries, positives, negatives, flip_above=1.1), torch.stack(terms).mean())

    def test_negatives_receive_no_gradient(self):
        three = [torch.rand(4, 6, requires_grad=True) for _ in range(3)]
        contrastive_loss(*three).backward()
        assert three[0].grad.any() and three[1].grad.any() and three[2].grad is None

    def test_a_flipped_negative_is_pushed_away_less(self):
        query, alike = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        queries = [query.clone().requires_grad_() for _ in range(2)]
        for leaf, flip_above in zip(queries, (0.95, 1.1), strict=True):
            contrastive_loss(leaf, alike, alike, flip_above).backward()
        assert queries[0].grad[0, 0] < 0 < queries[1].grad[0, 0]  # descent: towards it, away from it

    def test_entropy_is_lowest_where_one_code_dominates(self):
        one, two, all_ = (F.normalize(torch.tensor([[1.0] * n + [0.0] * (8 - n)]), dim=1) for n in (1, 2, 8))
        assert dominance_entropy(one) < dominance_entropy(two) < dominance_entropy(all_)
        torch.testing.assert_close(dominance_entropy(all_), torch.tensor(math.log(8)))

    def test_the_entropy_is_the_published_one(self):
        variation = F.normalize(torch.rand(32, 64), dim=1)
        p = variation.softmax(1)
        torch.testing.assert_close(dominance_entropy(variation), -(p * (p + 1e-5).log()).sum(1).mean(), rtol=0, atol=1e-3)


class TestDraws:
    def test_small_strengths_of_both_signs_are_raised(self):
        strengths = shift_strengths(2000, 1.0, 0.5, seeded())
        assert strengths.abs().min() == 0.5
        at_least = strengths[strengths.abs() == 0.5]
        torch.testing.assert_close((at_least > 0).float().mean().item(), 0.5, rtol=0, atol=0.06)

    def test_the_default_shift_is_as_large_as_that_between_two_latents(self):
        objective = DisCoObjective(DisCo(Navigator((4,)), nn.Flatten()), lambda latents: latents, prior(8, 4))
        first, second = torch.randn(2, 20_000, 4, generator=seeded()).unbind()
        strengths = shift_strengths(20_000, objective.shift_scale, 0.0, seeded(1))
        torch.testing.assert_close(strengths.std(), (first - second).std(), rtol=0.02, atol=0)

    def test_other_directions_are_the_others_alike_often(self):
        indices = direction_indices(5, 3, 4000, seeded())
        chosen, others = indices[0], indices[3:]
        assert (indices[:3] == chosen).all()
        counts = others.bincount(minlength=5)
        assert counts[chosen] == 0
        assert (counts[counts > 0] - 1000).abs().max() < 150


class TestObjective:
    def toy(self, **options):
        """DisCo on a decoder of vector latents (4, 1, 1), whose parameters ask for gradients."""
        decoder = ToyDecoder(latent_channels=4, resolution=8, channels=(8, 8), num_groups=4, embedding_channels=8)
        module = DisCo(Navigator((4, 1, 1)), Contrastor(3, 8, code_size=6, width=4))

        def decode(latents):
            return decoder(latents, torch.zeros(len(latents)))

        return decoder, DisCoObjective(module, decode, prior(16, 4, 1, 1), **options)

    def test_gradient_reaches_navigator_and_contrastor_and_never_the_decoder(self):
        decoder, objective = self.toy()
        objective(empty_batch(), seeded())[0].backward()
        # not the last bias, which the difference of two codes cancels
        assert all(p.grad.any() for p in objective.module.parameters() if p.dim() > 1)
        assert all(p.requires_grad and p.grad is None for p in decoder.parameters())

    def test_the_gradient_is_that_of_the_plain_composition(self):
        _, objective = self.toy()
        latents, shifts = torch.randn(2, 6, 4, 1, 1, generator=seeded()).unbind()
        found, plain = (shifts.clone().requires_grad_() for _ in range(2))
        weights = torch.randn(6, 6, generator=seeded(1))
        (objective.variations(latents, found) * weights).sum().backward()
        encode, decode = objective.module.encode, objective.decode
        (variations(encode(decode(latents)), encode(decode(latents + plain))) * weights).sum().backward()
        torch.testing.assert_close(found.grad, plain.grad)

    def test_a_batch_is_a_quarter_queries_a_quarter_positives_and_negatives(self):
        _, objective = self.toy()
        assert [len(part) for part in objective.draw_variations(empty_batch(), seeded())] == [4, 4, 8]

    def test_autocast_changes_nothing(self):
        _, objective = self.toy()
        expected, _ = objective(empty_batch(), seeded())
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = objective(empty_batch(), seeded())
        assert found == expected

    def test_the_loss_is_contrast_and_entropy(self):
        _, objective = self.toy()
        loss, scalars = objective(empty_batch(), seeded())
        torch.testing.assert_close(loss.detach(), scalars["contrast"] + scalars["entropy"])

    def test_says_which_latents_it_takes(self):
        _, objective = self.toy()
        for wrong in (prior(3, 4, 1, 1), prior(8, 4)):
            objective.sample = wrong
            with pytest.raises(ValueError, match=r"latents \(N, 4, 1, 1\) with N >= 4, got"):
                objective(empty_batch(), seeded())

    def test_directions_turn_to_the_factors_of_the_codes(self):
        rotation = random_rotation(4)
        module = DisCo(Navigator((4,)), nn.Flatten())
        objective = DisCoObjective(module, lambda latents: latents @ rotation, prior(64, 4))

        def alignment():
            return (module.navigator.directions() @ rotation).abs()

        before = alignment().max(1).values.mean()
        fit(objective, module.navigator.parameters(), steps=600, learning_rate=0.03)
        after = alignment()
        assert after.max(1).values.mean() > max(before, 0.95)  # 40 of 40 seeds end above 0.96
        assert sorted(after.argmax(1).tolist()) == [0, 1, 2, 3]

    def test_variations_along_one_direction_become_alike_and_unlike_the_others(self):
        module = DisCo(Navigator((4,)), Contrastor(1, 8, code_size=16, width=8))
        objective = DisCoObjective(module, quadrants(random_rotation(4)), prior(64, 4))
        record = fit(objective, module.parameters(), steps=120, learning_rate=1e-3)

        def mean(name, steps):
            return sum(step[name] for step in steps) / len(steps)

        first, last = record[:10], record[-20:]
        assert mean("loss", last) < mean("loss", first) - 0.05
        gap_before = mean("positive", first) - mean("negative", first)
        assert mean("positive", last) - mean("negative", last) > gap_before + 0.2


class TestTraining:
    class Noise:
        """Random images, kept in memory."""

        resolution, channels = 8, 3
        pixels = torch.randint(0, 256, (20, 3, 8, 8), generator=seeded()).byte()

        def __len__(self):
            return len(self.pixels)

        def images(self, indices):
            return self.pixels[indices]

    OPTIONS = TrainingOptions(4, batch_size=8, learning_rate=1e-3, warmup_steps=0, checkpoint_every=2, validate_every=4)

    def objective(self, stop_at=None):
        """DisCo on an encoder and decoder, from encodings of the batch with noise; Ctrl-C in the step `stop_at`."""
        torch.manual_seed(0)
        shared = {"latent_channels": 4, "resolution": 8, "channels": (8, 8), "num_groups": 4, "embedding_channels": 8}
        encoder, decoder = ToyEncoder(**shared), ToyDecoder(**shared)

        def sample(batch, generator):
            if batch.step == stop_at:
                raise KeyboardInterrupt
            means = encoder(batch.images, torch.full((len(batch.images),), 0.5))
            return means + 0.5 * torch.randn(means.shape, generator=generator)

        module = DisCo(Navigator((4, 1, 1)), Contrastor(3, 8, code_size=6, width=4))
        return DisCoObjective(module, lambda latents: decoder(latents, torch.full((len(latents),), 0.5)), sample)

    def test_an_interrupted_run_goes_on_where_it_was(self, tmp_path):
        whole = train(self.objective(), self.Noise(), self.OPTIONS, tmp_path / "whole", progress=False)
        with pytest.raises(KeyboardInterrupt):
            train(self.objective(stop_at=3), self.Noise(), self.OPTIONS, tmp_path / "parts", progress=False)
        parts = train(self.objective(), self.Noise(), self.OPTIONS, tmp_path / "parts", progress=False, resume=True)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_validates_with_averaged_weights(self, tmp_path):
        train(self.objective(), self.Noise(), self.OPTIONS, tmp_path, validation=self.Noise(), progress=False)
        assert "validation/loss" in (tmp_path / "metrics.jsonl").read_text()
