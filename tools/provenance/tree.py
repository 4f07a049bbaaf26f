"""The course's own code, cut into definitions: what a name of a module stands for, wherever the definition stands."""

import ast
import hashlib
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGES = ("common", "benchmarks", "tools")
NUMBERS = "profiles.toml"  # its rows count one by one, where the code names them


@dataclass(frozen=True)
class Imported:
    """What an import binds a name to: a module, or a name in it."""

    module: str
    name: str = ""


@dataclass(eq=False)
class Definition:
    """A statement of a module that binds names, or that does something when the module is imported."""

    module: "Module"
    name: str
    statement: ast.stmt | None  # None for a file that is no Python
    content: str = ""  # digest of such a file

    def __str__(self) -> str:
        return f"{self.module.name}.{self.name}"


@dataclass(eq=False)
class Module:
    """A module: its definitions by name, and what its import does besides."""

    name: str
    file: Path
    package: bool
    definitions: list[Definition] = field(default_factory=list)
    names: dict[str, list[Definition | Imported]] = field(default_factory=dict)
    effects: list[Definition] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)  # modules that its import runs, as far as they may be ours

    def add_import(self, statement: ast.Import | ast.ImportFrom) -> None:
        for name, target in imports(statement, self).items():
            self.bind(name, target)
            self.imports |= {target.module, f"{target.module}.{target.name}"}
        if isinstance(statement, ast.Import):
            self.imports |= {alias.name for alias in statement.names}

    def bind(self, name: str, target: Definition | Imported) -> None:
        self.names.setdefault(name, []).append(target)


class Tree:
    """A checkout of the repository, read as needed. Reading follows `PACKAGES` only; everything else is a library."""

    NOWHERE = Path("notebook")  # the "file" of a notebook's cells

    def __init__(self, root: Path):
        self.root = root
        self.forms: dict = {}  # Definition → what it says (`tools.provenance.form`), read once
        self.digests: dict = {}  # Definition or Module → digest of that, without what it refers to
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """A module of our packages by its dotted name; None where there is no such file."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> Module | None:
        if name.split(".")[0] not in PACKAGES:
            return None
        path = self.root.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file():
            return None
        module = Module(name, file, path.is_dir())
        for statement in ast.parse(file.read_text(encoding="utf-8"), filename=str(file)).body:
            _add(module, statement)
        return module

    def beside(self, module: Module, name: str) -> "Module | Definition | None":
        """A file that stands in the same folder as `module`: a module, or another file's content."""
        if module.file is self.NOWHERE or name == NUMBERS or not name.replace(".", "").replace("_", "").isalnum():
            return None
        file = module.file.with_name(name)
        if not file.is_file():
            return None
        if file.suffix == ".py":
            return self.module(".".join(file.with_suffix("").relative_to(self.root).parts))
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        return Definition(module, name, None, content)

    @cached_property
    def _rows(self) -> dict[str, dict]:
        (file,) = (self.root / "common").rglob(NUMBERS)
        return tomllib.loads(file.read_text(encoding="utf-8"))

    def numbers(self, lab: str, profile: str) -> dict:
        """Name → value of a lab's rows of `profiles.toml` at a profile."""
        rows = self._rows["shared"] | self._rows[lab]
        return {name: row.get("all", row.get(profile)) for name, row in rows.items()}


def imports(statement: ast.Import | ast.ImportFrom, module: Module | None = None) -> dict[str, Imported]:
    """Name → what it is bound to, for an import statement (of `module`, where it is a relative one)."""
    if isinstance(statement, ast.Import):
        return {
            alias.asname or alias.name.split(".")[0]: Imported(alias.name if alias.asname else alias.name.split(".")[0])
            for alias in statement.names
        }
    source = statement.module or ""
    if statement.level and module:
        parts = module.name.split(".")
        parts = parts[: len(parts) - statement.level + module.package]
        source = ".".join([*parts, *([source] if source else [])])
    return {alias.asname or alias.name: Imported(source, alias.name) for alias in statement.names}


def is_text(statement: ast.stmt) -> bool:
    """A docstring, or a string that stands alone."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "'__main__'" in ast.dump(statement.test)


def _targets(statement: ast.stmt) -> list[str]:
    """Names that a statement binds; [] where it does something else."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = [t for target in statement.targets for t in getattr(target, "elts", [target])]
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return []
    return [t.id for t in targets] if all(isinstance(t, ast.Name) for t in targets) else []


def _registers(statement: ast.stmt, module: Module) -> bool:
    """A decorator of our own or of an object of this module (`@app.get`) may put the function into a table."""
    for decorator in getattr(statement, "decorator_list", []):
        root = decorator
        while isinstance(root, ast.Call | ast.Attribute):
            root = root.func if isinstance(root, ast.Call) else root.value
        bound = module.names.get(getattr(root, "id", ""), [])
        if any(isinstance(b, Definition) or b.module.split(".")[0] in PACKAGES for b in bound):
            return True
    return False


def _add(module: Module, statement: ast.stmt) -> None:
    if is_text(statement) or isinstance(statement, ast.Pass):
        return
    if isinstance(statement, ast.Import | ast.ImportFrom):
        module.add_import(statement)
        return
    names = _targets(statement)
    number = len(module.effects) + 1
    definition = Definition(module, " ".join(names) or f"<{type(statement).__name__.lower()} {number}>", statement)
    module.definitions.append(definition)
    if not names and not _is_main(statement):  # if, try, with, a call: it runs at import and may bind names
        names = list(_bound_within(statement))
        for node in ast.walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module.add_import(node)
        module.effects.append(definition)
    elif _registers(statement, module):
        module.effects.append(definition)
    for name in names:
        module.bind(name, Definition(module, name, statement))


def _bound_within(statement: ast.stmt) -> set[str]:
    """Names of functions, classes and variables that a compound statement binds."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found
