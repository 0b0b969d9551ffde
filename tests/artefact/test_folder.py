"""Saving: only our files are replaced, at every moment there is an artefact, and nothing is left behind."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tfmq_fx
from tests.artefact.artefacts import change_manifest, inputs, read_manifest
from tfmq_fx import ArtefactError
from tfmq_fx.artefact import folder
from tfmq_fx.artefact.folder import MARK, check_target, filled_folder
from tfmq_fx.artefact.layout import FILES, PREVIOUS
from tfmq_fx.artefact.locks import hold


def files(path):
    return sorted(file.name for file in path.iterdir())


def fill(part, source, kept_float=None):
    """Write a whole artefact, as save does."""
    for name in FILES:
        shutil.copy(source / name, part / name)
    if kept_float is not None:
        change_manifest(part, lambda manifest: manifest.update(kept_float=kept_float))


def test_what_is_not_ours_stays(program, artefact):
    (artefact / "notes.txt").write_text("mine")
    (artefact / "pictures").mkdir()
    (artefact / "pictures" / "tensors.safetensors").write_text("mine too")
    tfmq_fx.save(program, artefact)
    assert files(artefact) == sorted((*FILES, "notes.txt", "pictures"))
    assert (artefact / "notes.txt").read_text() == "mine"
    assert (artefact / "pictures" / "tensors.safetensors").read_text() == "mine too"
    assert tfmq_fx.load(artefact)(*inputs()).equal(program(*inputs()))


def test_an_empty_folder_and_one_behind_a_link_are_filled(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with filled_folder(tmp_path / "link") as part:
        fill(part, saved)
    assert files(tmp_path / "empty") == sorted(FILES) and (tmp_path / "link").is_symlink()


def test_the_folder_is_open_to_others_as_any_that_is_made(saved, tmp_path):
    (tmp_path / "usual").mkdir()
    with filled_folder(tmp_path / "out") as part:
        fill(part, saved)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir", "touch", "hardlink_to", "write_text")

KILL = textwrap.dedent("""
    import os, shutil, signal, sys
    from pathlib import Path
    from tfmq_fx.artefact.folder import filled_folder
    source, target, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    count = 0

    def counted(name, function):
        def call(*args, **kwargs):
            global count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    for name in sys.argv[4].split(","):
        setattr(Path, name, counted(name, getattr(Path, name)))
    shutil.rmtree = counted("rmtree", shutil.rmtree)
    os.fsync = counted("fsync", os.fsync)
    with filled_folder(target) as part:
        for name in os.listdir(source):
            shutil.copy(source / name, part / name)
    print(count)
""")


def run_killed(source, target, step):
    """Save in a process of its own that is killed at a step; how many steps there were when it was not."""
    process = subprocess.run(
        [sys.executable, "-c", KILL, source, target, str(step), ",".join(STEPS)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    return int(process.stdout) if process.returncode == 0 else None


class Killed(BaseException):
    """Stands for a kill: nothing catches it, and what would clean up is left out."""


def killed_at(monkeypatch, step, source, target):
    """Save, and stop at a step without any cleaning; whether it came to that step."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= step:
                raise Killed
            return function(*args, **kwargs)

        return call

    def held(path, *, wait):
        locks.append(hold(path, wait=wait))
        return locks[-1]

    locks = []
    with monkeypatch.context() as patch:
        patch.setattr(folder, "hold", held)
        for name in STEPS:
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(folder.shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(folder.os, "fsync", counted(os.fsync))
        try:
            with filled_folder(target) as part:
                for name in FILES:
                    shutil.copy(source / name, part / name)
        except Killed:
            # Locks end with their process.
            for lock in locks:
                with contextlib.suppress(OSError):
                    os.close(lock)
            return True
    return False


@pytest.mark.parametrize("there", [False, True])
def test_a_kill_at_every_step_leaves_the_old_artefact_or_the_new_one(program, saved, tmp_path, monkeypatch, there):
    """And the next save leaves nothing else behind; the save that follows a kill may be killed too."""
    new = shutil.copytree(saved, tmp_path / "new")
    change_manifest(new, lambda manifest: manifest.update(kept_float={"which": "new"}))
    old = shutil.copytree(saved, tmp_path / "old")
    change_manifest(old, lambda manifest: manifest.update(kept_float={"which": "old"}))
    seen = set()
    for step in range(1, 100):
        place = tmp_path / f"place{step}"
        place.mkdir()
        target = place / "out"
        if there:
            shutil.copytree(old, target)
            (target / "notes.txt").write_text("mine")
        stopped = killed_at(monkeypatch, step, new, target)
        if there or target.exists():
            # Whole, by its own word: every file that the manifest names is there and is what it says.
            manifest = read_manifest(target)
            for name, entry in manifest["files"].items():
                assert entry["name"] in (name, PREVIOUS[name])
                assert (target / entry["name"]).stat().st_size == entry["bytes"]
            seen.add(manifest["kept_float"]["which"])
        if stopped and there:
            killed_at(monkeypatch, 6, new, target)
            read_manifest(target)
        with filled_folder(target) as part:
            fill(part, new)
        assert files(target) == sorted((*FILES, *(["notes.txt"] if there else [])))
        assert files(place) == ["out"]
        if not stopped:
            break
    assert not stopped and step >= 8
    assert seen == ({"old", "new"} if there else {"new"})
    assert tfmq_fx.load(target)(*inputs()).equal(program(*inputs()))


@pytest.mark.parametrize("there", [False, True])
def test_a_real_kill(saved, tmp_path, there):
    target = tmp_path / "place" / "out"
    target.parent.mkdir()
    if there:
        shutil.copytree(saved, target)
    assert run_killed(saved, target, 9) is None
    if there:
        tfmq_fx.load(target)
    assert files(target.parent) != ["out"] or files(target) != sorted(FILES)
    with filled_folder(target) as part:
        fill(part, saved)
    assert files(target.parent) == ["out"] and files(target) == sorted(FILES)


def test_the_old_artefact_is_read_while_the_new_one_takes_its_place(program, saved, artefact, monkeypatch):
    """Between any two steps of a save, a reader finds an artefact."""
    change_manifest(artefact, lambda manifest: manifest.update(kept_float={"which": "old"}))
    found = []
    replace = Path.replace

    def reading(path, target):
        result = replace(path, target)
        loaded = tfmq_fx.load(artefact)
        assert loaded(*inputs()).equal(program(*inputs()))
        found.append(loaded.kept_float)
        return result

    monkeypatch.setattr(Path, "replace", reading)
    with filled_folder(artefact) as part:
        fill(part, saved, {"which": "new"})
    assert found == [{"which": "old"}] * 3 + [{"which": "new"}]


def test_folders_that_only_look_like_ours_stay(saved, tmp_path):
    target = tmp_path / "out"
    backup = shutil.copytree(saved, tmp_path / ".out.20240101")
    mine = tmp_path / ".out.abcd_123"
    mine.mkdir()
    (mine / MARK).touch()
    (mine / "thesis.txt").write_text("mine")
    (tmp_path / ".out.reconstruction").mkdir()
    other = tmp_path / ".out2.abcdefgh"
    other.mkdir()
    (other / MARK).touch()
    left = tmp_path / ".out.qwertz12"
    left.mkdir()
    (left / MARK).touch()
    (left / FILES[0]).touch()
    with filled_folder(target) as part:
        fill(part, saved)
    assert not left.exists()
    assert files(backup) == sorted(FILES) and (mine / "thesis.txt").read_text() == "mine"
    assert files(tmp_path) == sorted((".out.20240101", ".out.abcd_123", ".out.reconstruction", ".out2.abcdefgh", "out"))


@pytest.mark.parametrize("there", [False, True])
def test_what_a_running_save_needs_stays(saved, tmp_path, there):
    """The folder that one save fills is not cleaned away by another, which comes first; both end well."""
    target = tmp_path / "out"
    if there:
        shutil.copytree(saved, target)
    with filled_folder(target) as slow:
        fill(slow, saved, {"which": "slow"})
        with filled_folder(target) as fast:
            fill(fast, saved, {"which": "fast"})
        assert read_manifest(target)["kept_float"] == {"which": "fast"}
        assert slow.is_dir() and hold(slow / MARK, wait=False) is None
    assert read_manifest(target)["kept_float"] == {"which": "slow"}
    assert files(target) == sorted(FILES) and files(tmp_path) == ["out"]


def test_an_error_in_between_leaves_everything_as_it_was(saved, artefact):
    before = {name: (artefact / name).read_bytes() for name in files(artefact)}
    with pytest.raises(ZeroDivisionError), filled_folder(artefact) as part:
        fill(part, saved)
        1 / 0  # noqa: B018
    assert {name: (artefact / name).read_bytes() for name in files(artefact)} == before
    assert files(artefact.parent) == ["artefact"]


def test_without_hard_links_files_are_copied(saved, artefact, monkeypatch):
    def none(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", none)
    with filled_folder(artefact) as part:
        fill(part, saved)
    assert files(artefact) == sorted(FILES)
    tfmq_fx.load(artefact)


def test_a_target_is_checked_before_the_work(saved, tmp_path):
    check_target(tmp_path / "new" / "deep" / "out")
    check_target(saved)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(ArtefactError, match="choose another path"):
            check_target(path)
    for path in (tmp_path / "file" / "out", Path("/proc/out"), Path("/dev/null/out"), tmp_path / ("x" * 300)):
        with pytest.raises(ArtefactError, match="choose another path"):
            check_target(path)


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "tensors.safetensors").unlink(),
    lambda folder: (folder / "graph.json.gz").unlink(),
    lambda folder: [(folder / name).unlink() for name in FILES[:2]],
    lambda folder: (folder / "graph.json.gz").write_bytes(b""),
    lambda folder: (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:300]),
    lambda folder: change_manifest(folder, lambda manifest: manifest.update(format_version=1)),
])  # fmt: skip
def test_a_damaged_artefact_is_saved_over(program, artefact, damage):
    damage(artefact)
    (artefact / "notes.txt").write_text("mine")
    check_target(artefact)
    tfmq_fx.save(program, artefact)
    assert files(artefact) == sorted((*FILES, "notes.txt"))
    assert tfmq_fx.load(artefact)(*inputs()).equal(program(*inputs()))


@pytest.mark.parametrize("name", [*FILES, *PREVIOUS.values(), MARK])
def test_a_folder_in_the_place_of_a_file_stays(program, artefact, name):
    (artefact / name).unlink(missing_ok=True)
    (artefact / name).mkdir()
    (artefact / name / "notes.txt").write_text("mine")
    check_both_refuse(program, artefact, "remove it first")
    assert (artefact / name / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("text", [None, b"", b"{}"])
def test_a_folder_without_our_manifest_is_not_ours(program, artefact, text):
    """Others call their files like ours, so nothing but the manifest says whose a folder is."""
    (artefact / "manifest.json").unlink()
    if text is not None:
        (artefact / "manifest.json").write_bytes(text)
    check_both_refuse(program, artefact, "is not an artefact of tfmq_fx; choose another path or remove it first")


def check_both_refuse(program, path, words):
    before = files(path)
    said = []
    for use in (check_target, lambda path: tfmq_fx.save(program, path)):
        with pytest.raises(ArtefactError, match=words) as caught:
            use(path)
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0] and files(path) == before


def test_the_home_folder(program, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    check_target("~/made")
    assert tfmq_fx.save(program, "~/made") == tmp_path / "made"
    assert tfmq_fx.load("~/made")(*inputs()).equal(program(*inputs()))
    with pytest.raises(ArtefactError, match=f"there is no package at {tmp_path}"):
        tfmq_fx.load_denoiser("~/made.pt2")
    with pytest.raises(tfmq_fx.LoweringError, match=f"'{tmp_path}/made' does not end in"):
        tfmq_fx.lower(program, "aot", path=Path("~/made"))
    for use in (check_target, tfmq_fx.load, tfmq_fx.load_denoiser, lambda path: tfmq_fx.save(program, path)):
        with pytest.raises(ArtefactError, match="choose another path"):
            use("~nobody_of_this_name/made")


def test_an_unwritable_path_is_found_before_the_model_is_loaded(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    import tfmq_fx.data.bundled_model
    from tfmq_fx.cli.app import app

    def load_model(*_):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(tfmq_fx.data.bundled_model, "load_model", load_model)
    result = CliRunner().invoke(app, ["quantize", "--out", "/proc/nowhere/out"])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit | ArtefactError)
    assert "/proc/nowhere/out" in result.output + str(result.exception)


def test_a_program_loads_and_runs_in_a_spawned_process(saved, program, tmp_path):
    """A forked child of a process that used threads hangs in torch; a spawned one does not."""
    script = tmp_path / "spawn.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        import torch, tfmq_fx

        def work(path, sample, timestep):
            return tfmq_fx.load(path)(sample, timestep).tolist()

        if __name__ == "__main__":
            torch.set_num_threads(2)
            sample, timestep = torch.ones(2, 1, 4, 4), torch.tensor([0, 250])
            here = work(sys.argv[1], sample, timestep)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                assert pool.apply_async(work, (sys.argv[1], sample, timestep)).get(timeout=300) == here
            print("same")
        """)
    )
    done = subprocess.run([sys.executable, script, saved], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr
