"""How things are measured: variants in alternation, ratios within a round, memory in a process of its own."""

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .floor import STEPS, Cost, flop_counter
from .shapes import SHAPES, Model, Shape
from .variants import Job, UnavailableError, Variant


ROOT = Path(__file__).parents[1]
# Kernels behind `scaled_dot_product_attention`, which plain pipelines and Face Fusion both call. (diffusers'
# `set_attention_backend` would reach Face Fusion alone: the stock processors of Stable Diffusion do not look at it.)
ATTENTION = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Setup:
    """Where and how all variants of one table run.

    Attributes:
        compile: "none", or a backend of `torch.compile`, such as "inductor".
        attention: a key of `ATTENTION`.
        steps: denoising steps that are run, at least two; a whole image of 20 is extrapolated.
        threads: CPU threads, 0 for PyTorch's choice.
    """

    shape: str = "sd15"
    device: str = "cpu"
    dtype: str = "float32"
    compile: str = "none"
    attention: str = "default"
    steps: int = 3
    threads: int = 0

    def __str__(self) -> str:
        parts = [self.shape, self.device, self.dtype]
        parts += [] if self.compile == "none" else [f"compiled ({self.compile})"]
        parts += [] if self.attention == "default" else [f"{self.attention} attention"]
        return ", ".join(parts)

    @property
    def sizes(self) -> Shape:
        """The shape with its name resolved."""
        return SHAPES[self.shape]

    def options(self) -> list[str]:
        """The command line that gives this setup again."""
        return [text for one in fields(self) for text in (f"--{one.name}", str(getattr(self, one.name)))]

    def model(self) -> Model:
        """The weights, on the device."""
        if self.threads:
            torch.set_num_threads(self.threads)
        return Model(self.sizes, self.device, getattr(torch, self.dtype))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def prepare(self, job: Job) -> Job:
        """Compile the job's UNet and ControlNet and restrict them to the chosen attention kernel."""
        networks = [getattr(job.pipe, name, None) for name in ("unet", "controlnet")]
        for network in filter(None, networks):
            if self.compile != "none":
                # One graph for each shape: dynamic sizes, which a reference pass of another batch would bring in, make
                # slower kernels. Isolated, or the variants, which share the UNet's code, use up one another's number
                # of recompilations.
                options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True}
                network.forward = torch.compile(network.forward, backend=self.compile, **options)
            if (backend := ATTENTION[self.attention]) is not None:
                # Not around the whole call: the VAE's one wide head has no fast kernel.
                network.forward = sdpa_kernel(backend)(network.forward)
        return job


# --- Time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of n steps.

    Attributes:
        step: median distance between the ends of its steps.
        once: the rest: texts, references, decoding, and what the first step takes longer.
    """

    step: float
    once: float

    @property
    def image(self) -> float:
        """A whole image of 20 steps: extrapolated, exact if 20 were run."""
        return self.once + STEPS * self.step


class Decoder:
    """The VAE's decoder, which all variants share: it is run once for latents of each size, instead of in every call.

    On a CPU it takes as long as two steps, and would only add to the noise between variants.
    """

    def __init__(self, vae: Any, setup: Setup) -> None:
        self.vae, self.setup = vae, setup
        self.seconds: dict[torch.Size, float] = {}
        self.operations: dict[torch.Size, int] = {}

    @torch.no_grad()
    def time(self, latents: torch.Tensor) -> float:
        """Seconds of decoding latents of this size; measured again after `forget`."""
        if latents.shape not in self.seconds:
            start = time.perf_counter()
            self.vae.decode(latents)
            self.setup.synchronize()
            self.seconds[latents.shape] = time.perf_counter() - start
        return self.seconds[latents.shape]

    def forget(self) -> None:
        """Measure anew."""
        self.seconds.clear()

    @torch.no_grad()
    def count(self, latents: torch.Tensor) -> int:
        """Operations of decoding latents of this size."""
        if latents.shape not in self.operations:
            with flop_counter() as counter:
                self.vae.decode(latents)
            self.operations[latents.shape] = counter.get_total_flops()
        return self.operations[latents.shape]


def timed(job: Job, setup: Setup, decoder: Decoder | None = None) -> Timing:
    """Run the job once; with a `decoder` it ends with latents, and the decoder's time is added."""
    ends: list[float] = []

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        setup.synchronize()
        ends.append(time.perf_counter())
        return {}

    setup.synchronize()
    start = time.perf_counter()
    options = {} if decoder is None else {"output_type": "latent"}
    output = job.call(num_inference_steps=setup.steps, callback_on_step_end=after_step, **options)
    setup.synchronize()
    total = time.perf_counter() - start
    if decoder is not None:
        total += decoder.time(output.images)
    step = statistics.median(later - earlier for earlier, later in zip(ends, ends[1:], strict=False))
    return Timing(step, total - setup.steps * step)


def counted(job: Job, decoder: Decoder | None = None) -> Cost:
    """Operations of a whole image, from a run of two steps; it also warms up. For `decoder` see `timed`."""
    marks = []
    with flop_counter() as counter:

        def after_step(*args: Any) -> dict[str, Any]:
            marks.append(counter.get_total_flops())
            return {}

        options = {} if decoder is None else {"output_type": "latent"}
        output = job.call(num_inference_steps=2, callback_on_step_end=after_step, **options)
    step = marks[1] - marks[0]
    decoding = 0 if decoder is None else decoder.count(output.images)
    return Cost(counter.get_total_flops() + decoding + (STEPS - 2) * step)


@dataclass
class Result:
    """Everything measured of one variant in one setup.

    Attributes:
        timings: one for each round.
        first: seconds to the first image in a fresh process whose models are in memory.
        memory: peak in bytes of that process.
        skipped: why there is nothing.
    """

    setup: Setup
    variant: Variant
    timings: list[Timing] = field(default_factory=list)
    flops: float | None = None
    first: float | None = None
    memory: float | None = None
    skipped: str = ""

    def median(self, of: str) -> float | None:
        """Median over rounds of "image", "step" or "once", in seconds."""
        return statistics.median(getattr(timing, of) for timing in self.timings) if self.timings else None

    def ratios(self, base: "Result", of: str) -> list[float]:
        """This variant over `base`, within each round: what slows the machine slows both."""
        pairs = zip(self.timings, base.timings, strict=True) if self.timings and base.timings else ()
        return [getattr(mine, of) / getattr(theirs, of) for mine, theirs in pairs]


def reason(error: Exception) -> str:
    """One line for the table."""
    lines = str(error).strip().splitlines()
    name = "" if isinstance(error, UnavailableError) else f"{type(error).__name__}: "
    return name + (lines[0] if lines else "no message")


def measure(setup: Setup, variants: Sequence[Variant], rounds: int, say: Callable[[str], None]) -> list[Result]:
    """All variants in one process, `rounds` times in alternation, each round beginning one variant later."""
    model = setup.model()
    decoder = Decoder(model.components["vae"], setup)
    jobs: list[tuple[Result, Job]] = []
    results = []
    for variant in variants:
        result = Result(setup, variant)
        results.append(result)
        try:
            job = variant.build(model)
            result.flops = counted(job, decoder).flops
            job = setup.prepare(job)
            if setup.compile != "none" or setup.attention != "default":
                timed(job, setup)  # warm up again, and see whether it can run at all
        except Exception as error:  # one variant without a kernel or the memory must not end the others
            result.skipped = reason(error)
            say(f"{setup}: {variant.label} skipped: {result.skipped}")
        else:
            jobs.append((result, job))
    for turn in range(rounds):
        shift = turn % max(1, len(jobs))
        decoder.forget()
        for result, job in jobs[shift:] + jobs[:shift]:
            result.timings.append(timed(job, setup, decoder))
        say(f"{setup}: round {turn + 1} of {rounds}")
    jobs.clear()
    gc.collect()  # pipelines refer to themselves, and processes that come next need the memory
    return results


def operator_seconds(setup: Setup, job: Job) -> dict[str, float]:
    """Time of one warm call by operator, without what it calls in turn: on a GPU the device's, else the CPU's."""
    from torch.profiler import ProfilerActivity, profile

    timed(setup.prepare(job), setup)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (setup.device == "cuda")
    with profile(activities=activities) as recorded:
        timed(job, setup)
    kind = "self_device_time_total" if setup.device == "cuda" else "self_cpu_time_total"
    return {event.key: getattr(event, kind) / 1e6 for event in recorded.key_averages()}


# --- Memory ------------------------------------------------------------------------------------------------------


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process, or the most it ever had."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage, this does not count the process that started us
        name = "VmHWM" if peak else "VmRSS"
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(setup: Setup) -> None:
    """From now on `device_bytes(peak=True)` is the peak since this call; on CPUs where Linux lets it be reset."""
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def device_bytes(setup: Setup, peak: bool = False) -> int:
    """Memory in use: allocated on a GPU, resident on a CPU."""
    if setup.device != "cuda":
        return resident_bytes(peak)
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def first_image(setup: Setup, variant: Variant) -> dict[str, float]:
    """Seconds to the first image and peak memory; meant for a process that does nothing else."""
    job = setup.prepare(variant.build(setup.model()))
    gc.collect()
    forget_peak(setup)
    return {"first": timed(job, setup).image, "memory": float(device_bytes(setup, peak=True))}


def in_own_process(arguments: Sequence[str]) -> Any:
    """The JSON that `python -m benchmarks ARGUMENTS` ends with. Raises UnavailableError with its last complaint."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_alone(result: Result, say: Callable[[str], None]) -> None:
    """Fill in `first` and `memory` from a fresh process."""
    if result.skipped:
        return
    try:
        measured = in_own_process(["alone", "--label", result.variant.label, *result.setup.options()])
    except UnavailableError as error:
        say(f"{result.setup}: {result.variant.label} alone failed: {error}")
        return
    result.first, result.memory = measured["first"], measured["memory"]


# --- Loading -----------------------------------------------------------------------------------------------------


def import_seconds(statement: str) -> float:
    """Time of an import statement in a fresh interpreter, without the interpreter's own start."""
    script = f"import time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- Long run ----------------------------------------------------------------------------------------------------


@contextmanager
def graphs_counted() -> Iterator[Callable[[], int]]:
    """Yields a function: how many graphs `torch.compile` has made so far."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    yield lambda: counters["stats"]["unique_graphs"] - before


def slope(values: Sequence[float]) -> float:
    """Least-squares growth a step of the second half of `values`: what a warm process still gains."""
    half = list(values[len(values) // 2 :])
    return statistics.linear_regression(range(len(half)), half).slope if len(half) > 1 else 0.0
