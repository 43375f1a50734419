"""Commands around models: the machine, benchmarks, other people's weights."""

import pytest
import torch

import multibeta
from multibeta import interop

pytest.importorskip("tyro")
from multibeta.cli import main

SIDE = 16


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def baseline_folder(baseline, tmp_path):
    baseline.save_pretrained(tmp_path / "baseline")
    return str(tmp_path / "baseline")


def test_bench_runs_a_script_of_the_checkout_with_its_flags(capfd):
    assert main(["bench", "op_speed", "--help"]) == 0
    assert "--repetitions" in capfd.readouterr().out
    assert main(["bench", "op_speed", "--device", "tpu"]) == 2
    assert main(["bench", "speed"]) == 2
    assert "no benchmark called 'speed'; there are acceleration, aot" in capfd.readouterr().err


def test_env_shows_every_fast_path_on_or_off_with_the_reason(capsys):
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split()[:3] == ["multibeta", f"{multibeta.__version__},", "in"]
    for part in ("torch ", "processor ", "attention: sdpa ", "captured sampling (CUDA graph)"):
        assert part in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("attention: ")]
    assert rows and all(state in ("on", "off") for _, _, state, *_ in rows)


def test_accelerate_shows_each_block_of_a_diffusers_model(tmp_path, capsys, error_of):
    diffusers = pytest.importorskip("diffusers")
    config = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    diffusers.AutoencoderKL(**config).save_pretrained(tmp_path)
    assert main(["accelerate", str(tmp_path), "--size", "8", "--repetitions", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("encoder.mid_block.resnets.0 ResnetBlock2D: ") for line in lines)
    assert " blocks: " in lines[-1]
    assert "holds no config.json of a diffusers model" in error_of("accelerate", tmp_path / "none")


def test_convert_writes_a_model_for_diffusers_and_reads_it_again(model, model_folder, tmp_path, capsys, error_of):
    assert main(["convert", model_folder, "--to", "diffusers", "--out", str(tmp_path / "theirs"), "--beta", "0.25"]) == 0
    assert main(["convert", str(tmp_path / "theirs"), "--to", "multibeta", "--out", str(tmp_path / "ours"), "--mean-only"]) == 0
    shown = capsys.readouterr().out
    assert "encoder: " in shown and f"{tmp_path / 'ours'}: unet, encoder, decoder" in shown
    networks, vae = interop.load_networks(tmp_path / "ours"), model.vae
    images = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    torch.testing.assert_close(networks["encoder"](images, torch.tensor([0.9])), vae.encode(images, 0.25), rtol=1e-4, atol=1e-5)

    whole_run = ["convert", str(tmp_path), "--to", "diffusers", "--out", str(tmp_path / "of-run"), "--beta", "0.25"]
    assert main(whole_run) == 0  # the folder of a run: its model is in the subfolder model
    assert "encoder: " in capsys.readouterr().out

    arguments = ["convert", str(tmp_path / "theirs"), "--to", "multibeta", "--out", str(tmp_path / "unet"), "--parts", "unet"]
    assert main([*arguments, "--verbose"]) == 0
    assert "unet: " in (shown := capsys.readouterr().out) and "encoder" not in shown
    assert "time_embedding.linear_1.weight" in shown

    ignored = {
        "ema can be given for": ["--ema"],
        "num_heads can be given": ["--num-heads", "2"],
        "--beta freezes": ["--beta", "0"],
    }
    for message, flags in ignored.items():
        assert message in error_of(*arguments, *flags)


def test_convert_refuses_what_has_no_counterpart(model_folder, baseline_folder, tmp_path, error_of):
    def error(*arguments):
        return error_of("convert", *arguments)

    out = tmp_path / "out"
    assert "for every beta" in error(model_folder, "--to", "diffusers", "--out", out)
    assert "num_groups 4, theirs is 32" in error(model_folder, "--to", "ldm", "--out", tmp_path / "out.safetensors", "--beta", 0)
    assert "written to a .safetensors file" in error(model_folder, "--to", "ldm", "--out", out, "--beta", 0)
    assert "multibeta's own" in error(model_folder, "--to", "multibeta", "--out", out, "--beta", 0)
    assert "BaselineVAE has no unet or vae" in error(baseline_folder, "--to", "diffusers", "--out", out)
    assert "is not a file" in error(tmp_path / "nowhere.safetensors", "--to", "multibeta", "--out", out)
    assert not out.exists()
