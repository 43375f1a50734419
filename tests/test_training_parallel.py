"""Several processes train what one would: whole in each of them or in shards, resumed by another number of them."""

import copy
import dataclasses
import errno
import functools
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from processes import free_port, in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from multibeta import baselines, checkpoints, data, distribution, training
from multibeta.adversarial import AdversarialOptions, against_discriminator
from multibeta.networks.autoencoder import TOY
from multibeta.recipes.recipe import build
from multibeta.training import TrainingOptions, parallel, shards
from tiny_recipes import tiny, tiny_diffusion_vae, tiny_latent_diffusion

SCENES = data.Subset(data.Scenes(16), range(40))
OPTIONS = TrainingOptions(  # 7 images are 4 and 3
    steps=50,
    batch_size=7,
    precision="fp32",
    warmup_steps=5,
    validate_every=25,
    checkpoint_every=25,
    log_every=10,
    ema_decay=0.9,
    posthoc_ema=(0.1,),
    snapshot_every=5,
)
BASELINE = {"resolution": 16, "channel_multipliers": (1,), "base_channels": 8, "num_groups": 4, "latent_channels": 4}
OBJECTIVES = ("multibeta/1", "multibeta/2", "latent/2", "refiner/1", "refiner/2", "baseline/vae", "baseline/tcvae")
AGAINST = "multibeta/adversarial"  # whose opponent sees its module whole
WAYS = ("ddp", "fsdp")
TRAININGS = [*itertools.product(OBJECTIVES, WAYS), (AGAINST, "ddp")]
# Adam makes whole steps of gradients that are rounding alone, as those of a bias before a normalisation; not with this epsilon.
DULL = functools.partial(torch.optim.AdamW, eps=1e-3)
SMOOTH = torch.nn.SiLU  # in a discriminator: where rounding moves an activation across the kink of LeakyReLU gradients jump


def objective_of(name):
    """A small objective of each stage of each system."""
    system, stage = name.split("/")
    if system == "baseline":
        vae = baselines.VAE(dataclasses.replace(TOY, **BASELINE))
        return baselines.BetaVAEObjective(vae) if stage == "vae" else baselines.BetaTCVAEObjective(vae, len(SCENES))
    recipe = {"multibeta": tiny, "latent": tiny_latent_diffusion, "refiner": tiny_diffusion_vae}[system]()
    vae, diffusion = build(recipe)
    if stage == "adversarial":
        options = AdversarialOptions(discriminator_channels=4, discriminator_layers=1, penalty=10.0)
        with mock.patch("torch.nn.LeakyReLU", lambda slope: SMOOTH()):
            return against_discriminator(recipe.first_objective(vae), vae, options, 0)
    if stage == "1":
        return recipe.first_objective(vae)
    vae.eval().requires_grad_(False)
    return recipe.second_objective(vae, diffusion)


def trained(name, folder, parallel="ddp", on_validate=None):
    """The averaged weights of a training in `folder`, which goes on where it was begun."""
    torch.manual_seed(0)
    options = {"validation": SCENES, "progress": False, "resume": checkpoints.exists(folder / "checkpoint"), "parallel": parallel}
    with mock.patch("torch.optim.AdamW", DULL):
        return training.train(objective_of(name), SCENES, OPTIONS, folder, on_validate=on_validate, **options)


def logged(folder):
    """Every number of the log but those of time, and that which is a quantile of each piece."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    other = ("second", "low")
    return [{name: value for name, value in line.items() if not any(each in name for each in other)} for line in lines]


class Stopped(Exception):
    """A training that was stopped half-way."""


def stop(step, module):
    if step == OPTIONS.steps // 2:
        raise Stopped


def half(name, folder, way="ddp"):
    """Stop a training half-way, after its checkpoint."""
    with pytest.raises(Stopped):
        trained(name, folder, way, on_validate=stop)


def train_all(folder):
    for way in WAYS:
        half("multibeta/1", folder / f"half-{way}", way)
    return {(name, way): trained(name, folder / name / way, way) for name, way in TRAININGS}


def resume_all(folder):
    return {
        **{(way, way): trained("multibeta/1", folder / f"half-{way}", way) for way in WAYS},
        **{("one", way): trained("multibeta/1", folder / f"one-{way}", way) for way in WAYS},
        ("ddp", "fsdp"): trained("multibeta/1", folder / "ddp-fsdp", "fsdp"),
        ("fsdp", "ddp"): trained("multibeta/1", folder / "fsdp-ddp", "ddp"),
    }


def apart(state, other):
    """Distance of two states relative to their norm, all tensors as one vector."""
    both = [torch.cat([value.flatten().double() for value in each.values()]) for each in (state, other)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def test_two_processes_learn_what_one_does_and_go_on_from_each_other(tmp_path):
    first, second = in_processes(2, train_all, tmp_path, folder=tmp_path)
    ones = {name: trained(name, tmp_path / name / "one") for name in (*OBJECTIVES, AGAINST)}
    for (name, way), state in first.items():
        assert apart(state, ones[name]) < 1e-6, (name, way)
        assert all(torch.equal(value, second[name, way][key]) for key, value in state.items())
        averages = [training.reconstruct_ema(tmp_path / name / each, 0.15) for each in (way, "one")]
        assert apart(*averages) < 1e-6, (name, way)
        for here, there in zip(logged(tmp_path / name / "one"), logged(tmp_path / name / way), strict=True):
            assert here == pytest.approx(there, rel=2e-3, abs=1e-4)

    half("multibeta/1", tmp_path / "one")
    for place in ("one-ddp", "one-fsdp"):
        shutil.copytree(tmp_path / "one", tmp_path / place)
    for way, place in (("ddp", "ddp-fsdp"), ("fsdp", "fsdp-ddp"), ("ddp", "ddp-one"), ("fsdp", "fsdp-one")):
        shutil.copytree(tmp_path / f"half-{way}", tmp_path / place)
    assert checkpoints.load_config(tmp_path / "fsdp-one" / "checkpoint")["sharded"] == 2
    resumed = {(way, "one"): trained("multibeta/1", tmp_path / f"{way}-one") for way in WAYS}
    resumed |= in_processes(2, resume_all, tmp_path, folder=tmp_path)[0]
    whole = training.reconstruct_ema(tmp_path / "multibeta/1" / "one", 0.1)
    for (before, after), state in resumed.items():
        assert apart(state, ones["multibeta/1"]) < 1e-4, (before, after)
        place = f"half-{before}" if before == after else f"{before}-{after}"
        assert apart(training.reconstruct_ema(tmp_path / place, 0.1), whole) < 1e-4, (before, after)
        if before == after:  # nothing was lost or rounded
            assert all(torch.equal(value, first["multibeta/1", after][key]) for key, value in state.items())


def train_in_halves(folder):
    """By parts that the two processes of a machine share, and that both machines have."""
    mesh = []
    with mock.patch.object(
        parallel, "init_device_mesh", lambda *args, **names: mesh.append(init_device_mesh(*args, **names)) or mesh[0]
    ):
        state = trained("multibeta/2", folder / "hsdp", "hsdp")
    return state, mesh[0].mesh.tolist(), trained("multibeta/2", folder / "ddp")


def test_four_processes_on_two_machines_learn_what_one_does(tmp_path):
    first, *others = in_processes(4, train_in_halves, tmp_path, folder=tmp_path, machines=2)
    alone = trained("multibeta/2", tmp_path / "one")
    state, mesh, replicated = first
    assert mesh == [[0, 1], [2, 3]]  # machines by their processes
    assert apart(state, alone) < 1e-4 and apart(replicated, alone) < 1e-4
    assert all(torch.equal(value, other[0][name]) for other in others for name, value in state.items())
    resumed = trained("multibeta/2", tmp_path / "hsdp")  # by one process, with nothing left to do
    assert all(torch.equal(value, resumed[name]) for name, value in state.items())


def raised(work):
    """The words of what `work` raises."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def other(objective, rank):
    """The objective with weights of its own in each process."""
    for parameter in objective.module.parameters():
        parameter.data.add_(rank)
    return objective


def refused(folder):
    """What two processes are told who cannot train together."""
    rank = distribution.world().rank
    vae = objective_of("multibeta/1")
    contest = copy.copy(vae)
    contest.opponent = objective_of("baseline/vae")

    def train(objective=vae, parallel="ddp", dataset=SCENES, **changes):
        training.train(objective, dataset, dataclasses.replace(OPTIONS, **changes), folder / "run", parallel=parallel)

    return {
        "seed": raised(lambda: train(seed=rank)),
        "images": raised(lambda: train(dataset=data.Subset(data.Scenes(16), range(40 + rank)))),
        "batch": raised(lambda: train(batch_size=1)),
        "way": raised(lambda: train(parallel="zero")),
        "ways": raised(lambda: train(parallel=WAYS[rank])),
        "weights": raised(lambda: train(other(vae, rank), "fsdp")),
        "parts": raised(lambda: train(dataset=data.Subset(data.Scenes(16), range(rank, 40 + rank)))),
        "opponent": raised(lambda: train(contest, "fsdp")),
        "folder": raised(
            lambda: training.train(objective_of("multibeta/1"), SCENES, OPTIONS, folder / ("one", "other")[rank], resume=True)
        ),
    }


def written(folder):
    """What a writer that does not wait leaves of parts of weights, and what it does where it cannot write."""
    mesh = init_device_mesh("cpu", (2,))
    parts = {"weight": distribute_tensor(torch.arange(10.0).view(5, 2), mesh, [Shard(0)]), "step": torch.tensor(3.0)}
    writer = shards.Writer(overlaps=True)
    writer.write(folder / "parts", {"module": parts}, {"step": 1})
    parts["weight"].add_(1)  # it was copied
    writer.wait()
    like = {"module": {"weight": torch.empty_like(parts["weight"])}}
    weights, config = shards.load(folder / "parts", like)
    before = weights["module"]["weight"].full_tensor(), weights["module"]["step"], config
    failed = None
    with mock.patch.object(shards.HuggingFaceStorageWriter, "write_data", side_effect=OSError("the disk is full")):
        failed = raised(lambda: (writer.write(folder / "parts", {"module": parts}, {"step": 2}), writer.wait()))
    with mock.patch.object(checkpoints, "flush", spoil if distribution.world().rank else checkpoints.flush):
        spoilt = raised(lambda: (writer.write(folder / "parts", {"module": parts}, {"step": 3}), writer.wait()))
    full = mock.patch.object(shards.HuggingFaceStorageWriter, "write_data", side_effect=OSError(errno.ENOSPC, "no space left"))
    number = None
    with full:
        try:
            writer.write(folder / "parts", {"module": parts}, {"step": 4})
            writer.wait()
        except OSError as error:
            number = error.errno
    writer.close()
    return *before, failed, spoilt, number, shards.load(folder / "parts", like)[1]["step"]


def spoil(path):
    """A disk that keeps another byte than it was given."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")


def both(folder):
    return refused(folder), written(folder)


def test_two_processes_that_cannot_train_together_are_told(tmp_path):
    half("multibeta/1", tmp_path / "one")
    (told, (weight, step, config, failed, spoilt, number, left)), (second, (*_, other_number, _)) = in_processes(
        2, both, tmp_path, folder=tmp_path
    )
    assert told | {"folder": None} == second | {"folder": None}
    assert told["seed"] == "ValueError: process 1 of 2 trains something else: options.seed is 1, in process 0 0"
    assert "dataset_size is 41, in process 0 40" in told["images"]
    assert told["ways"] == "ValueError: process 1 of 2 trains something else: parallel is 'fsdp', in process 0 'ddp'"
    assert "the weights that training begins with must be the same in all processes" in told["weights"]
    assert "process 1 of 2 trains something else: chosen is" in told["parts"]
    assert "2 processes need a batch_size of as many images, got 1" in told["batch"]
    assert "parallel must be one of ddp, fsdp, hsdp, got 'zero'" in told["way"]
    assert 'training against an opponent takes parallel="ddp", got "fsdp"' in told["opponent"]
    assert "a folder that all of them see, must be the same in all processes" in told["folder"]
    assert not (tmp_path / "run").exists()

    assert torch.equal(weight, torch.arange(10.0).view(5, 2)) and step == 3
    assert config["step"] == 1 and config["sharded"] == 2
    assert "OSError" in failed and "process 1: the disk is full" in failed
    assert "process 1: " in spoilt and "reads back otherwise than it was written: the disk may be failing" in spoilt
    assert left == 1 and number == other_number == errno.ENOSPC
    (tmp_path / "parts" / (part := "shard-00002-model-00001-of-00001.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"parts lacks {part}: copy the whole folder again"):
        shards.load(tmp_path / "parts", {})


def test_a_signal_to_torchrun_saves_and_the_run_goes_on(tmp_path):
    flags = ("--recipe", "scenes32-small", "--data.num-train", "64", "--data.num-test", "8", "--out", str(tmp_path / "run"))
    sizes = ("--vae-training.batch-size", "4", "--vae-training.log-every", "1", "--vae-training.steps", "100000")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(free_port())]
    log = tmp_path / "run" / "vae" / "metrics.jsonl"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*command, "-m", "multibeta", "train", *flags, *sizes], cwd=tmp_path, stderr=said)
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait()
    words = (tmp_path / "said").read_text()
    assert "of 100000, saved in" in words and words.count("saved in") == 1
    steps = checkpoints.load_config(tmp_path / "run" / "vae" / "checkpoint")["step"]
    assert 3 <= steps < 1000
