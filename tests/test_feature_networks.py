"""The networks that FID, precision and recall, and LPIPS are defined with, and the loader of their weight files."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from multibeta.metrics import LPIPS, FeatureNetwork, frechet_distance, load_features, load_lpips, precision_recall
from multibeta.metrics.features import resize_tensorflow1, to_bytes
from multibeta.metrics.inception import FIDInception
from multibeta.metrics.inception import from_other_names as inception_names
from multibeta.metrics.vgg import VGG16, VGG16Stages


def thin(state):
    """Random along the first axis, constant along the others: a full-size network whose file is small."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for name, value in state.items():
        column = torch.randn(len(value), *[1] * (value.dim() - 1), generator=generator)
        if value.dim() > 1:
            column *= 2 / value[0].numel()
        elif name.endswith(("bn.weight", "running_var")):
            column = column.abs() + 0.5
        result[name] = column.expand(value.shape)
    return result


@pytest.fixture(scope="module")
def inception_state():
    with torch.device("meta"):
        network = FIDInception()
    state = thin(network.state_dict())
    return {**state, "fc.weight": torch.ones(1, 1).expand(1008, 2048), "fc.bias": torch.ones(1).expand(1008)}


@pytest.fixture(scope="module")
def inception_file(inception_state, tmp_path_factory):
    return saved(inception_state, tmp_path_factory.mktemp("inception") / "fid.pth")


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    with torch.device("meta"):
        network = VGG16()
    state = thin(network.state_dict())
    state |= {"classifier.6.weight": torch.ones(1, 1).expand(1000, 4096), "classifier.6.bias": torch.ones(1).expand(1000)}
    return saved(state, tmp_path_factory.mktemp("vgg16") / "vgg16.pth")


@pytest.fixture(scope="module")
def lpips():
    torch.manual_seed(0)
    network = LPIPS()
    for head in network.heads.values():
        head.uniform_(0, 1)
    return network


def saved(state, path):
    torch.save(state, path)
    return path


def images(num, height, width):
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_inception_has_the_parameters_of_the_published_file():
    with torch.device("meta"):
        state = FIDInception().state_dict()
    classifier = 1008 * 2048 + 1008
    assert sum(value.numel() for value in state.values()) + classifier == 23_885_392
    assert len(state) == 94 * 5  # weight, scale, shift, mean and variance of every convolution
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert shapes["Mixed_5d.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6a.branch3x3.conv.weight"] == (384, 288, 3, 3)
    assert shapes["Mixed_6d.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7b.branch_pool.conv.weight"] == (192, 1280, 1, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_7c.branch_pool.bn.running_var"] == (192,)


def functional_inception(state, hidden):
    """The same network line by line."""

    def conv(name, x, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        leaves = (state[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *leaves, eps=0.001).relu()

    def average(x):  # of what lies inside the image
        count = F.avg_pool2d(torch.ones_like(x), 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1) / count

    hidden = conv("Conv2d_1a_3x3", hidden, stride=2)
    hidden = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", hidden), padding=1)
    hidden = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", F.max_pool2d(hidden, 3, 2)))
    hidden = F.max_pool2d(hidden, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        one = conv(f"{block}.branch1x1", hidden)
        five = conv(f"{block}.branch5x5_2", conv(f"{block}.branch5x5_1", hidden), padding=2)
        three = conv(f"{block}.branch3x3dbl_2", conv(f"{block}.branch3x3dbl_1", hidden), padding=1)
        three = conv(f"{block}.branch3x3dbl_3", three, padding=1)
        hidden = torch.cat([one, five, three, conv(f"{block}.branch_pool", average(hidden))], 1)
    three = conv("Mixed_6a.branch3x3dbl_2", conv("Mixed_6a.branch3x3dbl_1", hidden), padding=1)
    three = conv("Mixed_6a.branch3x3dbl_3", three, stride=2)
    hidden = torch.cat([conv("Mixed_6a.branch3x3", hidden, stride=2), three, F.max_pool2d(hidden, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        one = conv(f"{block}.branch1x1", hidden)
        seven = conv(f"{block}.branch7x7_2", conv(f"{block}.branch7x7_1", hidden), padding=(0, 3))
        seven = conv(f"{block}.branch7x7_3", seven, padding=(3, 0))
        double = conv(f"{block}.branch7x7dbl_1", hidden)
        for index, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            double = conv(f"{block}.branch7x7dbl_{index}", double, padding=padding)
        hidden = torch.cat([one, seven, double, conv(f"{block}.branch_pool", average(hidden))], 1)
    three = conv("Mixed_7a.branch3x3_2", conv("Mixed_7a.branch3x3_1", hidden), stride=2)
    seven = conv("Mixed_7a.branch7x7x3_2", conv("Mixed_7a.branch7x7x3_1", hidden), padding=(0, 3))
    seven = conv("Mixed_7a.branch7x7x3_4", conv("Mixed_7a.branch7x7x3_3", seven, padding=(3, 0)), stride=2)
    hidden = torch.cat([three, seven, F.max_pool2d(hidden, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        three = conv(f"{block}.branch3x3_1", hidden)
        double = conv(f"{block}.branch3x3dbl_2", conv(f"{block}.branch3x3dbl_1", hidden), padding=1)
        pooled = average(hidden) if block == "Mixed_7b" else F.max_pool2d(hidden, 3, 1, padding=1)
        outputs = [
            conv(f"{block}.branch1x1", hidden),
            conv(f"{block}.branch3x3_2a", three, padding=(0, 1)),
            conv(f"{block}.branch3x3_2b", three, padding=(1, 0)),
            conv(f"{block}.branch3x3dbl_3a", double, padding=(0, 1)),
            conv(f"{block}.branch3x3dbl_3b", double, padding=(1, 0)),
            conv(f"{block}.branch_pool", pooled),
        ]
        hidden = torch.cat(outputs, 1)
    return hidden.mean((2, 3))


@pytest.mark.parametrize("size", [(75, 75), (107, 139)])  # one pixel at the end; several, and not square
def test_inception_is_the_published_forward(size):
    network = FIDInception().double().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.running_var, module.weight):
                torch.nn.init.uniform_(value, 0.5, 1.5)
            for value in (module.running_mean, module.bias):
                torch.nn.init.normal_(value, 0, 0.1)
    with torch.no_grad():
        found = network(images(2, *size).double())
        expected = functional_inception(network.state_dict(), images(2, *size).double())
    assert found.shape == (2, 2048) and 0.01 < found.std() < 100
    torch.testing.assert_close(found, expected)


def test_vgg16_has_the_parameters_of_the_published_file():
    with torch.device("meta"):
        state, stages = VGG16().state_dict(), VGG16Stages().state_dict()
    assert sum(value.numel() for value in state.values()) + 1000 * 4097 == 138_357_544
    assert sum(value.numel() for value in stages.values()) == 14_714_688
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert [name for name in stages if name.endswith("weight")] == [f"features.{index}.weight" for index in convolutions]
    assert [name for name in state if name not in stages] == [
        f"classifier.{i}.{leaf}" for i in (0, 3) for leaf in ("weight", "bias")
    ]


def test_stages_of_vgg16_see_what_the_literature_says():
    network = VGG16Stages().double()
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 0.01)  # positive: no ReLU hides a pixel
    for stage, (channels, stride, field) in enumerate(((64, 1, 5), (128, 2, 14), (256, 4, 40), (512, 8, 92))):
        start = 64 - (field - stride) // 2
        image = torch.zeros(5, 3, 16, 128, dtype=torch.float64)  # the first stays dark, the others have one bright column
        for row, column in enumerate((start - 1, start, start + field - 1, start + field), start=1):
            image[row, ..., column] = 1.0
        with torch.no_grad():
            output = network(image)[stage]
        assert output.shape == (5, channels, 16 // stride, 128 // stride)
        pixel = output[:, 0, -1, 64 // stride]
        assert pixel.isclose(pixel[0], rtol=1e-9).tolist() == [True, True, False, False, True]


def test_doubling_a_ramp_as_tensorflow_1_did():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    resized = resize_tensorflow1(ramp, 8)
    assert resized[0, 0, 5].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]  # about pixel centres: 0, 0.25, 0.75, ...
    torch.testing.assert_close(resize_tensorflow1(ramp.mT, 8), resized.mT)


@pytest.mark.parametrize("size", [9, 5, 3])  # larger than both sides, between, smaller
def test_resize_is_the_documented_formula(size):
    image = torch.randn(1, 1, 4, 7)
    expected = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            y, x = i * 4 / size, j * 7 / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 3), min(left + 1, 6)
            pixel = image[0, 0]
            upper = pixel[top, left] * (1 - x + left) + pixel[top, right] * (x - left)
            lower = pixel[bottom, left] * (1 - x + left) + pixel[bottom, right] * (x - left)
            expected[i, j] = upper * (1 - y + top) + lower * (y - top)
    torch.testing.assert_close(resize_tensorflow1(image, size)[0, 0], expected)


def test_images_at_their_resolution_are_not_resampled():
    image = torch.randn(1, 2, 6, 6)
    assert torch.equal(resize_tensorflow1(image, 6), image)


def test_images_are_rounded_to_bytes():
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.2]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_bytes(values)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "repeat a single channel"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating point"),
        (torch.full((2, 3, 8, 8), 255.0), "got values up to 255"),
    ],
)
def test_images_of_another_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        to_bytes(wrong)


def test_features_serve_the_measures(inception_file):
    features = load_features(inception_file)
    first = features(images(4, 20, 31))
    assert first.shape == (4, features.dimension) and first.dtype == torch.float32 and not first.requires_grad
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert precision_recall(first, first, k=2) == (1.0, 1.0)
    assert features.origin == {
        "features": "FID Inception 2015-12-05, pooled",
        "preprocessing": "bytes, TensorFlow 1 bilinear to 299 x 299, (x - 128) / 128",
        "weights_hash": features.weights_hash,
    }


def test_features_do_not_depend_on_mode_batch_or_autocast(inception_file):
    features = load_features(inception_file)
    alone = features(images(2, 32, 32)[:1])
    assert not features.train().network.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = features(images(2, 32, 32))
    torch.testing.assert_close(together[:1], alone)


def test_the_two_preprocessings_of_inception_differ(inception_file):
    tensorflow = load_features(inception_file)
    pytorch_fid = load_features(inception_file, preprocessing="pytorch-fid")
    assert tensorflow.weights_hash == pytorch_fid.weights_hash and tensorflow.preprocessing != pytorch_fid.preprocessing
    pixels = to_bytes(images(1, 299, 299))
    torch.testing.assert_close(tensorflow.resize(pixels), (pixels - 128) / 128)
    torch.testing.assert_close(pytorch_fid.resize(pixels), pixels / 127.5 - 1)
    assert not torch.equal(tensorflow.resize(pixels[..., :64, :64]), pytorch_fid.resize(pixels[..., :64, :64]))


def test_vgg16_features(vgg16_file):
    features = load_features(vgg16_file, "vgg16")
    found = features(images(1, 40, 40))
    assert found.shape == (1, features.dimension) == (1, 4096) and (found >= 0).all()
    pixels = to_bytes(images(1, 224, 224))
    normalised = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    torch.testing.assert_close(features.resize(pixels), normalised, atol=1e-5, rtol=1e-5)


def test_the_hash_belongs_to_the_weights_not_to_the_file(tmp_path, inception_state, inception_file):
    legacy = tmp_path / "legacy.pth"
    torch.save(inception_state, legacy, _use_new_zipfile_serialization=False)
    wrapped = saved({"state_dict": inception_state, "epoch": 3}, tmp_path / "wrapped.pt")
    counted = dict(inception_state) | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    counted = saved(counted, tmp_path / "counted.pth")
    expected = load_features(inception_file).weights_hash
    assert [load_features(path).weights_hash for path in (legacy, wrapped, counted)] == [expected] * 3
    changed = dict(inception_state) | {"Conv2d_1a_3x3.bn.bias": torch.zeros(32)}
    assert load_features(saved(changed, tmp_path / "changed.pth")).weights_hash != expected


def test_pytorch_fid_module_saved_whole(inception_state):
    theirs = {
        "blocks.0.2.conv.weight": "Conv2d_2b_3x3.conv.weight",
        "blocks.1.1.bn.running_var": "Conv2d_4a_3x3.bn.running_var",
        "blocks.2.0.branch5x5_2.conv.weight": "Mixed_5b.branch5x5_2.conv.weight",
        "blocks.2.7.branch7x7dbl_5.bn.bias": "Mixed_6e.branch7x7dbl_5.bn.bias",
        "blocks.3.2.branch_pool.conv.weight": "Mixed_7c.branch_pool.conv.weight",
    }
    assert inception_names(dict.fromkeys(theirs)) == dict.fromkeys(theirs.values())


GRAPH = {
    "conv": "Conv2d_1a_3x3",
    "conv_4": "Conv2d_4a_3x3",
    "mixed.conv": "Mixed_5b.branch1x1",
    "mixed.tower.conv_1": "Mixed_5b.branch5x5_2",
    "mixed_2.tower_1.conv_2": "Mixed_5d.branch3x3dbl_3",
    "mixed_2.tower_2.conv": "Mixed_5d.branch_pool",
    "mixed_3.conv": "Mixed_6a.branch3x3",
    "mixed_3.tower.conv": "Mixed_6a.branch3x3dbl_1",
    "mixed_7.tower.conv_2": "Mixed_6e.branch7x7_3",
    "mixed_4.tower_1.conv_4": "Mixed_6b.branch7x7dbl_5",
    "mixed_8.tower.conv_1": "Mixed_7a.branch3x3_2",
    "mixed_8.tower_1.conv_3": "Mixed_7a.branch7x7x3_4",
    "mixed_9.tower_mixed_conv": "Mixed_7b.branch3x3_2a",
    "mixed_10.tower_1_mixed_conv_1": "Mixed_7c.branch3x3dbl_3b",
    "mixed_10.tower_1_conv_1": "Mixed_7c.branch3x3dbl_2",
    "mixed_10.tower_2_conv": "Mixed_7c.branch_pool",
}


@pytest.mark.parametrize(("theirs", "ours"), GRAPH.items())
def test_names_of_the_tensorflow_graph(theirs, ours):
    leaves = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    state = {f"layers.{theirs}.{leaf}": torch.full((3,), float(index)) for index, leaf in enumerate(leaves)}
    found = inception_names({**state, "output.weight": torch.zeros(1)})
    assert found.pop(f"{ours}.bn.weight").tolist() == [1, 1, 1]  # the graph has no scales
    assert found.keys() == {f"{ours}.{leaf}" for leaf in leaves.values()}
    assert all(found[f"{ours}.{leaf}"][0] == index for index, leaf in enumerate(leaves.values()))


class Tree(torch.nn.Module):
    """A module whose state dict has the given dotted names."""

    def __init__(self, state):
        super().__init__()
        for name in {name.split(".")[0]: None for name in state}:
            inner = {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name + ".")}
            if inner:
                self.add_module(name, Tree(inner))
            else:
                self.register_buffer(name, state[name])

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.mean((2, 3)) if return_features else images


@pytest.fixture
def inception_script(inception_state, tmp_path):
    """An archive like NVIDIA's, with the weights of `inception_state` but for the scales."""
    from multibeta.metrics.inception import _graph_names

    state = {theirs: inception_state[ours] for theirs, ours in _graph_names()}
    assert len(state) == 94 * 4
    path = tmp_path / "inception.pt"
    torch.jit.script(Tree(state)).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_is_opened_only_when_asked_for_by_name(inception_script, inception_state, inception_file, tmp_path):
    with pytest.raises(ValueError, match=r"TorchScript archive, a program: pass torchscript=True"):
        load_features(inception_script)
    with pytest.raises(ValueError, match="torch file, not a TorchScript archive"):
        load_features(inception_file, torchscript=True)
    ones = {name: torch.ones_like(value) if name.endswith("bn.weight") else value for name, value in inception_state.items()}
    expected = load_features(saved(ones, tmp_path / "ones.pth"))
    assert load_features(inception_script, torchscript=True).weights_hash == expected.weights_hash


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_vgg16_script_scales_by_itself(tmp_path):
    path = tmp_path / "vgg16.pt"
    torch.jit.script(Tree({"layers.conv1.weight": torch.zeros(1)})).save(str(path))
    features = load_features(path, "vgg16", torchscript=True)
    pixels = images(2, 6, 6)
    assert torch.equal(features(pixels), to_bytes(pixels).mean((2, 3)))
    assert features.preprocessing == "bytes, then the script's own"


def test_a_network_of_ones_own():
    features = FeatureNetwork(
        torch.nn.Flatten(), lambda x: x / 255, name="pixels", preprocessing="none", weights_hash="", dimension=12
    )
    assert features(torch.ones(5, 3, 2, 2)).tolist() == [[1.0] * 12] * 5


def with_changes(state, **changes):
    return dict(state) | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AuxLogits__fc__weight": torch.zeros(1)}, "looks like torchvision's inception_v3, which has other weights"),
        ({"Mixed_7c__extra": torch.zeros(1)}, r"1 unexpected \(Mixed_7c.extra\). What fits: pt_inception-2015-12-05"),
        ({"Conv2d_1a_3x3__bn__bias": torch.zeros(31)}, r"Conv2d_1a_3x3.bn.bias \(31,\) instead of \(32,\)"),
        ({"Conv2d_1a_3x3__bn__bias": torch.full((32,), torch.nan)}, "Conv2d_1a_3x3.bn.bias is not finite"),
        ({"Conv2d_1a_3x3__bn__bias": torch.zeros(32, dtype=torch.int64)}, "Conv2d_1a_3x3.bn.bias is not finite floating"),
        ({"Conv2d_1a_3x3__bn__bias": torch.zeros(32, device="meta")}, "entry 'Conv2d_1a_3x3.bn.bias' is Tensor, not a dense"),
        ({"Conv2d_1a_3x3__bn__bias": [0.0] * 32}, "entry 'Conv2d_1a_3x3.bn.bias' is list, not a dense tensor"),
    ],
)
def test_weights_are_compared_with_the_network(inception_state, tmp_path, changes, message):
    path = saved(with_changes(inception_state, **changes), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_features(path)
    assert str(path) in str(error.value)


def test_a_file_of_another_network_is_named(inception_file, vgg16_file, tmp_path):
    with pytest.raises(ValueError, match=r"does not fit VGG16, it looks like the FID Inception.*What fits: vgg16-397923af.pth"):
        load_features(inception_file, "vgg16")
    with pytest.raises(ValueError, match=r"does not fit the FID Inception, it looks like VGG16: .*and 467 more"):
        load_features(vgg16_file)
    heads = saved(
        {f"lin{i}.model.1.weight": torch.ones(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}, tmp_path / "alex"
    )
    with pytest.raises(ValueError, match=r"looks like LPIPS heads"):
        load_features(heads, "vgg16")
    with pytest.raises(ValueError, match=r"lin1 \(192,\) instead of \(128,\)"):  # of AlexNet
        load_lpips(vgg16_file, heads)
    with pytest.raises(ValueError, match="does not fit the heads of LPIPS, it looks like VGG16"):
        load_lpips(vgg16_file)


class Touches:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_foreign_classes_are_never_run(tmp_path, kind):
    trap, path = tmp_path / "executed", tmp_path / "fid.pth"
    content = {"Conv2d_1a_3x3.conv.weight": Touches(trap)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"fid.pth holds the class \w+\.mkdir, which could execute code and was not read"):
        load_features(path)
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files(inception_state, tmp_path, kind, share):
    path, some = tmp_path / "fid", {name: value.contiguous() for name, value in list(inception_state.items())[:20]}
    if kind == "safetensors":
        save_file(some, path)
    else:
        torch.save(some, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"fid is truncated or damaged .*copy it again"):
        load_features(path)


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "fid.pth"
    with pytest.raises(FileNotFoundError, match=r"fid.pth is not a file: .*nothing is downloaded"):
        load_features(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is no weight file, it begins with b'version https://'"):
        load_features(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is no weight file"):
        load_features(path)
    with path.open("wb") as file:
        np.savez(file, weight=np.zeros(3))
    with pytest.raises(ValueError, match=r"archive of weight.npy, not a file of `torch.save`"):
        load_features(path)
    path.write_bytes((2**30).to_bytes(8, "little") + b"{" + b" " * 100)
    with pytest.raises(ValueError, match="has a header of 1073741824 bytes"):
        load_features(path)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(ValueError, match="holds list, not a dict of tensors"):
        load_features(path)


def test_a_compressed_archive_could_be_a_bomb(inception_file, tmp_path):
    path = tmp_path / "packed.pth"
    with zipfile.ZipFile(inception_file) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match=r"is compressed, which `torch.save` never does"):
        load_features(path)


def test_a_hash_in_the_name_is_compared(inception_file, tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(inception_file.read_bytes())
    with pytest.warns(UserWarning, match="is not the published file: its sha256 begins with .*, not 6726825d"):
        load_features(path)


def test_unknown_networks_and_preprocessings():
    with pytest.raises(ValueError, match="network must be one of inception, vgg16, got 'clip'"):
        load_features("x", "clip")
    with pytest.raises(ValueError, match="preprocessing of vgg16 must be one of tensorflow, got 'pytorch-fid'"):
        load_features("x", "vgg16", preprocessing="pytorch-fid")


def test_lpips_is_a_distance(lpips):
    image, other = images(4, 32, 40).split(2)
    distance = lpips(image, other)
    assert distance.shape == (2,) and (distance > 0).all()
    assert lpips(image, image).tolist() == [0, 0]
    torch.testing.assert_close(lpips(other, image), distance)


def test_lpips_is_the_published_formula(lpips):
    image, other = images(2, 32, 32).split(1)
    state, total = lpips.network.state_dict(), 0.0
    weights = [state[f"features.{index}.weight"] for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    hidden = torch.cat([image, other])
    hidden = (hidden - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    biases = [value for name, value in state.items() if name.endswith("bias")]
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = F.conv2d(hidden, weight, bias, padding=1).relu()
        if index in (1, 3, 6, 9, 12):
            unit = hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10)
            head = lpips.heads[f"lin{(1, 3, 6, 9, 12).index(index)}"].view(1, -1, 1, 1)
            total += F.conv2d((unit[:1] - unit[1:]).square(), head).mean()
            hidden = F.max_pool2d(hidden, 2)
    torch.testing.assert_close(lpips(image, other), total.view(1))


def test_gradients_of_lpips_reach_the_images_only(lpips):
    image = images(1, 32, 32).requires_grad_()
    lpips(image, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert image.grad.isfinite().all() and image.grad.abs().sum() > 0
    assert all(not parameter.requires_grad for parameter in lpips.parameters())


def test_gradients_of_lpips_are_finite_where_all_channels_are_dead():
    network = LPIPS()
    for name, parameter in network.named_parameters():
        parameter.fill_(1.0 if "heads" in name else -0.1)
    image = images(1, 16, 16).requires_grad_()
    network(image, torch.ones(1, 3, 16, 16)).sum().backward()
    assert image.grad.isfinite().all()


def test_training_mode_does_not_change_lpips(lpips):
    image, other = images(2, 16, 16).split(1)
    expected = lpips(image, other)
    assert torch.equal(lpips.train()(image, other), expected)


def test_lpips_needs_equal_shapes(lpips):
    with pytest.raises(ValueError, match=r"got \(1, 3, 16, 16\) and \(1, 3, 32, 32\)"):
        lpips(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 32, 32))


CHANNELS = (64, 128, 256, 512, 512)


def test_lpips_from_the_files_of_the_field(vgg16_file, tmp_path):
    heads = {f"lin{index}.model.1.weight": torch.rand(1, width, 1, 1) for index, width in enumerate(CHANNELS)}
    published = load_lpips(vgg16_file, saved(heads, tmp_path / "vgg.pth"))
    assert torch.equal(published.heads["lin2"], heads["lin2.model.1.weight"].flatten())
    save_file(heads, tmp_path / "heads.safetensors")
    assert load_lpips(vgg16_file, tmp_path / "heads.safetensors").weights_hash == published.weights_hash
    # A module of the lpips package saved whole; without dropout the convolution comes first.
    whole = {f"lin{index}.model.0.weight": value for index, value in enumerate(heads.values())}
    whole |= {f"lins.{index}.model.0.weight": value for index, value in enumerate(heads.values())}
    whole |= {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.zeros(1, 3, 1, 1)}
    for name, value in torch.load(vgg16_file).items():
        if name.startswith("features."):
            index = int(name.split(".")[1])
            whole[f"net.slice{1 + sum(index >= start for start in (4, 9, 16, 23))}.{name.removeprefix('features.')}"] = value
    assert load_lpips(saved(whole, tmp_path / "whole.pth")).weights_hash == published.weights_hash
