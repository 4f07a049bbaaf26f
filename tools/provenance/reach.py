"""Everything of ours that a piece of code reaches, and what it amounts to."""

import ast
import hashlib
from collections.abc import Iterable

import nbformat

from tools.provenance.form import Form, Reader, Target
from tools.provenance.tree import Definition, Module, Tree

SKIPPED = {"parameters", "injected-parameters"}  # tags; the provenance names the profile


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Reached:
    """Definitions that code refers to, directly or through one another, with the imports' effects of their modules."""

    def __init__(self, tree: Tree):
        self.tree = tree
        self.definitions: set[Definition] = set()
        self.modules: set[Module] = set()
        self.rows: set[str] = set()

    def follow(self, targets: Iterable[Target]) -> None:
        waiting = list(targets)
        while waiting:
            target = waiting.pop()
            if isinstance(target, Module):
                waiting += self.whole(target)
            elif target not in self.definitions:
                self.definitions.add(target)
                form = self.form(target)
                self.rows |= form.rows
                waiting += [*form.refers, *self.imported(target.module)]

    def form(self, definition: Definition) -> Form:
        if definition not in self.tree.forms:
            reader = Reader(self.tree, definition.module)
            self.tree.forms[definition] = (
                reader.read(definition.statement) if definition.statement else Form(text=definition.content)
            )
        return self.tree.forms[definition]

    def whole(self, module: Module) -> list[Definition]:
        """All of a module; of a package that is run (`python -m`) its `__main__` as well."""
        main = self.tree.module(f"{module.name}.__main__") if module.package else None
        return [*module.definitions, *(main.definitions if main else [])]

    def imported(self, module: Module) -> list[Target]:
        """What importing a module does: its effects, and those of the modules that it imports."""
        found, waiting = [], [module]
        while waiting:
            module = waiting.pop()
            if module in self.modules:
                continue
            self.modules.add(module)
            found += module.effects
            named = [self.tree.module(name) for name in module.imports]
            waiting += [source for source in named if source]
            stars = [self.tree.module(bound.module) for bound in module.names.get("*", [])]
            found += [source for source in stars if source]
            parent = self.tree.module(module.name.rpartition(".")[0])
            waiting += [parent] if parent else []
        return found

    def own(self, target: Target) -> str:
        """Digest of what a target is, without what it refers to."""
        if target not in self.tree.digests:
            whole = sorted(map(self.own, self.whole(target))) if isinstance(target, Module) else []
            self.tree.digests[target] = digest(
                " ".join(whole) if isinstance(target, Module) else self.form(target).text
            )
        return self.tree.digests[target]

    def line(self, form: Form) -> str:
        """Digest of a form with what each of its names stands for."""
        return digest(form.text + "".join(f" →{self.own(target)}" for target in form.refers))

    def digests(self) -> dict[str, str]:
        """Name → digest of its own code, for every definition that was reached."""
        return {str(definition): self.own(definition) for definition in self.definitions}


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells whose code counts."""
    return [
        cell for cell in notebook.cells if cell.cell_type == "code" and not SKIPPED & set(cell.metadata.get("tags", []))
    ]


def cell_module(cells: list[nbformat.NotebookNode]) -> tuple[Module, list[list[ast.stmt]]]:
    """A notebook as a module whose names are what its cells import, and the statements of each cell."""
    module = Module("notebook", Tree.NOWHERE, package=False)
    bodies = [ast.parse(cell.source).body for cell in cells]
    for statement in [s for body in bodies for s in body]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module.add_import(node)
    return module, bodies
