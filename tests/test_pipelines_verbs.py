"""What every verb of every class checks alike; seeds and dtypes."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image

import multibeta
from multibeta.pipelines import (
    DiffusionVAE,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


BACKENDS = ("auto", "reference")
LATENTS = {
    "a batch is missing": (rand(4, 8, 8), r"latents must have shape \(N, \*\(4, 8, 8\)\), got \(4, 8, 8\)"),
    "too small": (rand(2, 4, 4, 4), r"latents must have shape \(N, \*\(4, 8, 8\)\), got \(2, 4, 4, 4\)"),
    "a channel": (rand(2, 1, 8, 8), r"latents must have shape .* got \(2, 1, 8, 8\)"),
    "integers": (torch.ones(2, 4, 8, 8, dtype=torch.int64), "latents must be of floating point, got torch.int64"),
    "complex": (rand(2, 4, 8, 8) * 1j, "latents must be of floating point, got torch.complex64"),
    "nan": (rand(2, 4, 8, 8).index_fill(0, torch.tensor(1), torch.nan), "latents must be finite, got 256 numbers that are not"),
    "infinite": (rand(2, 4, 8, 8).index_fill(1, torch.tensor(1), torch.inf), "latents must be finite, got 128 numbers that"),
}


@pytest.mark.parametrize("backend", BACKENDS)
class TestEveryVerbChecksAlike:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x * 1j, "complex64.*float32"),
            (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn.*float32"),
            (lambda x: x.to_sparse(), r"dense tensor \(torch\.strided\), got torch\.sparse_coo"),
            (lambda x: x.to("meta"), "must have values, got a tensor on the meta device"),
            (lambda x: torch.nested.nested_tensor(list(x)), "dense .*, got a nested tensor"),
            (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8.*float32"),
        ],
    )
    def test_tensors_that_hold_no_plain_numbers(self, model, refiner, baseline, backend, change, message):
        x, latents, vectors = images(2), rand(2, 4, 8, 8), rand(2, 6, 1, 1)
        of_images = (
            lambda x: model.encode(x, 0.5),
            lambda x: model.manipulate(x, latents[0], 1.0, 0.5, steps=3),
            lambda x: model.interpolate(x, images(2), 0.5, 0.5, steps=3),
            lambda x: model.interpolate(images(2), x, 0.5, 0.5, steps=3),
            lambda x: model.principal_directions(x, 0.5),
            refiner.encode,
            lambda x: refiner.denoise(x, steps=3),
            lambda x: refiner.denoise(images(2), steps=3, noise=x),
            lambda x: refiner.refine(x, steps=3),
            lambda x: refiner.reconstruct(x, steps=3),
            lambda x: refiner.manipulate(x, vectors[0], 1.0, steps=3),
            lambda x: refiner.interpolate(x, images(2), 0.5, steps=3),
            lambda x: refiner.interpolate_noise(x, [1, 2], [3, 4], 0.5, steps=3),
            lambda x: refiner.attribute_direction(x, images(2)),
            lambda x: refiner.attribute_direction(images(2), x),
            baseline.encode,
        )
        of_latents = (
            lambda z: model.decode(z, 0.5),
            lambda z: model.denoise(z, 0.5, steps=3),
            lambda z: model.denoise(z, 0.0),
            lambda z: model.invert(z, steps=3),
            lambda z: model.manipulate(x, z, 1.0, 0.5, steps=3),
            baseline.decode,
        )
        of_vectors = (
            refiner.decode,
            lambda z: refiner.manipulate(z, vectors[0], 1.0, steps=3),
            lambda z: refiner.manipulate(x, z, 1.0, steps=3),
            lambda z: refiner.interpolate(z, vectors, 0.5, steps=3),
            lambda z: refiner.interpolate_noise(z, [1, 2], [3, 4], 0.5, steps=3),
        )
        of_numbers = (
            lambda each: model.encode(x, each),
            lambda each: model.decode(latents, each),
            lambda each: model.denoise(latents, each, steps=3),
            lambda each: model.manipulate(x, latents[0], each, 0.5, steps=3),
            lambda each: refiner.manipulate(x, vectors[0], each, steps=3),
            lambda each: refiner.interpolate(x, x, each, steps=3),
        )
        numbers = torch.full((2,), 0.5)
        with multibeta.backend(backend):
            for verbs, given in ((of_images, x), (of_latents, latents), (of_vectors, vectors), (of_numbers, numbers)):
                if given is numbers and "float8" in message:
                    continue
                for verb in verbs:
                    with pytest.raises(ValueError, match=message):
                        verb(change(given))

    def test_several_numbers_where_one_is_needed(self, model, refiner, backend):
        latents, x = rand(2, 4, 8, 8), images(2)
        for several in (torch.tensor([1, 1]), np.array([1, 1]), [1, 1]):
            with multibeta.backend(backend):
                for name, verb in {
                    "delta_sign": lambda n: model.generate(1, steps=2, delta_sign=n),
                    "num_directions": lambda n: model.principal_directions(x, 0.5, n),
                    "steps": lambda n: model.denoise(latents, 0.5, steps=n),
                    "step.": lambda n: model.generate(1, steps=n),
                    ".*steps": lambda n: model.invert(latents, steps=n),
                    "steps.*": lambda n: refiner.denoise(x, steps=n),
                    "beta": lambda n: model.denoise(latents, n, steps=2),
                    "eta": lambda n: refiner.denoise(x, steps=3, eta=n),
                    "guidance": lambda n: refiner.denoise(x, steps=3, guidance=n),
                    "temperature": lambda n: refiner.denoise(x, steps=3, temperature=n),
                    "num_images": lambda n: model.generate(n, steps=2),
                    "num_components": lambda n: refiner.fit_latents(images(4), n),
                }.items():
                    with pytest.raises(ValueError, match=f"{name}.* must .*, got"):
                        verb(several)

    @pytest.mark.parametrize("case", LATENTS)
    def test_latents(self, model, backend, case):
        latents, message = LATENTS[case]
        with multibeta.backend(backend):
            for verb in (
                lambda: model.denoise(latents, 0.5, steps=3),
                lambda: model.denoise(latents, 0.0),
                lambda: model.denoise(latents, 0.5, "ancestral", 3, seeds=[1, 2]),
                lambda: model.invert(latents, steps=3),
                lambda: model.decode(latents, 0.5),
            ):
                with pytest.raises(ValueError, match=message):
                    verb()

    def test_latents_of_one_representation(self, refiner, baseline, backend):
        with multibeta.backend(backend):
            for pipeline in (refiner, baseline):
                shape = pipeline.vae.config.latent_shape
                for latents, message in (
                    (rand(*shape), r"latents must have shape \(N, \*"),
                    (torch.ones(2, *shape, dtype=torch.int64), r"latents must be of floating point, got torch\.int64"),
                    (torch.full((2, *shape), torch.nan), "latents must be finite"),
                ):
                    with pytest.raises(ValueError, match=message):
                        pipeline.decode(latents)
            latents = torch.full((2, *refiner.vae.config.latent_shape), torch.inf)
            for verb in (
                lambda: refiner.manipulate(latents, torch.ones(6, 1, 1), 1.0, steps=3),
                lambda: refiner.interpolate(latents, latents, 0.5, steps=3),
                lambda: refiner.interpolate_noise(latents, [1, 2], [3, 4], 0.5, steps=3),
            ):
                with pytest.raises(ValueError, match="latents must be finite"):
                    verb()

    def test_images(self, model, refiner, baseline, backend):
        x = images(2)
        verbs = (
            lambda x: model.encode(x, 0.5),
            lambda x: model.manipulate(x, torch.ones(4, 8, 8), 1.0, 0.5, steps=3),
            lambda x: model.interpolate(x, images(2), 0.5, 0.5, steps=3),
            lambda x: model.interpolate(images(2), x, 0.5, 0.5, steps=3),
            lambda x: model.principal_directions(x, 0.5),
            refiner.encode,
            lambda x: refiner.denoise(x, steps=3),
            lambda x: refiner.refine(x, steps=3),
            lambda x: refiner.reconstruct(x, steps=3),
            lambda x: refiner.manipulate(x, torch.ones(6, 1, 1), 1.0, steps=3),
            lambda x: refiner.interpolate(x, images(2), 0.5, steps=3),
            lambda x: refiner.interpolate_noise(x, [1, 2], [3, 4], 0.5, steps=3),
            lambda x: refiner.attribute_direction(x, images(2)),
            baseline.encode,
        )
        cases = (
            (x[0], r"images must have shape \(N, 3, 16, 16\), got \(3, 16, 16\)"),
            (x[:, :1], r"images must have shape \(N, 3, 16, 16\), got \(2, 1, 16, 16\)"),
            (x[..., ::2], r"images must have shape \(N, 3, 16, 16\), got \(2, 3, 16, 8\)"),
            ((x * 127).to(torch.int64), r"images must be floats in \[-1, 1\], got torch\.int64 \(possible are uint8"),
            (x * 127, r"images must be floats in \[-1, 1\], got torch\.float32 from -127 to 127; bytes .* are taken as uint8"),
            (x.numpy(), r"images must have shape \(N, 16, 16, 3\) as a NumPy array, got \(2, 3, 16, 16\)"),
            (x.movedim(1, 3).numpy(), r"as an array must be floats in \[0, 1\], got float32 from -1 to 1; .*a tensor holds"),
            (x * torch.nan, r"images must be floats in \[-1, 1\], got torch\.float32 from nan"),
            (x / 0, r"images must be floats in \[-1, 1\]"),
        )
        with multibeta.backend(backend):
            for verb in verbs:
                for given, message in cases:
                    with pytest.raises(ValueError, match=message):
                        verb(given)
                with pytest.raises(TypeError, match=r"images must be a tensor \(N, 3, 16, 16\), a NumPy array .* got str"):
                    verb("photo.png")
                with pytest.raises(TypeError, match=r"got a list of Image, Tensor; multibeta\.data\.load_images"):
                    verb([Image.new("RGB", (16, 16)), x[0]])

    @pytest.mark.parametrize(
        ("beta", "message"),
        [
            (None, r"beta must be a number in \[0, 1\], or one for each sample, got None"),
            ("high", r"beta must be a number in \[0, 1\]"),
            (1.5, r"beta must lie in \[0, 1\], got 1\.5"),
            (math.nan, r"beta must lie in \[0, 1\], got nan"),
            (torch.tensor([0.5, 2.0]), r"beta must lie in \[0, 1\], got 2"),
        ],
    )
    def test_betas(self, model, backend, beta, message):
        latents = rand(2, 4, 8, 8)
        with multibeta.backend(backend):
            for verb in (
                lambda: model.encode(images(2), beta),
                lambda: model.encode(images(2), beta, seeds=[1, 2]),
                lambda: model.decode(latents, beta),
                lambda: model.denoise(latents, beta, steps=3),
            ):
                with pytest.raises(ValueError, match=message):
                    verb()
            if beta is not None:  # which is the model's own where images are edited
                with pytest.raises(ValueError, match=message):
                    model.manipulate(images(2), rand(4, 8, 8), 1.0, beta)

    def test_a_beta_for_each_sample_is_for_networks_and_not_for_a_walk(self, model, backend):
        beta, x = torch.tensor([0.2, 0.7, 0.7]), images(3)
        with multibeta.backend(backend):
            latents = model.encode(x, beta, seeds=[1, 2, 3])
            alone = [model.encode(x[i : i + 1], float(beta[i]), seeds=[i + 1]) for i in range(3)]
            close(latents, torch.cat(alone))
            close(model.decode(latents, beta), torch.cat([model.decode(z, float(b)) for z, b in zip(alone, beta, strict=True)]))
            for verb in (model.encode, model.decode):
                given = x if verb == model.encode else latents
                with pytest.raises(ValueError, match=r"beta must be one number, or one for each of 3 samples, got \(2,\)"):
                    verb(given, beta[:2])
            with pytest.raises(ValueError, match=r"beta must be one number for all samples here, got \(3,\)"):
                model.denoise(latents, beta, steps=3)
            close(model.denoise(latents, torch.tensor(0.7), steps=3), model.denoise(latents, 0.7, steps=3))

    def test_numbers(self, model, refiner, backend):
        x, latents, direction = images(2), rand(2, 4, 8, 8), rand(4, 8, 8)
        with multibeta.backend(backend):
            for verb, message in (
                (lambda: model.denoise(latents, 0.5, steps=2.5), "steps must be an integer, got 2.5"),
                (lambda: model.denoise(latents, 0.5, steps=0), "steps must lie between 1 and 50"),
                (lambda: model.denoise(latents, 0.0, steps=0), "steps must lie between 1 and 50"),
                (lambda: model.invert(latents, steps=2.5), "steps must be an integer, got 2.5"),
                (lambda: model.denoise(latents, 0.5, steps=None), "steps must be an integer, got None"),
                (lambda: model.generate(2, steps=3, delta_sign=0), "delta_sign must be 1 or -1, got 0"),
                (lambda: model.generate(2.5, steps=3), "num_images and batch_size must be integers, got 2.5 and 64"),
                (lambda: model.manipulate(x, direction[None].expand(3, -1, -1, -1), 1.0, 0.5), r"got \(3, 4, 8, 8\)"),
                (lambda: model.manipulate(x, direction[None, None], 1.0, 0.5), r"shape \(4, 8, 8\), got \(1, 1, 4, 8, 8\)"),
                (lambda: model.manipulate(x, direction / 0, 1.0, 0.5), "direction must be of finite real numbers"),
                (lambda: model.manipulate(x, direction, math.inf, 0.5), "strength must be finite, got inf"),
                (lambda: model.manipulate(x, direction, torch.ones(3), 0.5), r"strength must be one number, or .* 2 samples"),
                (
                    lambda: model.interpolate(x, x, math.nan, 0.5),
                    "weights must be a finite number or a sequence of them, got nan",
                ),
                (lambda: model.interpolate(x, x, [], 0.5), r"weights must be a finite number or a sequence of them, got \[\]"),
                (lambda: model.interpolate(x, x, None, 0.5), "weights must be a finite number or a sequence of them, got None"),
                (lambda: model.interpolate(x, x, 0.5, 0.5, dims=[4]), r"dims must lie between 0 and 3, got \[4\]"),
                (lambda: model.interpolate(x, x, 0.5, 0.5, dims=[0.5]), r"dims must lie between 0 and 3, got \[0\.5\]"),
                (lambda: model.interpolate(x, x, 0.5, 0.5, dims=[1, 1]), r"dims must name each channel once, got \[1, 1\]"),
                (lambda: model.interpolate(x, x, 0.5, 0.5, dims=1), "dims must be a sequence of channels, got 1"),
                (lambda: refiner.denoise(x, steps=2.5), "steps must be an integer, got 2.5"),
                (lambda: refiner.denoise(x, steps=3, guidance=math.nan), "guidance must be a finite number, got nan"),
                (lambda: refiner.denoise(x, steps=3, temperature=math.inf), "temperature must be a finite number, got inf"),
                (lambda: refiner.denoise(x, steps=3, eta=math.nan), "eta must be a finite number, got nan"),
                (lambda: refiner.denoise(x, steps=3, noise=x[:1]), "noise must be one for each of 2 reconstructions, got 1"),
                (lambda: refiner.denoise(x, steps=3, noise=x[:, :1]), r"noise must have shape \(N, \*\(3, 16, 16\)\), got"),
                (lambda: refiner.denoise(x, steps=3, noise=x * torch.nan), "noise must be finite"),
            ):
                with pytest.raises(ValueError, match=message):
                    verb()
            paths = [model.interpolate(x, x.flip(0), weights, 0.5, steps=3) for weights in ([0.0, 0.5], np.array([0, 0.5]))]
            close(*paths)
            close(model.interpolate(x, x.flip(0), np.float32(0.5), 0.5, steps=3), paths[0][:, 1])


class TestGenerator:
    """A torch.Generator in the place of the seed, and the bar, in every class."""

    @pytest.fixture(params=["model", "baseline", "refiner"])
    def generate(self, request):
        pipeline = request.getfixturevalue(request.param)
        return functools.partial(pipeline.generate, **({} if request.param == "baseline" else {"steps": 3}))

    def test_its_state_gives_the_seed(self, generate):
        generator = torch.Generator().manual_seed(5)
        first, second = (generate(2, generator=generator) for _ in range(2))
        assert not torch.allclose(first, second, atol=1e-3)
        again = torch.Generator().manual_seed(5)
        assert torch.equal(generate(2, generator=again, batch_size=2), first)
        seed = int(torch.randint(2**63 - 1, (), generator=again))
        assert torch.equal(generate(2, seed=seed), second)

    def test_errors_say_what_is_possible(self, generate):
        with pytest.raises(ValueError, match="a seed or a generator, not both: got seed=3"):
            generate(1, seed=3, generator=torch.Generator())
        with pytest.raises(TypeError, match=r"one torch\.Generator, got a list"):
            generate(1, generator=[torch.Generator()])

    def test_the_bar_is_shown_once_it_is_configured(self, generate, capsys):
        pipeline = generate.func.__self__
        generate(2, batch_size=1)
        assert capsys.readouterr().err == ""
        try:
            pipeline.set_progress_bar_config(desc="walking")
            generate(2, batch_size=1)
            shown = capsys.readouterr().err
            assert "walking: 100%" in shown and (" 6/6 " in shown or " 2/2 " in shown)
            pipeline.set_progress_bar_config(disable=True)
            generate(2)
            assert capsys.readouterr().err == ""
        finally:
            del pipeline._progress


class TestSeeds:
    @pytest.fixture(params=["model", "baseline", "refiner"])
    def generate(self, request):
        pipeline = request.getfixturevalue(request.param)
        return functools.partial(pipeline.generate, **({} if request.param == "baseline" else {"steps": 2}))

    def test_any_integer_is_one(self, generate):
        for seed, same in ((2**63, -(2**63)), (2**64 + 3, 3), (-1, 2**64 - 1), (np.uint64(2**63), 2**63), (torch.tensor(3), 3)):
            assert torch.equal(generate(2, seed=seed), generate(2, seed=same))

    @pytest.mark.parametrize("seed", [None, 1.5, 1.0, True, "1", [1]])
    def test_nothing_else_is(self, generate, seed):
        with pytest.raises(ValueError, match=r"a seed must be an integer .*got "):
            generate(1, seed=seed)

    def test_of_samples(self, model, refiner):
        latents, x = rand(2, 4, 8, 8), images(2)
        walks = (
            lambda seeds: model.encode(x, 0.5, seeds=seeds),
            lambda seeds: model.denoise(latents, 0.5, "ancestral", 3, seeds=seeds),
            lambda seeds: refiner.denoise(x, "ddpm", 3, seeds=seeds),
            lambda seeds: refiner.refine(x, seeds, steps=3),
            lambda seeds: refiner.interpolate_noise(x, seeds, seeds, 0.5, steps=3),
            refiner.draw_latents,
        )
        for walk in walks:
            expected = walk([-1, 5])
            for seeds in ((2**64 - 1, 5), np.array([-1, 5]), torch.tensor([-1, 5], dtype=torch.int32), [-1, 5 + 2**64]):
                assert torch.equal(walk(seeds), expected)
            for seeds in ([0.5, 1.0], [True, False], torch.ones(2), [None, 1]):
                with pytest.raises(ValueError, match=r"must be (an integer|integers)"):
                    walk(seeds)
            with pytest.raises(ValueError, match="seeds must be integers, one for each sample, got 3"):
                walk(3)

    def test_of_a_mixture(self, refiner):
        fitted = DiffusionVAE(refiner.vae, refiner.diffusion)
        for seed in (-1, 2**64 - 1):
            fitted.fit_latents(images(8), 2, "diag", seed=seed)
            assert torch.equal(fitted.mixture.means, fitted.mixture.means) and fitted.draw_latents([0]).isfinite().all()
        with pytest.raises(ValueError, match=r"a seed must be an integer .*got 0\.5"):
            fitted.fit_latents(images(8), 2, seed=0.5)

    def test_a_mixture_keeps_its_dtype_where_a_dtype_stands_alone(self, refiner):
        fitted = copy.deepcopy(refiner)
        fitted.fit_latents(images(8), 2, "diag")
        means = fitted.mixture.means
        fitted.to(torch.float64)
        assert fitted.dtype == torch.float64 and torch.equal(fitted.mixture.means, means)
        assert fitted.draw_latents([0]).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [torch.float64, torch.bfloat16, torch.float16], ids=str)
class TestDtypes:
    """What verbs return does not depend on the dtype of the weights or on what walks."""

    def test_first_system(self, model, backend, weights):
        copied = copy.deepcopy(model).to(dtype=weights)
        with multibeta.backend(backend):
            encoded = copied.encode(images(2), 0.5, seeds=[1, 2])
            assert encoded.dtype == torch.float32
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                latents = encoded.to(dtype)
                for walked in (
                    copied.denoise(latents, 0.5, steps=2),
                    copied.denoise(latents, 0.5, "ancestral", 2),
                    copied.denoise(latents, 0.0),
                    copied.invert(latents, steps=2),
                ):
                    assert walked.dtype == dtype and walked.isfinite().all()
                assert copied.decode(latents, 0.5).dtype == torch.float32
            direction = rand(4, 8, 8).double()
            for made in (
                copied.generate(2, steps=2),
                copied.manipulate(images(2), direction, 1.0, 0.5, steps=2),
                copied.interpolate(images(2), images(2, 1), 0.5, 0.5, steps=2),
            ):
                assert made.dtype == torch.float32 and made.isfinite().all()

    def test_second_system(self, refiner, backend, weights):
        copied = copy.deepcopy(refiner).to(dtype=weights)
        with multibeta.backend(backend):
            latents = copied.encode(images(2), seeds=[1, 2])
            for dtype in (torch.float64, torch.bfloat16):
                made = (
                    copied.decode(latents.to(dtype)),
                    copied.denoise(images(2).to(dtype), steps=2),
                    copied.denoise(images(2), steps=2, noise=rand(2, 3, 16, 16).to(dtype)),
                    copied.manipulate(latents.to(dtype), latents[0].to(dtype), 1.0, steps=2),
                    copied.interpolate(latents.to(dtype), latents, 0.5, steps=2),
                )
                assert all(one.dtype == torch.float32 and one.isfinite().all() for one in (latents, *made))
            assert all(
                one.dtype == torch.float32
                for one in (
                    copied.refine(images(1), steps=2),
                    copied.reconstruct(images(1), steps=2),
                    copied.generate(1, steps=2),
                )
            )
