"""Imports without what DeepSpeed brings and nobody uses, and that it is there again afterwards."""

from __future__ import annotations

import gc
import importlib
import sys

import pytest

from launcher.imports import quick_imports


def test_mlflow_cannot_be_imported_meanwhile_and_can_be_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "mlflow.py").write_text("here = True\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with quick_imports():
        assert not gc.isenabled()
        with pytest.raises(ImportError):
            importlib.import_module("mlflow")
    assert gc.isenabled()
    assert importlib.import_module("mlflow").here


def test_an_mlflow_that_is_imported_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = object()
    monkeypatch.setitem(sys.modules, "mlflow", there)  # type: ignore[arg-type]
    with quick_imports():
        assert sys.modules["mlflow"] is there
    assert sys.modules["mlflow"] is there
