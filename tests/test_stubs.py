"""The public names, and the stubs of the compiled module: both say what is there."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lorameta_rs
from lorameta_rs import _core

STUBS = Path(lorameta_rs.__file__).with_name("_core.pyi")


def stubs():
    tree = ast.parse(STUBS.read_text(encoding="utf-8"))
    return {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def public(module):
    return {name for name in vars(module) if not name.startswith("_")}


def test_the_stubs_have_the_names_of_the_core():
    assert stubs().keys() == public(_core)


@pytest.mark.parametrize("name", [n for n, s in stubs().items() if isinstance(s, ast.ClassDef)])
def test_the_stubs_have_the_attributes_of_each_class(name):
    stub, there = stubs()[name], getattr(_core, name)
    said = {one.name for one in stub.body if isinstance(one, ast.FunctionDef)}
    assert {one for one in said if not one.startswith("__")} == public(there)
    for method in said - public(there):
        assert getattr(there, method) is not getattr(object, method)
    assert ast.get_docstring(stub)


@pytest.mark.parametrize("name", [n for n, s in stubs().items() if isinstance(s, ast.FunctionDef)])
def test_the_stubs_have_the_parameters_of_each_function(name):
    arguments = stubs()[name].args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    said = [
        (one.arg, False, default) for one, default in zip(arguments.args, defaults, strict=True)
    ]
    said += [
        (one.arg, True, default)
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    there = inspect.signature(getattr(_core, name)).parameters.values()
    assert [
        (one, keyword, inspect.Parameter.empty if default is None else ast.literal_eval(default))
        for one, keyword, default in said
    ] == [(one.name, one.kind is one.KEYWORD_ONLY, one.default) for one in there]


def test_every_public_name_is_there():
    for name in lorameta_rs.__all__:
        assert getattr(lorameta_rs, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'merge_all'"):
        _ = lorameta_rs.merge_all


def test_the_names_for_the_type_checker_are_those_that_are_there():
    tree = ast.parse(Path(lorameta_rs.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    said = {(name.name, one.module.rpartition(".")[2]) for one in block.body for name in one.names}
    assert said == set(lorameta_rs._MODULES.items())


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, lorameta_rs;"
        "print({'numpy', 'tokenizers', 'safetensors', 'lorameta_rs._core'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")
