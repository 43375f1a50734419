"""Measures of disentanglement: what they say of codes made to be good or bad, and that they are what they are called."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.stats
import sklearn
import torch
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import mutual_info_score, roc_auc_score

from multibeta import metrics
from multibeta.metrics import (
    boosting,
    dci_from_codes,
    dci_from_importance,
    importance,
    mig_from_codes,
    mutual_information,
    tad_from_codes,
)

SIZES = (4, 2, 7)


def random_factors(num_samples, sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, num_samples) for size in sizes], 1)


def balanced(factors):
    """Factors as codes of like variance."""
    return (factors - factors.mean(0)) / factors.std(0)


def rotated(codes):
    """A reflection at the diagonal, which mixes all axes alike."""
    return codes - 2 * codes.mean(1, keepdims=True)


def cases(num_samples=600):
    """Codes and factors, from perfect to useless."""
    rng = np.random.default_rng(1)
    factors = random_factors(num_samples)
    codes = balanced(factors)
    noise = rng.normal(size=codes.shape)
    rare = (rng.random((num_samples, 2)) < 0.02).astype(np.int64)
    rare[:2] = [[0, 1], [1, 0]]
    return {
        "perfect": (codes, factors),
        "random": (noise, factors),
        "rotated": (rotated(codes), factors),
        "duplicated": (np.concatenate([codes, codes], 1), factors),
        "noisy": (codes + 0.5 * noise, factors),
        "imbalanced": (rare + 0.3 * noise[:, :2], rare),
        "many values": (noise, random_factors(num_samples, (183, 2))),
        "ties": (rng.integers(0, 5, codes.shape), factors),
        "float32 with a dead code": (np.concatenate([codes, np.zeros((num_samples, 1))], 1).astype(np.float32), factors),
    }


CASES = cases()


# --- mutual information gap ---


def published_mutual_information(codes, factors, num_bins=20):
    def binned(code):
        return np.digitize(code, np.histogram_bin_edges(code, num_bins)[:-1])

    return np.array([[mutual_info_score(factor, binned(code)) for code in codes.T] for factor in factors.T])


@pytest.mark.parametrize("case", CASES)
def test_mutual_information_agrees_with_scikit_learn(case):
    codes, factors = CASES[case]
    expected = published_mutual_information(codes, factors)
    np.testing.assert_allclose(mutual_information(codes, factors), expected, rtol=0, atol=1e-12)
    entropy = np.array([mutual_info_score(factor, factor) for factor in factors.T])
    second, first = np.sort(expected, 1)[:, -2:].T
    assert mig_from_codes(codes, factors) == pytest.approx(np.mean((first - second) / entropy), abs=1e-12)


def test_perfect_codes_score_high_mig():
    # Finite samples of independent factors tell a little about each other.
    assert mig_from_codes(*CASES["perfect"]) > 0.99


def test_duplicated_codes_score_low_mig():
    assert mig_from_codes(*CASES["duplicated"]) == 0


def test_rotated_and_random_codes_score_low_mig():
    assert mig_from_codes(*CASES["rotated"]) < 0.1
    assert mig_from_codes(*CASES["random"]) < 0.03


def test_mig_falls_with_noise():
    codes, factors = CASES["perfect"]
    noise = np.random.default_rng(3).normal(size=codes.shape)
    scores = [mig_from_codes(codes + scale * noise, factors) for scale in (0, 0.3, 1, 3)]
    assert scores == sorted(scores, reverse=True)


def test_mig_does_not_depend_on_order_sign_scale_or_labels():
    codes, factors = CASES["noisy"]
    expected = mig_from_codes(codes, factors)
    assert mig_from_codes(codes[:, ::-1], factors[:, ::-1]) == pytest.approx(expected, abs=1e-12)
    assert mig_from_codes(-3.7 * codes + 11, factors) == pytest.approx(expected, abs=1e-12)
    assert mig_from_codes(codes, 5 - 3 * factors) == pytest.approx(expected, abs=1e-12)


def test_a_factor_with_more_values_than_bins_has_a_ceiling():
    grid = np.indices((4, 24, 183)).reshape(3, -1).T  # Cars3D
    result = metrics.information_gap(grid.astype(np.float32), grid)
    assert result["ceiling"] == pytest.approx(0.839, abs=5e-4)
    assert 0.99 * result["ceiling"] < result["mig"] <= result["ceiling"]
    assert result["mutual_information"].argmax(1).tolist() == [0, 1, 2]
    np.testing.assert_allclose(result["entropy"], np.log([4, 24, 183]))


def test_codes_that_vary_in_their_last_bits_only_tell_nothing():
    factors = random_factors(100, (2, 3))
    codes = np.where(factors == 0, np.float32(1), np.nextafter(np.float32(1), np.float32(2)))
    codes[:, 1] = 5
    assert mutual_information(codes, factors).tolist() == [[0, 0], [0, 0]]


def test_mig_takes_tensors_of_any_precision():
    codes, factors = CASES["noisy"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        codes_of_dtype = torch.from_numpy(codes).to(dtype).requires_grad_()
        wide = codes_of_dtype.detach().to(torch.promote_types(dtype, torch.float32)).numpy()
        assert mig_from_codes(codes_of_dtype, torch.from_numpy(factors)) == mig_from_codes(wide, factors)


# --- disentanglement, completeness, informativeness ---


def published_dci(importance):
    def score(matrix):
        concentration = 1 - scipy.stats.entropy(matrix.T + 1e-11, base=matrix.shape[1])
        weights = matrix if matrix.sum() else np.ones_like(matrix)
        return np.sum(concentration * weights.sum(1) / weights.sum())

    return score(importance), score(importance.T)


@pytest.mark.parametrize("shape", [(2, 2), (10, 6), (3, 7)])
def test_dci_of_an_importance_agrees_with_its_formula(shape):
    matrix = np.random.default_rng(0).random(shape) ** 4
    matrix[0] = 0  # a dead code
    assert dci_from_importance(matrix) == pytest.approx(published_dci(matrix), abs=1e-12)


def test_one_code_per_factor_is_disentangled_and_complete():
    assert dci_from_importance(np.eye(4)) == pytest.approx((1, 1), abs=1e-9)
    assert dci_from_importance(np.eye(6)[:, [3, 0, 5]])[1] == pytest.approx(1, abs=1e-9)


def test_duplicated_codes_are_disentangled_but_not_complete():
    disentanglement, completeness = dci_from_importance(np.concatenate([np.eye(3), np.eye(3)]) / 2)
    assert disentanglement == pytest.approx(1, abs=1e-9)
    assert completeness == pytest.approx(1 - np.log(2) / np.log(6), abs=1e-9)


def test_one_code_for_all_factors_is_complete_but_not_disentangled():
    matrix = np.zeros((5, 3))
    matrix[2] = 1
    assert dci_from_importance(matrix) == pytest.approx((0, 1), abs=1e-9)


def test_equal_or_no_importance_scores_zero():
    assert dci_from_importance(np.ones((5, 3))) == pytest.approx((0, 0), abs=1e-12)
    assert dci_from_importance(np.zeros((5, 3))) == pytest.approx((0, 0), abs=1e-12)


def test_dci_does_not_depend_on_order_or_scale():
    matrix = np.random.default_rng(0).random((6, 4))
    expected = dci_from_importance(matrix)
    assert dci_from_importance(9 * matrix[::-1, ::-1]) == pytest.approx(expected, abs=1e-9)
    # Scales near the 1e-11 under the logarithm are the published exception.
    assert dci_from_importance(1e-9 * np.eye(3))[0] == pytest.approx(0.9006, abs=1e-4)


def halves(case, train=240, test=120):
    codes, factors = CASES[case]
    return codes[:train], factors[:train], codes[train : train + test], factors[train : train + test]


def test_dci_is_made_by_the_boosted_trees_of_scikit_learn():
    train_codes, train_factors, test_codes, test_factors = halves("noisy")
    trees = [GradientBoostingClassifier(random_state=5).fit(train_codes, factor) for factor in train_factors.T]
    scores = [tree.score(test_codes, factor) for tree, factor in zip(trees, test_factors.T, strict=True)]
    result = dci_from_codes(train_codes, train_factors, test_codes, test_factors, seed=5, num_threads=2)
    matrix = np.stack([tree.feature_importances_ for tree in trees], 1)
    expected = published_dci(matrix)
    assert (result["disentanglement"], result["completeness"]) == pytest.approx(expected, abs=1e-12)
    assert result["informativeness_test"] == pytest.approx(np.mean(scores), abs=1e-12)
    assert result["informativeness_train"] == 1


@pytest.mark.parametrize("case", ["ties", "duplicated", "imbalanced"])  # the seed decides, the seed decides, one tree a round
def test_trees_in_parallel_are_the_plain_ones(case):
    codes, factors = CASES[case]
    with ThreadPoolExecutor(3) as pool:
        for factor in factors[:80].T:
            plain = GradientBoostingClassifier(random_state=7).fit(codes[:80], factor)
            parallel = boosting.boosted_trees(7, pool).fit(codes[:80], factor)
            assert isinstance(parallel, boosting.ParallelBoosting) and not isinstance(plain, boosting.ParallelBoosting)
            np.testing.assert_array_equal(parallel.feature_importances_, plain.feature_importances_)
            np.testing.assert_array_equal(parallel.decision_function(codes), plain.decision_function(codes))
            np.testing.assert_array_equal(parallel.train_score_, plain.train_score_)


def test_dci_does_not_depend_on_threads():
    arrays = halves("ties", 100, 30)
    expected = importance.boosted_importance(*arrays, seed=3, num_threads=1)
    for found, wanted in zip(importance.boosted_importance(*arrays, seed=3, num_threads=4), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def draws_twice(self, *arguments, **options):
    arguments[6].randint(2)
    return SCIKIT_LEARN_ROUND(self, *arguments, **options)


SCIKIT_LEARN_ROUND = GradientBoostingClassifier._fit_stage


@pytest.mark.parametrize(
    ("estimator", "fit_round", "reason"),
    [
        (GradientBoostingClassifier, draws_twice, "its trees differ"),
        (boosting.ParallelBoosting, lambda self, i, X, y: None, "TypeError"),  # the round has other arguments
    ],
)
def test_with_another_scikit_learn_only_whole_factors_run_in_parallel(monkeypatch, caplog, estimator, fit_round, reason):
    monkeypatch.setattr(estimator, "_fit_stage", fit_round)
    boosting.parallel_equals_plain.cache_clear()
    arrays = halves("ties", 60, 30)
    try:
        found = importance.boosted_importance(*arrays, num_threads=2)
        assert not boosting.parallel_equals_plain()
    finally:
        boosting.parallel_equals_plain.cache_clear()
    for values, wanted in zip(found, importance.boosted_importance(*arrays, num_threads=1), strict=True):
        np.testing.assert_array_equal(values, wanted)
    (record,) = caplog.records
    assert record.name == "multibeta" and reason in record.getMessage()


def test_dci_ranks_perfect_rotated_and_random_codes():
    perfect, rotation, noise = (dci_from_codes(*halves(case)) for case in ("perfect", "rotated", "random"))
    assert perfect["disentanglement"] > 0.99 and perfect["completeness"] > 0.99 and perfect["informativeness_test"] == 1
    assert rotation["disentanglement"] < 0.3 and rotation["informativeness_test"] > 0.8
    assert noise["disentanglement"] < 0.1 and noise["informativeness_test"] < 0.4


def test_dci_goes_on_from_its_cache(tmp_path, monkeypatch):
    codes, factors = CASES["imbalanced"]
    arrays = codes[:200], factors[:200], codes[200:300], factors[200:300]
    fresh = dci_from_codes(*arrays, cache=tmp_path)
    assert fresh == dci_from_codes(*arrays)
    assert len(list(tmp_path.iterdir())) == 2  # one file per factor

    def refuse(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(importance, "_fit", refuse)
    assert dci_from_codes(*arrays, cache=tmp_path) == fresh
    with pytest.raises(AssertionError, match="fitted again"):
        dci_from_codes(*arrays, seed=1, cache=tmp_path)


# --- total AUROC difference ---


def published_tad(codes, attributes, step=0.01):
    """The definition in loops: areas, redundancies, captured attributes, sum."""
    codes = codes.astype(np.float32)
    areas = np.full((attributes.shape[1], codes.shape[1]), 0.5)
    for latent, code in enumerate(codes.T):
        low, high = code.min(), code.max()
        if not high - low > 0.2:
            continue
        for attribute, label in enumerate(attributes.T):
            directions = []
            for sign in (1, -1):
                rates = []
                for t in np.linspace(0, 1, round(1 / step) + 1):
                    threshold = np.float32(t) * (high - low) + low
                    detected = code >= threshold if sign == 1 else code < threshold
                    rates.append((detected[label].mean(), detected[~label].mean()))
                hits, alarms = np.sort(np.array(rates), axis=0).T
                directions.append(sum(hits[i] * (alarms[i] - alarms[i - 1]) for i in range(1, len(hits))))
            areas[attribute, latent] = max(directions)
    information = np.array([[mutual_info_score(a, b) for a in attributes.T] for b in attributes.T])
    entropy = information.diagonal().copy()
    np.fill_diagonal(information, 0)
    redundancy = 1 - (entropy - information.max(1)) / entropy
    second, first = np.sort(areas, 1)[:, -2:].T
    captured = np.flatnonzero((first >= 0.75) & (redundancy <= 0.2))
    return areas, redundancy, captured.tolist(), (first - second)[captured].sum()


def faces(num_samples=150, seed=0):
    """Five latents and four attributes: two captured, one found by two latents, one that is nearly another's copy."""
    rng = np.random.default_rng(seed)
    codes = rng.normal(size=(num_samples, 5)).astype(np.float32)
    codes[:, 4] *= 1e-3  # skipped
    noise = 0.4 * rng.normal(size=(num_samples, 3))
    attributes = np.stack([codes[:, 0] > noise[:, 0], codes[:, 1] < 1 + noise[:, 1], codes[:, 2] + codes[:, 3] > 0], 1)
    copy = attributes[:, 0] ^ (rng.random(num_samples) < 0.02)
    return codes, np.concatenate([attributes, copy[:, None]], 1)


@pytest.mark.parametrize("step", [0.01, 0.1])
def test_tad_agrees_with_its_definition(step):
    codes, attributes = faces()
    codes[:, 3] = codes[:, 3].round()  # ties
    with pytest.warns(UserWarning, match=r"latents 3"):
        result = tad_from_codes(codes, attributes, step=step)
    areas, redundancy, captured, total = published_tad(codes, attributes, step)
    np.testing.assert_allclose(result["areas"], areas, atol=1e-12)
    np.testing.assert_allclose(result["redundancy"], redundancy, atol=1e-12)
    assert result["captured"] == captured and result["tad"] == pytest.approx(total, abs=1e-12)
    assert result["skipped"] == 1 and result["step"] == step and result["num_images"] == 150
    assert result["positives"].tolist() == attributes.sum(0).tolist()


def test_exact_areas_agree_with_scikit_learn():
    codes, attributes = faces()
    codes[:, 3] = codes[:, 3].round()  # ties
    areas = tad_from_codes(codes, attributes, auroc="exact")["areas"]
    for attribute, label in enumerate(attributes.T):
        expected = [roc_auc_score(label, code) for code in codes[:, :4].T]
        np.testing.assert_allclose(areas[attribute, :4], np.maximum(expected, 1 - np.array(expected)), atol=1e-12)


@pytest.mark.parametrize("auroc", ["grid", "exact"])
def test_tad_counts_attributes_that_one_latent_detects_and_no_other_attribute_tells(auroc):
    codes, attributes = faces(num_samples=1000)
    result = tad_from_codes(codes, attributes, auroc)
    assert result["captured"] == [1, 2]  # 0 and 3 are copies of each other
    assert tad_from_codes(codes, attributes[:, :3], auroc)["captured"] == [0, 1, 2]
    assert result["difference"][1] > 0.3 and result["difference"][2] < 0.05
    assert tad_from_codes(np.concatenate([codes, codes], 1), attributes, auroc)["tad"] == 0


def test_tad_does_not_depend_on_order_sign_or_scale_but_for_the_range():
    codes, attributes = faces()
    expected = tad_from_codes(codes, attributes, "exact")["tad"]
    assert tad_from_codes(-4 * codes[:, ::-1], attributes[:, ::-1], "exact")["tad"] == pytest.approx(expected, abs=1e-12)
    assert tad_from_codes(4 * codes, attributes)["tad"] == tad_from_codes(codes, attributes)["tad"]
    with pytest.warns(UserWarning, match="no latent varies"):
        assert tad_from_codes(0.01 * codes, attributes)["tad"] == 0
    assert tad_from_codes(0.01 * codes, attributes, "exact", min_range=0)["tad"] > 0


def test_an_outlier_deceives_the_grid_and_not_the_exact_area():
    rng = np.random.default_rng(0)
    codes, attributes = rng.normal(size=(500, 3)), rng.random((500, 2)) < 0.5
    codes[0, 0] = 1e6
    with pytest.warns(UserWarning, match=r'latents 0 fall .* compare auroc="exact"'):
        assert tad_from_codes(codes, attributes)["captured"] == [0, 1]
    assert tad_from_codes(codes, attributes, "exact")["captured"] == []


def test_a_constant_attribute_is_left_out():
    codes, attributes = faces()
    expected = tad_from_codes(codes, attributes)
    with pytest.warns(UserWarning, match="constant attributes are left out: 4"):
        result = tad_from_codes(codes, np.concatenate([attributes, np.ones((150, 1), bool)], 1))
    assert result["tad"] == expected["tad"] and result["captured"] == expected["captured"]
    assert np.isnan(result["areas"][4]).all() and np.isnan(result["redundancy"][4])


# --- what makes no sense ---

CODES, FACTORS = CASES["noisy"]
WITH_NAN = np.where(np.arange(3) == 1, np.nan, CODES)
CONSTANT = np.where(np.arange(3) == 2, 1, FACTORS)


@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (WITH_NAN, FACTORS, "finite, got NaN or infinity in columns 1"),
        (CODES, CONSTANT, "two values or more, constant are columns 2"),
        (CODES[:, :1], FACTORS, "at least 2 codes, got 1"),
        (CODES[:-1], FACTORS, "got 600 rows for 599 codes"),
        (CODES[:0], FACTORS[:0], "at least one of each"),
        (CODES, FACTORS[:, 0], r"factors must be \(samples, factors\)"),
        (CODES, FACTORS + 0.5, "factors must be integers, got float64"),
        (CODES + 1j, FACTORS, "real numbers, got complex128"),
    ],
)
def test_wrong_codes_and_factors_are_refused(codes, factors, message):
    with pytest.raises(ValueError, match=message):
        mig_from_codes(codes, factors)
    with pytest.raises(ValueError, match=message):
        dci_from_codes(codes, factors, codes, factors)


def test_training_and_test_must_belong_together():
    with pytest.raises(ValueError, match="the same codes, got 3 and 2"):
        dci_from_codes(CODES, FACTORS, CODES[:, :2], FACTORS)
    with pytest.raises(ValueError, match="the same factors, got 3 and 2"):
        dci_from_codes(CODES, FACTORS, CODES, FACTORS[:, :2])
    with pytest.raises(ValueError, match="at least 2 factors, got 1"):
        dci_from_codes(CODES, FACTORS[:, :1], CODES, FACTORS[:, :1])


@pytest.mark.parametrize("matrix", [np.ones((1, 3)), np.ones((3, 1)), -np.ones((3, 3)), np.full((3, 3), np.nan), np.ones(3)])
def test_wrong_importance_is_refused(matrix):
    with pytest.raises(ValueError, match="importance must be"):
        dci_from_importance(matrix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": CODES[:150, :1]}, "at least 2 latents, got 1"),
        ({"codes": WITH_NAN[:150]}, "finite"),
        ({"codes": CODES}, "got 150 rows for 600 codes"),
        ({"attributes": FACTORS[:150]}, "must be 0 or 1, got values from 0 to 6"),
        ({"attributes": np.zeros((150, 2))}, "every attribute is constant"),
        ({"auroc": "trapezoid"}, '"grid" or "exact"'),
        ({"step": 0.03}, "divide 1"),
    ],
)
def test_wrong_latents_and_attributes_are_refused(change, message):
    codes, attributes = faces()
    with pytest.raises(ValueError, match=message):
        tad_from_codes(**{"codes": codes, "attributes": attributes, **change})


def test_bins_must_be_several():
    with pytest.raises(ValueError, match="num_bins must be at least 2, got 1"):
        mig_from_codes(CODES, FACTORS, num_bins=1)


# --- encoders ---


class Dots:
    """A grey dot of four brightnesses in one of three places on each axis."""

    factor_names, factor_sizes = ("brightness", "row", "column"), (4, 3, 3)
    attribute_names = ("bright", "low")

    def __len__(self):
        return 36

    def factors(self, indices):
        return torch.from_numpy(np.stack(np.unravel_index(np.asarray(indices), self.factor_sizes), 1))

    def attributes(self, indices):
        brightness, row, _ = self.factors(indices).T
        return torch.stack([brightness > 1, row > 0], 1)

    def images(self, indices):
        images = torch.zeros(len(indices), 1, 3, 3, dtype=torch.uint8)
        for image, (brightness, row, column) in zip(images, self.factors(indices).tolist(), strict=True):
            image[0, row, column] = 60 * brightness + 60
        return images


class Nothing(Dots):
    def __len__(self):
        return 0


def read_dots(images):
    """An encoder that undoes the drawing, with a (3, 1) latent."""
    assert images.dtype == torch.float32 and images.min() >= -1 and not torch.is_grad_enabled()
    light = (images[:, 0] + 1) / 2
    place = torch.arange(3.0)
    total = light.sum((1, 2))
    row, column = light.sum(2) @ place / total, light.sum(1) @ place / total
    return torch.stack([total, row, column], 1).unsqueeze(2)


def test_an_encoder_that_undoes_the_drawing_scores_high():
    gap = metrics.mig(read_dots, Dots(), num_images=500, progress=False)
    assert gap["mig"] > 0.97 and gap["factor_names"] == ("brightness", "row", "column")
    assert (gap["num_images"], gap["num_bins"], gap["seed"], gap["code_shape"], gap["resolution"]) == (500, 20, 0, (3, 1), (3, 3))

    trees = metrics.dci(read_dots, Dots(), num_train=100, num_test=50, progress=False)
    assert trees["disentanglement"] > 0.99 and trees["informativeness_test"] == 1
    assert trees["importance"].argmax(0).tolist() == [0, 1, 2] and trees["accuracy_test"].shape == (3,)
    assert (trees["num_train"], trees["num_test"], trees["seed"]) == (100, 50, 0) and "num_images" not in trees
    assert trees["estimator"] == f"GradientBoostingClassifier of scikit-learn {sklearn.__version__}"

    with pytest.warns(UserWarning, match="fewer than 20"):  # four brightnesses, three places
        difference = metrics.tad(read_dots, Dots(), num_images=36, progress=False)
    assert difference["captured"] == ["bright", "low"] and difference["attribute_names"] == ("bright", "low")


def test_an_encoder_sees_one_batch_at_a_time_and_the_score_does_not_depend_on_it():
    seen = []

    def watched(images):
        seen.append(len(images))
        return read_dots(images).bfloat16()

    scores = [metrics.mig(watched, Dots(), num_images=50, batch_size=size, progress=False)["mig"] for size in (64, 16)]
    assert seen == [50, 16, 16, 16, 2] and scores[0] == scores[1]
    other = metrics.mig(read_dots, Dots(), num_images=50, seed=1, progress=False)["mig"]
    assert other != scores[0]


def test_encoders_and_datasets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"encode must return codes \(n, \.\.\.\) for n images, got shape \(3,\) for 8"):
        metrics.mig(lambda images: torch.zeros(3), Dots(), num_images=8, progress=False)
    with pytest.raises(ValueError, match="finite"):
        metrics.mig(lambda images: read_dots(images) / 0 * 0, Dots(), num_images=8, progress=False)
    with pytest.raises(ValueError, match=r"object has no factors\(indices\)"):
        metrics.mig(read_dots, object())
    with pytest.raises(ValueError, match=r"object has no attributes\(indices\)"):
        metrics.tad(read_dots, object())
    with pytest.raises(ValueError, match="at most the 36 images of the dataset, got 37"):
        metrics.tad(read_dots, Dots(), num_images=37)
    with pytest.raises(ValueError, match="at least one image"):
        metrics.mig(read_dots, Dots(), num_images=0, progress=False)
    with pytest.raises(ValueError, match="the dataset has no images"):
        metrics.mig(read_dots, Nothing())


def test_a_factor_on_a_circle_costs_mig_its_gap_and_dci_nothing():
    # a hue kept as (cos, sin) is one factor on two axes that tell nearly the same
    random = np.random.RandomState(0)
    factors = np.stack([random.randint(size, size=400) for size in (6, 3, 4)], 1)
    angle = 2 * np.pi * (factors[:, 0] + 0.25) / 6
    codes = np.stack([np.cos(angle), np.sin(angle), factors[:, 1], factors[:, 2]], 1) + 1e-3 * random.randn(400, 4)
    gaps = metrics.information_gap(codes, factors)["gaps"]
    assert gaps[0] < 0.15 and (gaps[1:] > 0.9).all()
    result = dci_from_codes(codes[:300], factors[:300], codes[300:], factors[300:])
    assert result["disentanglement"] > 0.97 > 0.9 > result["completeness"]
