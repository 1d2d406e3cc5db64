"`python -m updetr`: what there is, and which function a word calls; the functions are notebook 59's."
import runpy
import sys
from importlib import import_module

import pytest

from conftest import ROOT


def run(monkeypatch, *words):
    "Do what `python -m updetr` does with some words, in this process; its names."
    monkeypatch.setattr(sys, 'argv', ['updetr', *words])
    return runpy.run_path(str(ROOT/'updetr'/'__main__.py'))


def test_help_lists_every_command_and_each_is_there(monkeypatch, capfd):
    for words in ((), ('--help',), ('-h',)):
        commands = run(monkeypatch, *words)['COMMANDS']
        shown = capfd.readouterr().out
        assert '--cfg' in shown and all(name in shown for name in commands)
    for place, about in commands.values():
        module, function = place.split(':')
        assert callable(getattr(import_module(module), function)) and about


def test_words_that_are_no_command(monkeypatch, capfd):
    with pytest.raises(SystemExit, match="no command 'train'"): run(monkeypatch, 'train')
    # the trainer's own parser answers, as it does for a launch
    with pytest.raises(SystemExit): run(monkeypatch, '--cgf', 'cfg.json')
    assert '--cfg' in capfd.readouterr().err
    with pytest.raises(FileNotFoundError): run(monkeypatch, '--cfg', 'nowhere/cfg.json')
