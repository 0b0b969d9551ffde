"""Build a wheel and an sdist, look into both, install the wheel into an empty environment and use it there.

The environment borrows torch and the other requirements from the one that runs this script, so nothing large is
downloaded; of this project it sees the wheel alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
#: What a checkout has that an sdist has no use for.
NOT_IN_SDIST = {".gitignore"}

SMOKE = """
import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel

import tfmq_fx
import tfmq_fx.diagnostics, tfmq_fx.schedulers, tfmq_fx.testing
from tfmq_fx.passes import CANONICALIZE, RemoveDropouts

site = Path(sys.argv[1])
assert Path(tfmq_fx.__file__).is_relative_to(site), tfmq_fx.__file__
assert Path(sys.modules[RemoveDropouts.__module__].__file__).is_relative_to(site / "tfmq_fx" / "passes")
assert CANONICALIZE and tfmq_fx.__version__ == sys.argv[2], (tfmq_fx.__version__, sys.argv[2])
bundled = UNet2DModel.from_pretrained(tfmq_fx.bundled_model_path() / "unet")
assert sum(parameter.numel() for parameter in bundled.parameters()) > 2_000_000

torch.manual_seed(0)
model = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)
timesteps = torch.tensor([0, 500])
inputs = {"sample": torch.randn(2, 1, 8, 8), "timestep": timesteps}
quantized = tfmq_fx.quantize(model, tfmq_fx.QuantizationConfig(), [inputs], timesteps=timesteps)
tfmq_fx.save(quantized, "tiny")
denoiser = tfmq_fx.lower(tfmq_fx.load("tiny"), "reference")
with torch.no_grad():
    exact = model.eval()(**inputs).sample
error = (denoiser(**inputs).sample - exact).norm() / exact.norm()
assert error < 0.1, error
print(f"tfmq_fx {tfmq_fx.__version__} from the wheel: a tiny model quantized, relative error {float(error):.4f}")
"""


def stop(sentence: str) -> NoReturn:
    """End with a sentence and a code that says that something is wrong."""
    raise SystemExit(sentence)


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command with none of this checkout on its path; raise when it fails, return what it wrote."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=variables, text=True, stdout=subprocess.PIPE, check=False
    )
    if result.returncode:
        stop(f"{result.stdout}\n{' '.join(map(str, command[:4]))} … failed ({result.returncode})")
    return result.stdout


def tracked() -> set[str]:
    """The files of the checkout that git knows or would take."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def check_sdist(sdist: Path, into: Path) -> Path:
    """The sdist is the whole checkout, tests included; return it unpacked."""
    with tarfile.open(sdist) as archive:
        archive.extractall(into, filter="data")
    (folder,) = into.iterdir()
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if missing := sorted(tracked() - held - NOT_IN_SDIST):
        stop(f"the sdist lacks {len(missing)} files of the checkout, {missing[0]} among them: see MANIFEST.in")
    return folder


def check_wheel(wheel: Path) -> None:
    """The wheel is the package: its modules, kernels and weights, and nothing else."""
    held = set(zipfile.ZipFile(wheel).namelist())
    files = tracked()
    wanted = {name for name in files if name.startswith("tfmq_fx/")}
    wanted |= {f"tfmq_fx/{name}" for name in files if name.startswith("passes/")}
    if missing := sorted(wanted - held):
        stop(f"the wheel lacks {len(missing)} files of the package, {missing[0]} among them: see pyproject.toml")
    if other := sorted(name for name in held - wanted if ".dist-info/" not in name):
        stop(f"the wheel holds {other[0]}, which is no file of the package")


def main() -> None:
    """All of it."""
    shutil.rmtree(DIST, ignore_errors=True)
    # Without it, setuptools would put what an older build left there into the wheel.
    for left in ("lib", f"bdist.{sysconfig.get_platform()}"):
        shutil.rmtree(ROOT / "build" / left, ignore_errors=True)
    # The wheel is built from the sdist, as `build` does it: a file that the sdist lacks is missing from the wheel too.
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT, cwd=ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    check_wheel(wheel)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "sdist").mkdir()
        unpacked = check_sdist(sdist, scratch / "sdist")
        run(sys.executable, "-m", "venv", scratch / "venv", cwd=scratch)
        python = scratch / "venv/bin/python"
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=scratch).strip())
        # A folder named in a .pth is searched, but its own .pth files are not read: an editable install stays unseen.
        borrowed = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
        (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
        install = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--ignore-installed")
        run(python, "-m", "pip", "install", *install, wheel, cwd=scratch)
        (scratch / "work").mkdir()
        version = wheel.name.split("-")[1]
        print(run(python, "-c", SMOKE, site, version, cwd=scratch / "work"), end="")
        if "quantize" not in run(scratch / "venv/bin/tfmq-fx", "--help", cwd=scratch / "work"):
            stop("tfmq-fx --help does not list its commands")
        run(scratch / "venv/bin/tfmq-fx", "inspect", cwd=scratch / "work")
        (test_of_a_pass,) = (unpacked / "tests").rglob("test_remove_dropouts.py")
        run(python, "-m", "pytest", "tests/test_packaging.py", test_of_a_pass, cwd=unpacked, OMP_NUM_THREADS="1")
    print(f"{wheel.name} and {sdist.name} are whole; both are in {DIST.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
