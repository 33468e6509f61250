"""The input pipeline against torchvision's on the same files, and whether it keeps up with training.

    python -m benchmarks.input [--json=FILE] [--data=DIR] [--images=2000] [--rounds=5] [--seconds=1]

The benchmark generates its files: JPEGs of 500 x 375 pixels and quality 92, photographs blended with a 1/f texture so
that a file has about 110 kB on average. The file size determines the time of decoding, and with it the ratios.

1. Images per second of one core, two views of each image. Ours: one thread that decodes and crops, to uint8; the rest
   of the augmentation runs on the device. Compared with `ImageFolder` and `DataLoader` with one worker process: once
   with the original's MoCo-v2 transforms, once with only the crop, the flip and the conversion to normalized floats.
   Both are measured with decoding, from files, and without it, from decoded images in memory. The pipelines take turns,
   round after round. The ratios use images per second of processor time, over all threads and processes of a pipeline,
   because on a shared machine wall-clock time is less reliable.
2. Memory over three epochs.
3. The device's part: the augmentation of two views, compiled by itself, relative to the compiled training step.
4. A training run on the files: the share of its time that it waits for images.

Takes four to seven minutes on two CPU cores. Without PyTorch and torchvision, only ifm_jax is measured.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import command, reporting
from ifm_jax import assembly, sharding
from ifm_jax.augment import IMAGENET_MEAN, IMAGENET_STD, example_rngs
from ifm_jax.config import Config, DataConfig
from ifm_jax.data import open_source, steps_per_epoch, training_batches
from ifm_jax.errors import UsageError
from ifm_jax.runs import metrics_log, training

HEIGHT, WIDTH, QUALITY = 375, 500, 92
CLASSES = 10
EPOCHS = 3  # of the part that measures memory
FIRST_STEPS = 10  # of the training run, which are not counted: the threads are still filling their buffers
LOGGED = 5  # steps of it to a line of metrics

# Batches that a pipeline makes ahead, and some more: taken before the clock starts, since they were made while another
# pipeline was measured.
_OURS_AHEAD, _PEERS_AHEAD = 6, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline to measure.

    Attributes:
      pipeline: "ifm_jax" or "torchvision".
      images: "JPEG" or "decoded".
      transforms: "crops", or "MoCo-v2" for all of the original's.
      size: side of a view in pixels.
    """

    pipeline: str
    images: str
    transforms: str
    size: int


OURS = tuple(Case("ifm_jax", images, "crops", size) for images in ("JPEG", "decoded") for size in (224, 128, 64))
PEERS = (
    Case("torchvision", "JPEG", "MoCo-v2", 224),
    Case("torchvision", "JPEG", "MoCo-v2", 128),
    Case("torchvision", "JPEG", "crops", 224),
    Case("torchvision", "decoded", "MoCo-v2", 224),
    Case("torchvision", "decoded", "crops", 224),
)


@dataclasses.dataclass(frozen=True)
class Network:
    """A training step.

    Attributes:
      arch: one of `models.ARCHITECTURES`.
      stem: one of `models.STEMS`.
      size: side of a view in pixels.
      batch_size: images.
      bn_groups: BatchNorm groups.
      queue_size: K.
      width: channels of the first stage; 0: the architecture's own.
    """

    arch: str
    stem: str
    size: int
    batch_size: int
    bn_groups: int = 2
    queue_size: int = 65536
    width: int = 0

    @property
    def name(self) -> str:
        """Returns what to call it in a table."""
        return f"{self.arch}, {self.size} px, batch {self.batch_size}"

    def config(self, source: str) -> Config:
        """Returns the config of a run on a data source."""
        config = Config()
        config.model.arch, config.model.stem, config.model.width = self.arch, self.stem, self.width
        config.model.bn_groups, config.moco.queue_size, config.batch_size = (
            self.bn_groups,
            self.queue_size,
            self.batch_size,
        )
        config.data.source, config.data.image_size, config.data.augmentation = source, self.size, "moco_v2"
        return assembly.resolve(config)


# On a CPU, one that it trains in minutes, and the recipe's with a small batch; on an accelerator the recipe's, which is
# large enough that input at full speed means something.
_SMALL = Network("resnet8", "small_stride2", 64, 64, queue_size=2048)
_RECIPE = Network("resnet50", "imagenet", 224, 256, bn_groups=8)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
      images: files to generate, and to read in an epoch.
      cases: pipelines to compare.
      size: side of a view in pixels, for the ratios and for the memory.
      batch_size: of the pipelines.
      decoded: images held in memory, for the pipelines without decoding.
      rounds: in which the pipelines take turns.
      seconds: for which each is measured in a round.
      networks: whose augmentation and step are measured.
      run: the network that is trained.
      steps: for which it is.
    """

    images: int = 2000
    cases: tuple[Case, ...] = (*OURS, *PEERS)
    size: int = 224
    batch_size: int = 32
    decoded: int = 96
    rounds: int = 5
    seconds: float = 1.0
    networks: tuple[Network, ...] = (_SMALL, Network("resnet50", "imagenet", 224, 4))
    run: Network = _SMALL
    steps: int = 60


# The files.


def generate(folder: pathlib.Path, images: int, seed: int = 0) -> None:
    """Writes JPEGs as `ImageFolder` wants them, below `folder`/train.

    Each is a blend of two random pieces of the photographs that scikit-learn ships, enlarged by up to 1.6 and flipped
    at random, and of gray texture whose spectrum falls with 1/f as a natural image's does. The texture's strength is
    drawn for each image; it decides how large the files are: 55 to 140 kB, 108 kB on average.

    Args:
      folder: made if it is not there.
      images: how many.
      seed: of everything random.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photographs, texture = load_sample_images().images, _texture(rng, 1024)
    for number in range(images):
        share = rng.uniform(0.5, 1)
        image = share * _piece(rng, photographs) + (1 - share) * _piece(rng, photographs)
        top, left = rng.integers(texture.shape[0] - HEIGHT), rng.integers(texture.shape[1] - WIDTH)
        image += rng.uniform(0, 80) * texture[top : top + HEIGHT, left : left + WIDTH, None]
        path = folder / "train" / f"class{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blue_green_red = np.clip(image, 0, 255).astype(np.uint8)[..., ::-1]
        cv2.imwrite(str(path), blue_green_red, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def _piece(rng: np.random.Generator, photographs: Sequence[np.ndarray]) -> np.ndarray:
    photograph = photographs[rng.integers(len(photographs))]
    height = int(rng.integers(240, photograph.shape[0] + 1))
    width = height * WIDTH // HEIGHT
    top, left = rng.integers(photograph.shape[0] - height + 1), rng.integers(photograph.shape[1] - width + 1)
    piece = photograph[top : top + height, left : left + width]
    piece = cv2.resize(piece, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC if height < HEIGHT else cv2.INTER_AREA)
    return (piece[:, ::-1] if rng.random() < 0.5 else piece).astype(np.float32)


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Returns normal noise of standard deviation 1 whose amplitude falls with 1/f, float32 `(side, side)`."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / frequency, (side, side))
    return (texture / texture.std()).astype(np.float32)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the images in `folder`/train, in the order in which both pipelines number them."""
    return sorted((folder / "train").glob("*/*.jpg"))


# Ours.


class Ours:
    """The pipeline of `ifm_jax.data`, with one thread that decodes and cuts."""

    ahead = _OURS_AHEAD

    def __init__(self, case: Case, source: str, batch_size: int):
        data = DataConfig(source=source, image_size=case.size, augmentation="moco_v2")
        self._batches = training_batches(open_source(data, "train"), batch_size, seed=0, threads=1)

    def next(self) -> float:
        """Takes a batch; returns the seconds of processor time that other processes have spent up to it."""
        next(self._batches)
        return 0.0

    def close(self) -> None:
        """Ends its threads."""
        self._batches.close()


# The peer.


class TorchvisionViews:
    """Two views of each image as the original makes them; a data set of PyTorch's that opens where it is read.

    The worker that reads it is started afresh, not forked from a process in which JAX has threads, so torchvision is
    imported there; and through the tests' module, which makes it importable beside a PyTorch without CUDA.
    """

    def __init__(self, root: str, case: Case, size: int, decoded: int):
        """Notes what to open.

        Args:
          root: folder of class folders.
          case: says which transforms, and from what.
          size: how many images there are.
          decoded: how many of them are held in memory, if the case wants decoded ones.
        """
        self._root, self._case, self._size, self._decoded = root, case, size, decoded
        self._views = None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int):
        if self._views is None:
            self._views = self._open()
        return self._views(index)

    def _open(self):
        from references.torchvision_peer import torchvision

        transforms = torchvision.transforms
        color = [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([_pil_blur], p=0.5),
        ]
        view = transforms.Compose(
            [
                transforms.RandomResizedCrop(self._case.size, scale=(0.2, 1.0)),
                *(color if self._case.transforms == "MoCo-v2" else ()),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        folder = torchvision.datasets.ImageFolder(self._root, lambda image: [view(image), view(image)])
        if self._case.images == "JPEG":
            return lambda index: folder[index]
        images = [folder.loader(path) for path, _ in folder.samples[: self._decoded]]
        return lambda index: (folder.transform(images[index % len(images)]), 0)


def _pil_blur(image):
    """MoCo-v2's `GaussianBlur`."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def _collate(samples: list):
    """Makes a batch, as the loader would, and adds the seconds of processor time this worker has spent by then."""
    import torch

    return torch.utils.data.default_collate(samples), time.process_time()


class Torchvision:
    """`ImageFolder` and `DataLoader`, with one worker process."""

    ahead = _PEERS_AHEAD

    def __init__(self, case: Case, root: str, size: int, decoded: int, batch_size: int):
        import torch

        views = TorchvisionViews(root, case, size, decoded)
        loader = torch.utils.data.DataLoader(
            views,
            batch_size,
            # Without an end: at each the worker would stand still.
            sampler=torch.utils.data.RandomSampler(views, replacement=True, num_samples=2**40),
            num_workers=1,  # in which PyTorch itself keeps to one thread
            collate_fn=_collate,
            multiprocessing_context="spawn",
        )
        self._batches = iter(loader)

    def next(self) -> float:
        """Takes a batch; returns the seconds of processor time that other processes have spent up to it."""
        return next(self._batches)[1]

    def close(self) -> None:
        """Ends its worker."""
        del self._batches


def torchvision_is_here() -> bool:
    """Whether the peer is installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "torchvision"))


# What is measured.


def throughput(folder: pathlib.Path, settings: Settings) -> list[dict]:
    """Measures the pipelines in turn; returns a row for each.

    Args:
      folder: with the files.
      settings: how much.
    """
    found = files(folder)
    decoded = [cv2.imread(str(path))[..., ::-1] for path in found[: settings.decoded]]
    if len({image.shape for image in decoded}) > 1:
        raise UsageError(
            f"--data={folder}: its images differ in size; expected images that this benchmark generated, or a "
            "folder that does not exist yet"
        )
    measured = {case: [] for case in settings.cases}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        np.savez(pathlib.Path(temporary) / "decoded.npz", train_images=np.stack(decoded))
        sources = {"JPEG": f"folder:{folder}", "decoded": f"array:{temporary}/decoded.npz"}
        streams = {}
        for case in measured:
            if case.pipeline == "ifm_jax":
                streams[case] = Ours(case, sources[case.images], settings.batch_size)
            else:
                root = str(folder / "train")
                streams[case] = Torchvision(case, root, len(found), settings.decoded, settings.batch_size)
            stack.callback(streams[case].close)
        for stream in streams.values():
            stream.next()  # all have started before any is measured
        for _ in range(settings.rounds):
            for case, stream in streams.items():
                measured[case].append(_measure(stream, settings))
    return [
        {
            **dataclasses.asdict(case),
            "images_per_cpu_second": statistics.median(per_cpu for per_cpu, _ in rates),
            "images_per_second": statistics.median(per_second for _, per_second in rates),
            "cpu_ms_per_image": 1e3 / statistics.median(per_cpu for per_cpu, _ in rates),
            "rounds": [{"images_per_cpu_second": cpu, "images_per_second": wall} for cpu, wall in rates],
        }
        for case, rates in measured.items()
    ]


def _measure(stream: Ours | Torchvision, settings: Settings) -> tuple[float, float]:
    """Returns images per second of processor time, of all threads and processes, and per second."""
    for _ in range(stream.ahead):
        elsewhere = stream.next()
    begun, cpu, images = time.perf_counter(), time.process_time() + elsewhere, 0
    while images < 2 * settings.batch_size or time.perf_counter() - begun < settings.seconds:
        elsewhere = stream.next()
        images += settings.batch_size
    return images / (time.process_time() + elsewhere - cpu), images / (time.perf_counter() - begun)


def memory(folder: pathlib.Path, settings: Settings) -> dict:
    """Reads three epochs with all processors; returns a row with the greatest resident memory of each, in bytes."""
    data = DataConfig(source=f"folder:{folder}", image_size=settings.size, augmentation="moco_v2")
    source = open_source(data, "train")
    size = min(settings.images, len(source))
    batches = training_batches(source, settings.batch_size, seed=0, size=size)
    peaks = []
    for _ in range(EPOCHS):
        epoch = itertools.islice(batches, steps_per_epoch(size, settings.batch_size))
        peaks.append(max((_resident_bytes() for _ in epoch), default=0))
    batches.close()
    if not all(peaks):
        return {"name": "memory", "peak_bytes_by_epoch": None, "growth_bytes": None}
    return {"name": "memory", "peak_bytes_by_epoch": peaks, "growth_bytes": peaks[-1] - peaks[0]}


def _resident_bytes() -> int:
    """Returns the memory this process holds now; 0 where the system does not say so as Linux does."""
    # Not the peak that the system keeps: it is that of everything done before, and of the parent process too.
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def device_share(network: Network, repeats: int = 5) -> dict:
    """Times the augmentation of two views, compiled on its own, and the training step that contains it.

    Inside the step it can only be cheaper: what it writes need not be stored.

    Args:
      network: whose step it is.
      repeats: of each, in turn.

    Returns:
      A row: the medians in milliseconds, and the share.
    """
    config = network.config("folder:none")
    assembly.configure_jax(config.model.compute_dtype)
    mesh = sharding.make_mesh(jax.devices()[:1])
    state = jax.jit(assembly.state_creator(config), out_shardings=sharding.replicated(mesh))()
    shape = (network.batch_size, 2, network.size, network.size, 3)
    batch = {"views": np.random.default_rng(0).integers(0, 256, shape, np.uint8)}
    batch = sharding.put_batch(mesh, batch)
    step = assembly.make_step(config, mesh).jit()
    arguments = assembly.step_arguments(config, 1000, mesh)
    step = step.lower(state, batch, *arguments).compile()
    augmentation = assembly.make_augmentation(config)

    @jax.jit
    def views(rng, batch):
        place = jnp.arange(network.batch_size, dtype=jnp.int32)
        rngs = jax.random.split(rng)
        return [augmentation(example_rngs(rngs[i], place), batch["views"][:, i]) for i in range(2)]

    rng = jax.random.key(0)
    jax.block_until_ready(views(rng, batch))
    state, _ = jax.block_until_ready(step(state, batch, *arguments))
    seconds = {"augmentation": [], "step": []}
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(views(rng, batch))
        seconds["augmentation"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch, *arguments))
        seconds["step"].append(time.perf_counter() - begun)
    augmenting, stepping = (statistics.median(seconds[name]) for name in ("augmentation", "step"))
    return {
        "name": f"device's part: {network.name}",
        **dataclasses.asdict(network),
        "augmentation_ms": 1e3 * augmenting,
        "step_ms": 1e3 * stepping,
        "share": augmenting / stepping,
    }


def training_run(folder: pathlib.Path, settings: Settings) -> dict:
    """Trains on the files; returns a row with the share of the time that the loop waited for images.

    That share is None where runs do not log it.
    """
    config = settings.run.config(f"folder:{folder}")
    config.data.limit, config.steps, config.log_every = settings.images, settings.steps, LOGGED
    config.moco.queue_beyond_images = True
    config.epochs = -(-settings.steps // steps_per_epoch(settings.images, config.batch_size))
    with tempfile.TemporaryDirectory() as workdir:
        training.train(config, workdir, devices=jax.devices()[:1], quiet=True)
        records = metrics_log.read(pathlib.Path(workdir) / "metrics.jsonl")
    records = [record for record in records if record["step"] > FIRST_STEPS]
    # Weighted with their durations, the shares of the records add up to the whole's.
    seconds = [LOGGED * config.batch_size / record["images_per_sec"] for record in records]
    waits = [record.get("data_wait") for record in records]
    return {
        "name": f"training run: {settings.run.name}",
        "steps": LOGGED * len(records),
        "images_per_second": LOGGED * config.batch_size * len(records) / sum(seconds),
        "data_wait": None
        if None in waits
        else sum(wait * each for wait, each in zip(waits, seconds, strict=True)) / sum(seconds),
    }


def benchmark(folder: pathlib.Path, settings: Settings, say=print) -> dict:
    """Runs all parts.

    Args:
      folder: with the files; if it is empty or not there, they are generated.
      settings: how much.
      say: takes a line about what comes next.

    Returns:
      The report; see `reporting.report`.
    """
    if not files(folder):
        say(f"Generating {settings.images} images ...")
        try:
            generate(folder, settings.images)
        except OSError as error:
            raise UsageError(
                f"--data={folder} is not writable ({error.strerror}): pass a writable folder, or leave --data out"
            ) from None
    sizes = [path.stat().st_size for path in files(folder)]
    rows = [{"name": "files", "images": len(sizes), "mean_bytes": statistics.mean(sizes)}]
    say(f"{len(sizes)} files of {rows[0]['mean_bytes'] / 1e3:.0f} kB on average.")
    say(f"Memory over {EPOCHS} epochs ...")
    rows.append(memory(folder, settings))  # first, while the process holds little else
    say(f"{len(settings.cases)} pipelines in {settings.rounds} rounds ...")
    pipelines = throughput(folder, settings)
    rows += pipelines
    for network in settings.networks:
        say(f"Augmentation and step of {network.name} ...")
        rows.append(device_share(network))
    say(f"Training {settings.run.name}, {settings.steps} steps ...")
    rows.append(training_run(folder, settings))
    others = ("opencv-python-headless", "grain", "torch", "torchvision", "pillow")
    return reporting.report("input", rows, _summary(rows, pipelines, settings.size), others)


def _summary(rows: list[dict], pipelines: list[dict], size: int) -> dict:
    def ratio(images: str, transforms: str, field: str = "images_per_cpu_second") -> float | None:
        def rate(pipeline, transforms):
            wanted = {"pipeline": pipeline, "images": images, "transforms": transforms, "size": size}
            return next((row[field] for row in pipelines if wanted.items() <= row.items()), None)

        ours, theirs = rate("ifm_jax", "crops"), rate("torchvision", transforms)
        return ours / theirs if ours and theirs else None

    return {
        "vs_torchvision_per_core": ratio("JPEG", "MoCo-v2"),
        "vs_torchvision_per_core_is": "images per second of processor time, from JPEG files, two views of "
        f"{size} px: our host part over torchvision's with all MoCo-v2 transforms",
        "vs_torchvision_per_second": ratio("JPEG", "MoCo-v2", "images_per_second"),
        "vs_torchvision_decoded": ratio("decoded", "MoCo-v2"),
        "vs_torchvision_crops": ratio("JPEG", "crops"),
        "vs_torchvision_crops_decoded": ratio("decoded", "crops"),
        "device_share": max((row["share"] for row in rows if "share" in row), default=None),
        "data_wait_share": next((row["data_wait"] for row in rows if "data_wait" in row), None),
        "memory_growth_bytes": next(row["growth_bytes"] for row in rows if "growth_bytes" in row),
    }


def print_report(made: dict) -> None:
    """Prints a report as tables."""
    rows, summary = made["results"], made["summary"]
    columns = {
        **dict.fromkeys(("pipeline", "images", "transforms", "size"), ""),
        "images_per_cpu_second": ".0f",
        "cpu_ms_per_image": ".2f",
        "images_per_second": ".0f",
    }
    reporting.print_table("One core, two views of each image", [row for row in rows if "pipeline" in row], columns)
    columns = {"name": "", "augmentation_ms": ".1f", "step_ms": ".1f", "share": ".1%", "data_wait": ".1%"}
    columns |= {"growth_bytes": lambda value: f"{value / 2**20:.1f} MiB"}
    others = [row for row in rows if "name" in row and row["name"] != "files"]
    reporting.print_table("The device's part, a run, memory after the first of three epochs", others, columns)
    ratios = [{"ratio": name, "value": value} for name, value in summary.items() if name.startswith("vs_")]
    ratios = [row for row in ratios if isinstance(row["value"], float)]
    if ratios:
        reporting.print_table("Ours over torchvision's", ratios, {"ratio": "", "value": ".2f"})


def main(arguments: list[str]) -> int:
    """Runs the benchmark."""
    command.refuse_arguments(arguments)
    reporting.check_path(_JSON.value)
    settings = Settings(images=_IMAGES.value, rounds=_ROUNDS.value, seconds=_SECONDS.value)
    least = max(settings.run.batch_size, settings.batch_size)
    if settings.images < least:
        raise UsageError(f"--images={settings.images}: expected at least {least}, a batch")
    if jax.default_backend() != "cpu":
        settings = dataclasses.replace(settings, networks=(_RECIPE,), run=_RECIPE)
    if not torchvision_is_here():
        print("PyTorch or torchvision is not installed: only ifm_jax is measured.", file=sys.stderr)
        settings = dataclasses.replace(settings, cases=OURS)
    with contextlib.ExitStack() as stack:
        folder = _DATA.value or stack.enter_context(tempfile.TemporaryDirectory())
        made = benchmark(pathlib.Path(folder), settings, say=lambda line: print(line, flush=True))
    print_report(made)
    reporting.write(made, _JSON.value)
    return 0


if __name__ == "__main__":
    _JSON = flags.DEFINE_string("json", None, "Write the rows and the summary to this JSON file.")
    _DATA = flags.DEFINE_string("data", None, "Folder for the generated images; existing ones are reused.")
    _IMAGES = flags.DEFINE_integer("images", 2000, "Number of images to generate and to read per epoch.")
    _ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which the pipelines take turns.", lower_bound=1)
    _SECONDS = flags.DEFINE_float(
        "seconds", 1.0, "Seconds for which each pipeline is measured in a round.", lower_bound=0.0
    )
    command.run(main)
