"""The wheel's sources, read with two forms changed: device strings, and imports that may fail.

The changes are made on the syntax tree while a module is loaded, so no file is touched and byte code
on disk stays the original's.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

import torch

# What the wheel imports beyond easyedit_wise's own dependencies. Editing with FT, ROME or WISE runs
# no line of it, with two exceptions that a clear error answers: covariance statistics (ROME with
# mom2_adjustment, MEMIT) read `datasets`, and test_generation=True uses `nltk`.
OPTIONAL_PACKAGES = frozenset(
    {"PIL", "cv2", "fairscale", "iopath", "timm", "torchvision"}  # vision
    | {"datasets", "einops", "higher", "hydra", "omegaconf", "openai", "sentence_transformers"}
    | {"matplotlib", "nltk", "pandas", "requests", "scipy", "seaborn", "sklearn"}
)


class RewritingLoader(SourceFileLoader):
    """Loads one module of the wheel from its source, rewritten by ``rewrite``."""

    def get_code(self, fullname: str) -> Any:
        """The rewritten module's code. Byte code on disk is the original's: neither read nor written."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]  # typeshed differs by Python version
        """Compile the source after rewriting it."""
        return compile(rewrite(ast.parse(data, path)), path, "exec", dont_inherit=True, optimize=_optimize)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with the two names that rewritten code calls."""
        # The leading underscore keeps them out of the wheel's star imports.
        module.__dict__.update(_wise_device_string=device_string, _wise_stand_in=StandIn)
        super().exec_module(module)


def rewrite(tree: ast.Module) -> ast.Module:
    """Change two forms of a module's syntax tree in place, and nothing else.

    ``f"cuda:{x}"`` becomes ``_wise_device_string(x)``. An import of an optional package becomes that
    import in a ``try``, with stand-ins where it fails. Doing it here, and not with fake modules in
    ``sys.modules``, leaves ``import timm`` failing for everybody else: transformers and PEFT decide
    what they can do by such imports.
    """
    rewritten: ast.Module = ast.fix_missing_locations(_Rewriter().visit(tree))
    return rewritten


class _Rewriter(ast.NodeTransformer):
    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)
        match node.values:
            case [
                ast.Constant(value="cuda:"),
                ast.FormattedValue(value=device, conversion=-1, format_spec=None),
            ]:
                helper = ast.Name("_wise_device_string", ast.Load())
                return ast.copy_location(ast.Call(helper, [device], []), node)
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.AST]:
        statements: list[ast.AST] = []
        for alias in node.names:
            statement = ast.copy_location(ast.Import([alias]), node)
            if _is_optional(alias.name):
                # "import a.b" binds a, "import a.b as c" binds a.b
                bound = {alias.asname: alias.name} if alias.asname else {_root(alias.name): _root(alias.name)}
                statements.append(_tolerant(statement, bound))
            else:
                statements.append(statement)
        return statements

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.level or node.module is None or not _is_optional(node.module):
            return node
        return _tolerant(node, {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})


def _root(name: str) -> str:
    return name.partition(".")[0]


def _is_optional(name: str) -> bool:
    return _root(name) in OPTIONAL_PACKAGES


def _tolerant(statement: ast.stmt, bound: Mapping[str, str]) -> ast.AST:
    """The import statement in a ``try``; ``bound`` says what each name that it binds stands for."""
    fallback = "\n".join(f"    {name} = _wise_stand_in({path!r}, _wise_error)" for name, path in bound.items())
    # Exception, because a package that is there but broken raises what it likes:
    # torchvision built for another torch raises RuntimeError.
    template = ast.parse(f"try:\n    pass\nexcept Exception as _wise_error:\n{fallback}")
    attempt = template.body[0]
    if isinstance(attempt, ast.Try):
        attempt.body = [statement]
    for part in ast.walk(attempt):
        if part is not statement and hasattr(part, "lineno"):
            ast.copy_location(part, statement)
    return attempt


class StandIn:
    """Takes the place of something that the wheel imports and text editing never calls.

    Its attributes are stand-ins too; calling one is an ImportError that names the package.
    """

    def __init__(self, path: str, error: Exception | str) -> None:
        self._path = path
        self._error = error if isinstance(error, str) else f"{type(error).__name__}: {error}"

    def __getattr__(self, name: str) -> StandIn:
        # Python and its libraries probe objects for protocols (copying, pickling, numpy's
        # __array__) by such names: a stand-in has none of them.
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._path}.{name}", self._error)

    def __getitem__(self, key: object) -> StandIn:
        # Annotations such as Optional[...] are evaluated when the wheel is imported.
        return StandIn(f"{self._path}[...]", self._error)

    # Without this a loop over a stand-in would never end.
    __iter__ = None

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Always fails.

        Raises:
            ImportError: with the package's name and why it could not be imported.
        """
        raise ImportError(
            f"EasyEdit's wheel called {self._path}, which could not be imported ({self._error}). Editing "
            f"text with FT, ROME or WISE does not need it; to use this part of EasyEdit, install the package "
            f"that provides {_root(self._path)!r}."
        )

    def __repr__(self) -> str:
        return f"<stand-in for {self._path}>"


def device_string(device: int | str | torch.device | None) -> str:
    """The device that EasyEdit's ``hparams.device`` means, as a string for ``torch.device``.

    A number is a CUDA device where there is CUDA, otherwise the CPU (EasyEdit's YAML files all say
    ``device: 0``); a negative number is the CPU; None is CUDA where there is any. Names
    (``"cpu"``, ``"cuda:1"``, ``"mps"``) and ``torch.device`` objects are taken at their word.

    Raises:
        RuntimeError: a name that torch does not know.
        TypeError: any other type.
    """
    if isinstance(device, str) and device.lstrip("-").isdigit():
        device = int(device)
    if isinstance(device, torch.device | str):
        return str(torch.device(device))
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, int) and not isinstance(device, bool):
        return f"cuda:{device}" if device >= 0 and torch.cuda.is_available() else "cpu"
    raise TypeError(f"hparams.device must be a number, a name, a torch.device or None, not {device!r}")
