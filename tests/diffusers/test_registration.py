"""The finder that waits for diffusers leaves all other modules, and every other diffusers, alone."""

import importlib
import logging
import sys
import types

from tfmq_fx.diffusers import registration


def finders():
    return [finder for finder in sys.meta_path if type(finder).__name__ == "_Finder"]


def test_one_finder_stands_in_front_and_finds_one_module():
    (finder,) = finders()
    registration.announce()
    assert finders() == [finder]
    assert finder.find_spec("json", None) is None
    assert finder.find_spec("diffusers.quantizers", None) is None


def test_the_module_is_found_as_without_us(monkeypatch):
    import diffusers.quantizers

    (finder,) = finders()
    spec = finder.find_spec(registration.AUTO, diffusers.quantizers.__path__)
    assert type(spec.loader) is importlib.machinery.SourceFileLoader and spec.origin.endswith("auto.py")
    assert "AUTO_QUANTIZER_MAPPING" in spec.loader.get_source(registration.AUTO)


def test_a_module_that_is_not_there_is_not_found():
    (finder,) = finders()
    assert finder.find_spec(registration.AUTO, ["/nowhere"]) is None


def test_a_reload_of_the_mappings_is_registered_again():
    module = importlib.import_module(registration.AUTO)
    before = dict(vars(module))
    try:
        importlib.reload(module)
        assert module.AUTO_QUANTIZER_MAPPING is not before["AUTO_QUANTIZER_MAPPING"]
        assert registration.QUANT_METHOD in module.AUTO_QUANTIZER_MAPPING
    finally:
        vars(module).update(before)


def test_a_diffusers_without_mappings_is_left_alone(caplog):
    with caplog.at_level(logging.WARNING):
        registration.register(types.ModuleType(registration.AUTO))
    (record,) = caplog.records
    assert "models of tfmq_fx cannot be loaded" in record.getMessage()
