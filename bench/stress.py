"""What costs users most when it goes wrong, for minutes: concurrent use, changed weights, shared folders, kills.

    python bench/stress.py --seconds 120 --kills 100

Threads draw images from one model, and each must be what the model draws alone. Weights change in every way that torch has, and
the next images must be those of a fresh copy. Processes of several threads open folders, unpack arrays and save checkpoints in
same places while some of them are killed, and whatever is read must be whole and right. Last, single processes that train, save,
index and unpack are killed at random moments until there were --kills of them: each start goes on where the last one ended, and
the final weights are those of a training that nobody killed, bit for bit. So are those of two processes that train together, with
whole weights or parts of them, of which both or one are killed. One JSON line is appended to stress.jsonl.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import multibeta
from common import measure
from multibeta import caches, checkpoints, data, distribution, recipes, training
from multibeta.data import arrays

NUM_IMAGES, SIDE = 300, 48  # of the folder that is indexed
SAVES, VALUES = 30, 100_000  # checkpoints of one saver, and weights in each
ARRAY = (4000, 64, 3)  # that is unpacked
KILLS_A_RUN = 4
JOIN_SECONDS = 30.0  # that one process waits for the other when they begin
ALONE_SECONDS = 120.0  # until a process has noticed that the other was killed
TRIALS = ("concurrent use", "changed weights", "shared folders", "kills", "kills together")


class Wrong(AssertionError):
    """Something was read, drawn or learned that is not right."""


def require(right: bool, what: str) -> None:
    """Raise `Wrong` unless `right`."""
    if not right:
        raise Wrong(what)


# What a process does that may be killed. Each finds out where it stands, goes on, and checks what it reads.


def train(place: Path, parallel: training.Parallel = "ddp") -> None:
    """Both stages of a tiny model, saved at every third step."""
    recipe = recipes.find("scenes32-small")
    options = dataclasses.replace(recipe.vae_training, steps=30, batch_size=4, checkpoint_every=3, validate_every=15, log_every=5)
    vae = dataclasses.replace(recipe.vae, resolution=16, base_channels=8, channel_multipliers=(1, 1), num_steps=20)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, num_train=40, num_test=8),
        vae=vae,
        diffusion=dataclasses.replace(recipe.diffusion, base_channels=8, num_groups=4, head_channels=4),
        diffusion_objective=dataclasses.replace(recipe.diffusion_objective, statistics_images=40),
        vae_training=options,
        diffusion_training=options,
    )
    recipes.run(recipe, place, resume=True, progress=False, parallel=parallel)


def train_together(rank: int, port: int, parallel: training.Parallel, place: Path) -> None:
    """The same by two processes, of which this is one."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with distribution.joined(timeout_seconds=JOIN_SECONDS):
            train(place, parallel)
    except (distribution.OtherProcessFailed, ConnectionError, ValueError) as error:  # it was killed, perhaps before they joined
        sys.exit(str(error))


def save(place: Path) -> None:
    """Checkpoints 1 to `SAVES` into one folder, each of one value throughout."""
    while (step := saved_step(place) + 1) <= SAVES:
        check_saved(place)
        weights = {name: {"a": torch.full((VALUES,), float(step))} for name in ("first", f"only{step % 3}")}
        checkpoints.save_folder(place, weights, {"step": step})


def saved_step(place: Path) -> int:
    """The step of the checkpoint in `place`, 0 where there is none yet."""
    return checkpoints.load_folder(place)[1]["step"] if checkpoints.exists(place) else 0


def check_saved(place: Path) -> None:
    """Nothing in the checkpoint of `save` is of another step."""
    if not checkpoints.exists(place):
        return
    weights, config = checkpoints.load_folder(place)
    step = config["step"]
    require(weights.keys() == {"first", f"only{step % 3}"}, f"checkpoint {step} holds {', '.join(weights)}")
    whole = all((state["a"] == step).all() for state in weights.values())
    require(whole, f"checkpoint {step} holds weights of another step")


def index(place: Path, images: Path) -> None:
    """Open a folder of images through a cache, and read all of them."""
    dataset = data.ImageFolder(images, 32, cache=place, progress=False)
    require(len(dataset) == NUM_IMAGES, f"{len(dataset)} of {NUM_IMAGES} images were indexed")
    pixels = dataset.images(range(NUM_IMAGES))[:, :, 16, 16]
    require(torch.equal(pixels, colours()), "images have the pixels of others")


def unpack(place: Path, archive: Path) -> None:
    """Unpack an array through a cache, and read all of it."""
    array = arrays.map_npz(archive, "values", lambda dtype, shape: None, cache=place, progress=False)
    require(np.array_equal(array[:], unpacked()), "the array holds other values")


def clear(place: Path) -> None:
    """Clear the cache that others index into meanwhile, as `multibeta cache clear` does."""
    for _ in range(20):
        caches.clear_caches(place.with_name("index"))
        time.sleep(0.02)


def colours() -> torch.Tensor:
    """The colour of each image of the folder, uint8, (NUM_IMAGES, 3)."""
    number = torch.arange(NUM_IMAGES)
    return torch.stack([number % 256, number // 256 * 64, 255 - number % 256], dim=1).to(torch.uint8)


def unpacked() -> np.ndarray:
    """The array of the archive."""
    return np.random.default_rng(0).integers(0, 256, ARRAY, dtype=np.uint8)


def prepare(folder: Path) -> dict[str, list[Path]]:
    """Name of what a process does to the sources it takes, which are written to `folder`."""
    images, archive = folder / "images", folder / "archive.npz"
    images.mkdir(parents=True)
    for number, colour in enumerate(colours().tolist()):
        Image.new("RGB", (SIDE, SIDE), tuple(colour)).save(images / f"{number:04d}.png")
    np.savez_compressed(archive, values=unpacked())
    return {"train": [], "save": [], "index": [images], "unpack": [archive]}


def start(name: str, threads: int, place: Path, sources: list[Path]) -> BaseProcess:
    """A process that does `name` in `threads` threads at once; it is forked from one that has imported everything."""
    process = multiprocessing.get_context("forkserver").Process(target=work, args=(name, threads, place, sources))
    process.start()
    return process


def work(name: str, threads: int, place: Path, sources: list[Path]) -> None:
    """What `start` runs."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: globals()[name](place, *sources), range(threads)))


def finish(process: BaseProcess, name: str, kill_after: float | None = None) -> bool:
    """Whether a process, killed after so many seconds if it still runs then, ended by itself; `Wrong` if with an error."""
    process.join(kill_after)
    process.kill()
    process.join()
    require(process.exitcode in (0, -signal.SIGKILL), f"{name} failed, its error stands above")
    return process.exitcode == 0


# The trials. Each returns what it counted.


def concurrent_use(seconds: float) -> dict[str, int]:
    """Threads that use one model get what it gives alone."""
    model = multibeta.DenoisingMultiBetaVAE.from_pretrained("scenes32")
    scenes = data.to_float(data.Scenes(32).images(range(4)))

    def use(seed: int) -> torch.Tensor:
        if seed % 3 == 0:
            return model.generate(2, seed=seed, sampler="ode2", steps=4)
        latents = model.encode(scenes, 0.7, seeds=range(seed, seed + 4))
        return model.decode(latents if seed % 3 == 1 else model.denoise(latents, 0.7, "ode2", steps=4), 0.7)

    alone, count, ends = [use(seed) for seed in range(12)], itertools.count(), time.monotonic() + seconds
    with ThreadPoolExecutor(8) as pool:

        def repeat(first: int) -> None:
            for seed in itertools.cycle([*range(first, 12), *range(first)]):
                if time.monotonic() > ends:
                    return
                worst = (use(seed) - alone[seed]).abs().max().item()
                require(worst < 1e-5, f"seed {seed} in a thread differs by {worst:.3g} from what it gives alone")
                next(count)

        list(pool.map(repeat, range(8)))
    return {"threads": 8, "calls": next(count)}


def changes(model: nn.Module, generator: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    """The ways in which the weights of a network change, each as (name, what does it)."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    module = generator.choice(convolutions)
    factor = generator.uniform(0.5, 1.5)

    def replace_layer() -> None:
        parent = next(part for part in model.modules() if module in part.children())
        name = next(name for name, child in parent.named_children() if child is module)
        setattr(parent, name, copy.deepcopy(module).requires_grad_(False))
        with torch.no_grad():
            getattr(parent, name).weight.mul_(factor)

    def load() -> None:
        model.load_state_dict({name: value * factor for name, value in model.state_dict().items()})

    yield "in place", lambda: module.weight.data.mul_(factor)
    yield "another tensor", lambda: setattr(module.weight, "data", module.weight.data * factor)
    yield "another parameter", lambda: setattr(module, "weight", nn.Parameter(module.weight.detach() * factor, False))
    yield "another layer", replace_layer
    yield "load_state_dict", load
    yield "there and back", lambda: model.to(torch.bfloat16).to(torch.float32)
    yield "optimiser", lambda: step_of_an_optimiser(model, factor)


def step_of_an_optimiser(model: nn.Module, factor: float) -> None:
    """One fused step of AdamW on random gradients."""
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=1e-3 * factor, fused=True).step()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def changed_weights(seconds: float) -> dict[str, int]:
    """After every change of weights the model gives what a fresh copy gives."""
    generator, ends, counts = random.Random(0), time.monotonic() + seconds, {}
    shipped = multibeta.DenoisingMultiBetaVAE.from_pretrained("scenes32")
    while time.monotonic() < ends:
        model = copy.deepcopy(shipped)
        networks = {"unet": model.diffusion.unet, "decoder": model.vae.decoder}
        draw = lambda one: one.generate(2, seed=1, sampler="ode2", steps=2)  # noqa: E731
        draw(model)
        for _ in range(6):
            part, network = generator.choice(list(networks.items()))
            how, change = generator.choice(list(changes(network, generator)))
            with torch.no_grad():
                change()
            worst = (draw(model) - draw(copy.deepcopy(model))).abs().max().item()
            require(worst < 1e-5, f"after weights of the {part} changed ({how}) images differ by {worst:.3g} from a fresh copy's")
            counts[how] = counts.get(how, 0) + 1
    return counts


def shared_folders(seconds: float, sources: dict[str, list[Path]], folder: Path) -> dict[str, int]:
    """Processes of several threads in the same places, one in four of them killed: nobody reads anything that is not right."""
    ends, kills, ended, rounds = time.monotonic() + seconds, 0, 0, 0
    generator = random.Random(1)
    while time.monotonic() < ends:
        place, rounds = folder / f"shared{rounds}", rounds + 1
        names = [*(name for name in sources if name != "train"), "clear"]
        processes = [(name, start(name, 3, place / name, sources.get(name, []))) for name in names for _ in range(3)]
        generator.shuffle(processes)  # the first quarter is killed
        for number, (name, process) in enumerate(processes):
            whole = finish(process, name, generator.uniform(0, 1) if number < len(processes) // 4 else None)
            ended, kills = ended + whole, kills + (not whole)
        check_saved(place / "save")
        shutil.rmtree(place)
    return {"processes": ended + kills, "threads": 3 * (ended + kills), "kills": kills}


def kills(number: int, sources: dict[str, list[Path]], folder: Path) -> dict[str, int]:
    """`number` SIGKILLs at random moments; everything goes on, and training ends with the weights that it has without kills."""
    durations, generator, counts = {}, random.Random(2), dict.fromkeys(sources, 0)
    for again, (name, given) in itertools.product((False, True), sources.items()):  # the first of all starts the server
        began, place = time.perf_counter(), folder / f"whole{again}" / name
        finish(start(name, 1, place, given), name)
        durations[name] = time.perf_counter() - began
    runs = 0
    while sum(counts.values()) < number:
        for name, given in sources.items():
            place = folder / f"killed{runs}" / name
            for _ in range(min(KILLS_A_RUN, number - sum(counts.values()))):
                moment = generator.uniform(0, durations[name])
                counts[name] += not finish(start(name, 1, place, given), name, moment)
            finish(start(name, 1, place, given), name)
            check_whole(name, place, folder / "wholeTrue" / name)
        shutil.rmtree(folder / f"killed{runs}")
        runs += 1
    return {**{f"kills in {name}": count for name, count in counts.items()}, "runs to the end": len(sources) * runs}


def kills_together(number: int, folder: Path) -> dict[str, int]:
    """SIGKILLs of two processes that train together, or of one, whereupon the other ends: as of `kills`, in both ways."""
    generator, counts = random.Random(3), dict.fromkeys((*training.PARALLEL[:2], "one of two"), 0)
    for parallel in training.PARALLEL[:2]:
        expected = folder / f"whole-{parallel}"
        began = time.perf_counter()
        require(finish_together(start_together(parallel, expected)), f"{parallel} failed, its error stands above")
        duration, place, ended = time.perf_counter() - began, folder / f"killed-{parallel}", False
        while counts[parallel] < number // 2:
            one = generator.random() < 0.5
            ended = finish_together(start_together(parallel, place), generator.uniform(0, duration), one=one)
            counts[parallel] += not ended
            counts["one of two"] += one and not ended
            if ended:
                check_whole("train", place, expected)
                shutil.rmtree(place)
        if not ended:
            require(finish_together(start_together(parallel, place)), f"{parallel} failed, its error stands above")
            check_whole("train", place, expected)
    return {f"kills of {name}": count for name, count in counts.items()}


def start_together(parallel: training.Parallel, place: Path) -> list[BaseProcess]:
    """Two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=train_together, args=(rank, port, parallel, place)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def finish_together(processes: list[BaseProcess], kill_after: float | None = None, *, one: bool = False) -> bool:
    """Whether both ended by themselves; after so many seconds both are killed, or one, and the other has to end by itself."""
    processes[0].join(kill_after)
    if kill_after is not None and processes[0].is_alive():
        for process in processes[: 1 if one else 2]:
            process.kill()
    for process in processes:
        process.join(ALONE_SECONDS)
        require(not process.is_alive(), "a process did not notice that the other was killed")
    return all(process.exitcode == 0 for process in processes)


def check_whole(name: str, place: Path, expected: Path) -> None:
    """What a killed and continued process left is what an undisturbed one leaves."""
    if name == "train":
        for part in ("vae/checkpoint", "diffusion/checkpoint", "model"):
            (left, _), (right, _) = checkpoints.load_folder(place / part), checkpoints.load_folder(expected / part)
            same = all(torch.equal(left[key][name], value) for key, state in right.items() for name, value in state.items())
            require(same and left.keys() == right.keys(), f"{part} of a training that was killed holds other weights")
    if name == "save":
        check_saved(place)
    remains = [str(path.relative_to(place)) for path in place.rglob(".*") if path.name.endswith((".part", ".lock", ".next"))]
    require(not remains, f"{name} left {', '.join(remains)}")


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of each of the first three trials")
    parser.add_argument("--kills", type=int, default=100, help="of each of the last two trials")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=TRIALS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = prepare(folder / "sources")
        trials: dict[str, Callable[[], dict[str, int]]] = {
            "concurrent use": lambda: concurrent_use(arguments.seconds),
            "changed weights": lambda: changed_weights(arguments.seconds),
            "shared folders": lambda: shared_folders(arguments.seconds, sources, folder),
            "kills": lambda: kills(arguments.kills, sources, folder),
            "kills together": lambda: kills_together(arguments.kills, folder / "together"),
        }
        results = {}
        for title in arguments.trials:
            began = time.perf_counter()
            results[title] = {**trials[title](), "seconds": round(time.perf_counter() - began, 1)}
            print(f"{title}: nothing lost or wrong; " + ", ".join(f"{key} {value}" for key, value in results[title].items()))
    measure.record(arguments.results, "stress.jsonl", {"trials": results})


if __name__ == "__main__":
    main()
