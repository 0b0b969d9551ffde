import shutil

import pytest

import tfmq_fx
from tests.artefact.artefacts import inputs, tiny_program


@pytest.fixture(scope="session")
def program():
    return tiny_program()


@pytest.fixture(scope="session")
def saved(program, tmp_path_factory):
    return tfmq_fx.save(program, tmp_path_factory.mktemp("artefacts") / "saved")


@pytest.fixture(scope="session")
def wanted(program, saved):
    # Also what torch imports when it first loads a program is imported then.
    assert tfmq_fx.load(saved)(*inputs()).equal(program(*inputs()))
    return program(*inputs())


@pytest.fixture
def artefact(saved, wanted, tmp_path):
    return shutil.copytree(saved, tmp_path / "artefact")
