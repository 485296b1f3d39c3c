"""Read docstrings and code out of installed packages without importing them.

Importing some twenty packages to ask them for `__doc__` takes minutes, runs their side effects and fails where an
optional dependency is missing. `ast.parse` needs the source text only, and gives the same docstrings in seconds on one
core. What it cannot see is documentation attached at run time; the two conventions that matter (NumPy's and SciPy's
`add_newdoc(..., "text")`, torch's `add_docstr(torch.abs, "text")`) are calls with a literal string and are read too.

Every text is cleaned on the way in: reStructuredText roles, section underlines, doctests and version notes say little
about the function and would let a model match documents by their markup.
"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

STANDARD_LIBRARY = "stdlib"
"""The name under which a list of packages asks for the standard library."""

DISTRIBUTION_OF = {"PIL": "pillow", "sklearn": "scikit-learn"}

_SKIPPED = """
tests test testing benchmarks _vendor vendored _vendored vendor externals extern third_party site-packages dist-packages
__pycache__ idlelib lib2to3 turtledemo ensurepip pydoc_data encodings msilib
"""
SKIPPED_FOLDERS = frozenset(_SKIPPED.split())
SKIPPED_PATHS = frozenset({"transformers/models", "scipy/_lib"})
"""transformers/models holds some 4,000 docstrings that are one template with another model's name; scipy/_lib is mostly
other people's packages."""
GENERATED = re.compile(r"(?i)automatically generated|auto-?generated|do not edit")

_SIGNATURE = re.compile(r"^[\w.]+\(.*\)\s*(->.*)?$|^[\w.]+\(.*\n--$", re.DOTALL)
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)*:`([^`]*)`")
_CROSS_REFERENCE = re.compile(r"\[`~?([^`]*)`\]|``([^`]*)``|`~?([^`<]*?)(?:\s*<[^`>]*>)?`_{0,2}")
_DROPPED_DIRECTIVE = re.compile(
    r"^\s*\.\. *(versionadded|versionchanged|versionmodified|deprecated|plot|image|figure|code-block|code|ipython|math|"
    r"include|autosummary|currentmodule|testsetup|testcode|testoutput|doctest|warning|jupyter-execute|_)"
)
_DIRECTIVE = re.compile(r"^\s*\.\. *[\w-]+::\s*")
_END_OF_PROSE = re.compile(r"^\s*(Examples?|References|See Also|See also|Doctests?)\s*:{0,2}\s*$")
_UNDERLINE = re.compile(r"^\s*([-=~^*#\"+])\1{2,}\s*$")
_SENTENCE_END = re.compile(r"(?<=[\w)\]'\"]{2})\.\s+(?=[A-Z])")
_PLACEHOLDER = re.compile(r"%\(\w+\)[sd]?|\{\w{3,}\}|\[\d+\]_")


@dataclass(frozen=True)
class SearchRoots:
    """Where packages are looked for: folders that hold packages, and the folder of the standard library."""

    site_packages: tuple[Path, ...]
    standard_library: Path | None

    @classmethod
    def of_this_interpreter(cls) -> SearchRoots:
        """The running interpreter's own folders; a project folder on `sys.path` is not one of them."""
        names = ("site-packages", "dist-packages")
        folders = (Path(entry) for entry in sys.path if Path(entry).name in names)
        return cls(tuple(dict.fromkeys(folders)), Path(os.__file__).parent)

    def find(self, package: str) -> Path | None:
        """The folder of one package, or None where it is not installed."""
        if package == STANDARD_LIBRARY:
            return self.standard_library
        candidates = (root / package for root in self.site_packages)
        return next((path for path in candidates if (path / "__init__.py").is_file()), None)

    def version(self, package: str) -> str:
        """The version in the package's metadata; without metadata a fingerprint that changes with its files."""
        if package == STANDARD_LIBRARY and self.standard_library == Path(os.__file__).parent:
            return ".".join(map(str, sys.version_info[:3]))
        name = DISTRIBUTION_OF.get(package, package)
        for distribution in metadata.distributions(name=name, path=[str(root) for root in self.site_packages]):
            return distribution.version
        files = [path.stat() for path in source_files(self.find(package) or Path(), package)]
        newest = max((file.st_mtime_ns for file in files), default=0)
        return f"files{len(files)}.{sum(file.st_size for file in files)}.{newest}"


@dataclass(frozen=True)
class Documented:
    """One documented function or class. `summary` and `body` are one line each; `code` keeps its lines, or is empty."""

    package: str
    module: str
    qualified_name: str
    summary: str
    body: str
    code: str

    @property
    def name(self) -> str:
        return self.qualified_name.rsplit(".", 1)[-1]

    @property
    def library(self) -> str:
        """The unit between which paraphrases are sought: each top-level module of the standard library is its own."""
        if self.package == STANDARD_LIBRARY:
            return f"{STANDARD_LIBRARY}.{self.module.split('.')[0]}"
        return self.package

    @property
    def is_public(self) -> bool:
        return not self.name.startswith("_")


def source_files(root: Path, package: str) -> Iterator[Path]:
    """Python files of a package in sorted order, without tests, vendored copies and generated folders."""
    for folder, subfolders, files in os.walk(root):
        where = Path(folder).relative_to(root)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in SKIPPED_FOLDERS and (Path(package) / where / name).as_posix() not in SKIPPED_PATHS
        )
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(("test_", "conftest")) and "testing" not in name:
                yield Path(folder) / name


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No cyclic garbage collection while syntax trees are built: it walks them over and over for nothing (20 %)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_paused()
def mine_package(root: Path, package: str) -> tuple[list[Documented], int]:
    """Everything documented in a package, and how many of its files could not be read."""
    found: list[Documented] = []
    unreadable = 0
    for path in source_files(root, package):
        try:
            source = path.read_text(encoding="utf-8")
            if GENERATED.search(source[:1500]) or not any(quotes in source for quotes in ('"""', "'''")):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's files
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            unreadable += 1
            continue
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        lines = source.splitlines()
        for name, docstring, node in _documented_nodes(tree, ""):
            summary, body = split_docstring(docstring)
            if summary:
                code = code_without_docstring(node, lines) if node is not None else ""
                found.append(Documented(package, module, name, summary, body, code))
    return found, unreadable


_Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _documented_nodes(parent: ast.AST, prefix: str) -> Iterator[tuple[str, str, _Node | None]]:
    """(qualified name, raw docstring, node) of a module's functions, classes and methods; not of nested functions."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, _Node):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and not (node.name.startswith("__") and node.name.endswith("__")):
                yield prefix + node.name, docstring, node
            if isinstance(node, ast.ClassDef):
                yield from _documented_nodes(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _documented_nodes(node, prefix)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _attached_docstring(node.value)


def _attached_docstring(call: ast.Call) -> Iterator[tuple[str, str, None]]:
    """The docstring that an `add_newdoc` or `add_docstr` call gives to a function written in C."""
    function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if function not in ("add_newdoc", "add_docstr") or len(call.args) < 2:
        return
    target = call.args[-2]
    if isinstance(target, ast.Constant) and isinstance(target.value, str):
        name = target.value
    else:
        name = getattr(target, "attr", "")
    docstring = _literal_text(call.args[-1])
    if name and docstring:
        yield name, docstring, None


def _literal_text(node: ast.expr) -> str:
    """The text of a string expression made of literals: plain, concatenated, or with `.format()` around it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        return _literal_text(node.left) + _literal_text(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _PLACEHOLDER.sub("", _literal_text(node.func.value))
    if isinstance(node, ast.Tuple) and node.elts:  # add_newdoc(place, class, (method, text))
        return _literal_text(node.elts[-1])
    return ""


def code_without_docstring(node: _Node, lines: Sequence[str]) -> str:
    """Source of a function, dedented, without its docstring and decorators; empty for classes and for stubs.

    Classes are left out because their text is mostly the docstrings of their methods, stubs (`pass`, `...`, `raise`)
    because there is nothing to find.
    """
    if isinstance(node, ast.ClassDef) or len(node.body) < 2:
        return ""
    docstring, rest = node.body[0], node.body[1:]
    if len(rest) == 1 and (isinstance(rest[0], ast.Pass | ast.Raise) or _is_ellipsis(rest[0])):
        return ""
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno or 0 : node.end_lineno]]
    if docstring.lineno == node.lineno:
        return ""
    return textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))


def _is_ellipsis(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def split_docstring(docstring: str) -> tuple[str, str]:
    """(summary, body) of a docstring, both cleaned and on one line; ("", "") where there is nothing to keep.

    The summary is the first sentence of the first paragraph that is not a signature; the body is all that follows up to
    the examples.
    """
    paragraphs = [p for p in re.split(r"\n\s*\n", inspect.cleandoc(docstring)) if p.strip()]
    while paragraphs and _SIGNATURE.match(paragraphs[0].strip()):
        paragraphs.pop(0)
    if not paragraphs or paragraphs[0].lstrip().startswith((".. ", ">>>")):
        return "", ""
    lines = paragraphs[0].splitlines()
    if _SIGNATURE.match(lines[0].strip()) or lines[0].strip() == "--":
        lines = lines[1:]
    lead = _one_line("\n".join(line for line in lines if not _UNDERLINE.match(line)))
    first, *more = _SENTENCE_END.split(lead, maxsplit=1)
    body = " ".join([*more, _one_line(_prose("\n\n".join(paragraphs[1:])))]).strip()
    return first.strip(" .:"), body


def _prose(text: str) -> str:
    """A docstring's lines without doctests, version notes, formulas, section headings; cut at the examples."""
    kept: list[str] = []
    dropped_indent: int | None = None
    in_doctest = False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if dropped_indent is not None:
            if not line.strip() or indent > dropped_indent:
                continue
            dropped_indent = None
        if _END_OF_PROSE.match(line):
            break
        if line.lstrip().startswith(">>>"):
            in_doctest = True
        elif not line.strip():
            in_doctest = False
        if _UNDERLINE.match(line):
            if kept and kept[-1].strip():
                kept.pop()  # the heading over it: "Parameters", "Returns", "Notes"
        elif _DROPPED_DIRECTIVE.match(line):
            dropped_indent = indent
        elif not in_doctest:
            kept.append(_DIRECTIVE.sub("", line))
    return "\n".join(kept)


def _one_line(text: str) -> str:
    """Text without markup, runs of white space made one space."""
    text = _ROLE.sub(lambda match: match[1].split("<")[0].lstrip("~!.").strip(), text)
    text = _CROSS_REFERENCE.sub(lambda match: match[1] or match[2] or match[3] or "", text)
    return re.sub(r"\s+", " ", _PLACEHOLDER.sub("", text).replace("**", "").replace("::", ":")).strip()
