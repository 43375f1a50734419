import json
import math
import pickle
import re
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save
from sklearn.decomposition import PCA

from multibeta.latents import (
    HEADER,
    LatentMixture,
    NamedDirections,
    between,
    fit_mixture,
    in_deviations,
    interpolate,
    lerp,
    manipulate,
    principal_directions,
    slerp,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestPrincipalDirections:
    def test_are_shown_in_a_line(self):
        found = principal_directions(torch.randn(50, 4, 8, 8))
        assert re.fullmatch(r"PrincipalDirections\(49 of shape \(4, 8, 8\), deviations [\d., ]+\.\.\.\)", repr(found))

    ENCODINGS = torch.einsum("nd,de->ne", rand(200, 12), rand(12, 12, seed=1)).view(200, 3, 2, 2) + 5

    def test_are_those_of_scikit_learn(self):
        found, pca = principal_directions(self.ENCODINGS, 5), PCA(5).fit(self.ENCODINGS.flatten(1).double().numpy())
        components = torch.from_numpy(pca.components_).float()
        cosines = (found.directions.flatten(1) * components).sum(1)
        torch.testing.assert_close(cosines.abs(), torch.ones(5))
        torch.testing.assert_close(found.deviations, torch.from_numpy(pca.explained_variance_).sqrt().float())
        torch.testing.assert_close(found.mean.flatten(), torch.from_numpy(pca.mean_).float())

    def test_are_orthonormal_with_the_largest_entry_positive(self):
        directions = principal_directions(self.ENCODINGS).directions
        assert directions.shape == (12, 3, 2, 2)
        flat = directions.flatten(1)
        torch.testing.assert_close(flat @ flat.T, torch.eye(12), rtol=0, atol=1e-5)
        assert (flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all()

    def test_deviations_are_those_along_the_directions(self):
        found = principal_directions(self.ENCODINGS)
        along = (self.ENCODINGS - found.mean).flatten(1) @ found.directions.flatten(1).T
        torch.testing.assert_close(along.std(0), found.deviations, rtol=1e-4, atol=1e-4)
        assert (found.deviations.diff() <= 0).all()

    def test_as_many_as_the_encodings_can_tell(self):
        assert len(principal_directions(self.ENCODINGS[:4]).directions) == 3
        with pytest.raises(ValueError, match="between 1 and 3, got 4"):
            principal_directions(self.ENCODINGS[:4], 4)
        with pytest.raises(ValueError, match="between 1 and 12, got 0"):
            principal_directions(self.ENCODINGS, 0)
        with pytest.raises(ValueError, match="at least 2 encodings, got 1"):
            principal_directions(self.ENCODINGS[:1])


class TestSlerp:
    A, B = rand(4, 3, 2, 2), rand(4, 3, 2, 2, seed=1)

    def test_ends_are_exact(self):
        torch.testing.assert_close(slerp(self.A, self.B, 0.0), self.A)
        torch.testing.assert_close(slerp(self.A, self.B, 1.0), self.B)

    def test_equal_norms_stay_on_the_sphere_at_constant_speed(self):
        unit = [v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (self.A, self.B)]
        path = [slerp(*unit, weight) for weight in torch.linspace(0, 1, 6).tolist()]
        for point in path:
            torch.testing.assert_close(point.flatten(1).norm(dim=1), torch.ones(4), rtol=1e-5, atol=0)
        angles = torch.stack([(p * q).flatten(1).sum(1).acos() for p, q in pairwise(path)])
        torch.testing.assert_close(angles, angles[:1].expand_as(angles), rtol=1e-3, atol=0)

    def test_a_linear_path_would_leave_the_sphere(self):
        a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        torch.testing.assert_close(slerp(a, b, 0.5), torch.full((1, 2), math.sqrt(0.5)))

    def test_halfway_is_symmetric(self):
        torch.testing.assert_close(slerp(self.A, self.B, 0.5), slerp(self.B, self.A, 0.5))
        torch.testing.assert_close(slerp(self.A, self.B, 0.3), slerp(self.B, self.A, 0.7))

    def test_parallel_vectors_are_interpolated_linearly(self):
        torch.testing.assert_close(slerp(self.A, 2 * self.A, 0.25), 1.25 * self.A)
        torch.testing.assert_close(slerp(self.A, self.A, 0.5), self.A)
        near = self.A * (1 + 1e-4 * self.B)  # on the other side of the switch, the same to rounding
        torch.testing.assert_close(slerp(self.A, near, 0.5), (self.A + near) / 2, rtol=1e-3, atol=1e-3)

    def test_opposite_and_zero_vectors_stay_finite(self):
        assert slerp(self.A, -self.A, 0.3).isfinite().all()
        assert slerp(self.A, torch.zeros_like(self.A), 0.3).isfinite().all()

    def test_one_weight_a_sample(self):
        weights = torch.tensor([0.0, 0.2, 0.7, 1.0])
        expected = torch.cat([slerp(self.A[i : i + 1], self.B[i : i + 1], float(w)) for i, w in enumerate(weights)])
        torch.testing.assert_close(slerp(self.A, self.B, weights), expected)


class TestInterpolate:
    A, B = rand(2, 4, 3, 3), rand(2, 4, 3, 3, seed=1)

    def test_all_channels_by_default(self):
        assert torch.equal(interpolate(self.A, self.B, 0.4), slerp(self.A, self.B, 0.4))

    def test_other_channels_stay_with_the_first(self):
        mixed = interpolate(self.A, self.B, 0.4, dims=[1, 3])
        assert torch.equal(mixed[:, [0, 2]], self.A[:, [0, 2]])
        assert torch.equal(mixed[:, [1, 3]], slerp(self.A[:, [1, 3]], self.B[:, [1, 3]], 0.4))
        torch.testing.assert_close(interpolate(self.A, self.B, 1.0, dims=[2])[:, 2], self.B[:, 2])

    def test_leaves_its_arguments_alone(self):
        first = self.A.clone()
        interpolate(first, self.B, 1.0, dims=range(2))
        assert torch.equal(first, self.A)

    def test_channels_that_do_not_exist(self):
        with pytest.raises(ValueError, match=r"between 0 and 3, got \[4, -1\]"):
            interpolate(self.A, self.B, 0.5, dims=[0, 4, -1])


class TestManipulate:
    LATENTS = rand(3, 2, 4, 4)

    def test_moves_along_the_direction(self):
        direction = rand(2, 4, 4, seed=1)
        torch.testing.assert_close(manipulate(self.LATENTS, direction, 0.5), self.LATENTS + 0.5 * direction)
        assert torch.equal(manipulate(self.LATENTS, direction, 0), self.LATENTS)
        strengths = torch.tensor([0.0, 1.0, -2.0])
        moved = manipulate(self.LATENTS, direction, strengths)
        torch.testing.assert_close(moved, self.LATENTS + strengths.view(3, 1, 1, 1) * direction)

    def test_one_direction_a_sample(self):
        directions = rand(3, 2, 4, 4, seed=2)
        torch.testing.assert_close(manipulate(self.LATENTS, directions, 2.0), self.LATENTS + 2 * directions)

    def test_direction_of_another_shape(self):
        with pytest.raises(ValueError, match=r"latent's shape \(2, 4, 4\), got \(2, 4\)"):
            manipulate(self.LATENTS, rand(2, 4), 1.0)
        with pytest.raises(ValueError, match=r"got \(3, 4, 4\)"):
            manipulate(self.LATENTS, rand(3, 4, 4), 1.0)
        for shape in ((2, 2, 4, 4), (1, 3, 2, 4, 4)):
            with pytest.raises(ValueError, match=r"latent's shape \(2, 4, 4\), got"):
                manipulate(self.LATENTS, rand(*shape), 1.0)
        with pytest.raises(TypeError, match=r"latent's shape \(2, 4, 4\), got ndarray"):
            manipulate(self.LATENTS, rand(2, 4, 4).numpy(), 1.0)

    def test_numbers_that_are_none_for_each_sample(self):
        for value, message in ((torch.ones(2), r"for each of 3 samples, got \(2,\)"), (torch.nan, "be finite, got nan")):
            with pytest.raises(ValueError, match=f"strength must .*{message}"):
                manipulate(self.LATENTS, rand(2, 4, 4), value)
            for path in (lerp, slerp, interpolate):
                with pytest.raises(ValueError, match=f"weight must .*{message}"):
                    path(self.LATENTS, self.LATENTS, value)


class TestBetween:
    A, B = rand(2, 4000, 1, 1), rand(2, 4000, 1, 1, seed=1)  # noise: 4000 draws of N(0, 1) each

    @pytest.mark.parametrize("how", ["lerp", "slerp"])
    def test_ends_are_the_ends(self, how):
        torch.testing.assert_close(between(self.A, self.B, 0.0, how), self.A)
        torch.testing.assert_close(between(self.A, self.B, 1.0, how), self.B)
        each = between(self.A, self.B, torch.tensor([0.0, 1.0]), how)
        torch.testing.assert_close(each, torch.stack([self.A[0], self.B[1]]))

    def test_lerp_of_noise_loses_variance_and_slerp_keeps_it(self):
        for weight, kept in ((0.25, 0.625), (0.5, 0.5)):
            assert between(self.A, self.B, weight, "lerp").var().item() == pytest.approx(kept, rel=0.05)
            assert between(self.A, self.B, weight, "slerp").var().item() == pytest.approx(1, rel=0.05)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="lerp, slerp, got 'cubic'"):
            between(self.A, self.B, 0.5, "cubic")
        with pytest.raises(ValueError, match="pairs must have one shape"):
            between(self.A, self.B[:1], 0.5)


class TestMixture:
    MEANS = torch.tensor([[-4.0, 0.0, 1.0], [4.0, 2.0, -1.0]])[:, :, None, None]
    COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.5, 0.0], [0.0, 0.0, 0.1]])

    def encodings(self, count=4000):
        first = torch.rand(count, generator=torch.Generator().manual_seed(3)) < 0.25
        spread = (rand(count, 3) @ torch.linalg.cholesky(self.COVARIANCE).T)[:, :, None, None]
        return self.MEANS[(~first).long()] + spread

    def sample(self, mixture, count=20_000):
        uniform = torch.rand(count, generator=torch.Generator().manual_seed(5))
        return mixture.sample(uniform, rand(count, 3, 1, 1, seed=6))

    @pytest.mark.parametrize("covariance_type", ["diag", "full"])
    def test_samples_are_distributed_as_the_encodings(self, covariance_type):
        samples = self.sample(fit_mixture(self.encodings(), 2, covariance_type))
        left = samples[:, 0, 0, 0] < 0
        assert left.float().mean().item() == pytest.approx(0.25, abs=0.02)
        torch.testing.assert_close(samples[left].mean(0), self.MEANS[0], rtol=0, atol=0.1)
        expected = self.COVARIANCE if covariance_type == "full" else self.COVARIANCE.diag().diag()
        torch.testing.assert_close(samples[~left].flatten(1).T.cov(), expected, rtol=0, atol=0.08)

    def test_every_uniform_number_chooses_a_component(self):
        mixture = LatentMixture(torch.full((3,), 1 / 3), torch.arange(3.0).view(3, 1, 1, 1), torch.zeros(3, 1))
        chosen = mixture.sample(torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0]), rand(5, 1, 1, 1))
        assert chosen.flatten().tolist() == [0, 0, 1, 2, 2]

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="diag, full, got 'tied'"):
            fit_mixture(self.encodings(10), 2, "tied")
        with pytest.raises(ValueError, match="between 1 and the 10 encodings, got 11"):
            fit_mixture(self.encodings(10), 11)


class TestDeviations:
    ENCODINGS = TestPrincipalDirections.ENCODINGS

    def test_of_principal_directions_are_theirs(self):
        found = principal_directions(self.ENCODINGS)
        for direction, deviation in zip(found.directions, found.deviations, strict=True):
            torch.testing.assert_close(in_deviations(3 * direction, self.ENCODINGS), direction * deviation, rtol=1e-4, atol=1e-5)

    def test_a_step_moves_the_projection_by_its_standard_deviation(self):
        direction = rand(3, 2, 2, seed=4)
        unit = direction.flatten() / direction.norm()
        step = in_deviations(direction, self.ENCODINGS)
        torch.testing.assert_close(step.flatten() @ unit, (self.ENCODINGS.flatten(1) @ unit).std())
        torch.testing.assert_close(step.flatten() / step.norm(), unit)

    def test_what_has_no_deviation(self):
        assert not in_deviations(rand(3, 2, 2), self.ENCODINGS[:1].expand(5, -1, -1, -1)).any()
        for direction, encodings, message in (
            (torch.zeros(3, 2, 2), self.ENCODINGS, "not all 0, got a norm of 0"),
            (torch.full((3, 2, 2), math.nan), self.ENCODINGS, "got a norm of nan"),
            (rand(3, 2, 2), self.ENCODINGS[:1], "at least 2 encodings, got 1"),
            (rand(2, 2), self.ENCODINGS, r"got \(2, 2\) for encodings \(200, 3, 2, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                in_deviations(direction, encodings)


class TestNamedDirections:
    STEPS = rand(2, 3, 2, 2)

    def named(self, names=("warm floor", "1 · 8%"), steps=STEPS, beta=0.5):
        return NamedDirections(names, steps, beta, "principal", "0123456789abcdef")

    def test_by_name_and_by_number(self):
        found = self.named()
        assert len(found) == 2 and torch.equal(found["1 · 8%"], self.STEPS[1])
        assert torch.equal(found[0], self.STEPS[0]) and torch.equal(found["0"], self.STEPS[0])
        assert self.named(("1", "0")).index("1") == 0  # a name goes before a number
        assert [torch.equal(*pair) for pair in zip(found, self.STEPS, strict=True)] == [True, True]
        with pytest.raises(KeyError, match="no direction 'hat'; there are warm floor, 1 · 8%"):
            found["hat"]
        for number in (2, -1, "2", "-1"):
            with pytest.raises(IndexError, match=f"between 0 and 1, got {number}"):
                found[number]
        assert repr(found) == "NamedDirections(2 principal at beta 0.5 of shape (3, 2, 2): warm floor, 1 · 8%)"

    @pytest.mark.parametrize("beta", [0.5, None])
    def test_come_back_from_one_file(self, tmp_path, beta):
        found = self.named(beta=beta, steps=self.STEPS.transpose(2, 3))
        found.save(tmp_path / "some" / "directions.safetensors")
        read = NamedDirections.load(tmp_path / "some" / "directions.safetensors")
        assert [path.name for path in (tmp_path / "some").iterdir()] == ["directions.safetensors"]
        assert (read.names, read.beta, read.kind, read.model) == (found.names, found.beta, found.kind, found.model)
        assert torch.equal(read.steps, found.steps)

    def test_files_that_are_damaged_or_of_others(self, tmp_path):
        path = tmp_path / "directions.safetensors"
        self.named().save(path)
        whole = path.read_bytes()
        files = {"cut off": whole[:-5], "empty": b"", "a picture": b"\x89PNG" + bytes(100), "a pickle": pickle.dumps({"a": 1})}
        header = {"names": ["a", "b"], "beta": 0.5, "kind": "principal", "model": ""}
        wrong = {
            "names of numbers": header | {"names": [1, 2]},
            "too many names": header | {"names": ["a", "b", "c"]},
            "no names": {name: value for name, value in header.items() if name != "names"},
            "text for beta": header | {"beta": "0.5"},
            "one name twice": header | {"names": ["a", "a"]},
            "a list": [1],
        }
        files |= {what: save({"steps": self.STEPS}, {HEADER: json.dumps(said)}) for what, said in wrong.items()}
        files["no JSON"] = save({"steps": self.STEPS}, {HEADER: "{"})
        files["other tensors"] = save({"weight": self.STEPS}, {HEADER: json.dumps(header)})
        files["not finite"] = save({"steps": self.STEPS / 0}, {HEADER: json.dumps(header)})
        files["another's"] = save({"steps": self.STEPS}, {"format": "pt"})
        for what, content in files.items():
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"directions\.safetensors does not describe directions of latents: \S") as error:
                NamedDirections.load(path)
            assert "\n" not in str(error.value), what
        with pytest.raises(FileNotFoundError):
            NamedDirections.load(tmp_path / "nothing.safetensors")

    def test_what_is_none(self):
        for names, steps, message in (
            ((), torch.zeros(0, 3, 2, 2), "at least one"),
            (("a",), self.STEPS, r"1 names and steps of shape \(2, 3, 2, 2\)"),
            (("a", "a"), self.STEPS, "different and not empty"),
            (("a", ""), self.STEPS, "different and not empty"),
            (("a", "b"), self.STEPS / 0, "finite"),
            (("a", "b"), self.STEPS.long(), "floating point"),
        ):
            with pytest.raises(ValueError, match=message):
                self.named(names, steps)
