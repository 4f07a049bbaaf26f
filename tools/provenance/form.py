"""What of a piece of code can change a number: its syntax tree without layout, comments, annotations and messages.

A name of ours is written as the bare name of what it stands for, whatever the module is called and however it was
imported; what it stands for is noted beside. Written by hand and not by `ast.dump`, whose text differs between Pythons.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tools.provenance.scope import COMPREHENSIONS, FUNCTIONS, LOCAL, Scope, locals_of
from tools.provenance.tree import PACKAGES, Definition, Imported, Module, Tree, is_text

MESSAGES = ("print", "warn", "warning", "info", "debug")  # their words are no numbers
IGNORED = {"ctx", "kind", "type_comment", "type_ignores", "lineno", "annotation", "returns"}
COMMAND = re.compile(r"-m ([A-Za-z_]\w*(?:\.\w+)+)")
Target = Definition | Module


@dataclass
class Form:
    """The text of some code, what of ours it refers to (in the order of appearance), the settings that it names."""

    text: str = ""
    refers: list[Target] = field(default_factory=list)
    rows: set[str] = field(default_factory=set)


class Reader:
    """Reads statements of one module. keep_words: messages count as well, as in a notebook, which shows them."""

    def __init__(self, tree: Tree, module: Module, keep_words: bool = False):
        self.tree, self.module, self.keep_words = tree, module, keep_words
        self.scopes: list[Scope] = [module.names]
        self.form = Form()
        self.attributes: set[str] = set()
        self.in_message = self.in_settings = self.in_class = self.keep_annotations = False

    def read(self, *statements: ast.stmt) -> Form:
        self.form, self.attributes = Form(), set()
        self.form.text = " ".join(filter(None, map(self.node, statements)))
        if {"__file__", "executable"} <= self.attributes:  # it runs its own file
            self.refer(self.module)
        return self.form

    # --- names ------------------------------------------------------------------------------------------------------

    def bound(self, name: str) -> list[Definition | Imported] | None:
        """What a name stands for here: None for a local variable, [] for a builtin."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return []

    def resolve(self, target: Definition | Imported, seen: tuple = ()) -> Target | str:
        """Follow an import to a definition or module of ours; a library's name comes back as text."""
        if isinstance(target, Definition):
            return target
        dotted = f"{target.module}.{target.name}" if target.name else target.module
        if target.module.split(".")[0] not in PACKAGES:
            return dotted
        module = self.tree.module(target.module)
        if not target.name or target in seen:
            return module or dotted
        found = (module.names.get(target.name) if module else None) or []
        if found:
            return self.resolve(found[-1], (*seen, target))
        return self.tree.module(dotted) or module or dotted

    def value(self, node: ast.expr) -> Target | str | None:
        """What a name or a dotted name stands for; None where that is a variable or a computed value."""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            bound = self.bound(node.id)
            if bound:
                for other in bound[:-1]:
                    self.refer(self.resolve(other))
                return self.resolve(bound[-1])
        elif isinstance(node, ast.Attribute):
            base = self.value(node.value)
            if isinstance(base, Module):
                return self.resolve(Imported(base.name, node.attr))
            if isinstance(base, str):
                return f"{base}.{node.attr}"
        return None

    def refer(self, target: Target | str | None) -> None:
        if isinstance(target, Definition | Module):
            self.form.refers.append(target)

    # --- text -------------------------------------------------------------------------------------------------------

    def node(self, node) -> str:
        if isinstance(node, list):
            return "[" + " ".join(filter(None, map(self.node, node))) + "]" if node else ""
        if not isinstance(node, ast.AST):
            return repr(node)
        special = getattr(self, f"read_{type(node).__name__}", None)
        return special(node) if special else self.plain(node)

    def plain(self, node: ast.AST) -> str:
        fields = {name: self.node(value) for name, value in self.fields(node) if value is not None}
        return f"({type(node).__name__} " + " ".join(f"{k}={v}" for k, v in fields.items() if v) + ")"

    def fields(self, node: ast.AST) -> Iterator[tuple[str, object]]:
        for name, value in ast.iter_fields(node):
            if name not in IGNORED or (name in ("annotation", "returns") and self.keep_annotations):
                yield name, value

    def read_Expr(self, node: ast.Expr) -> str:
        return "" if is_text(node) else self.plain(node)

    def read_Pass(self, node: ast.Pass) -> str:
        return ""

    def read_AnnAssign(self, node: ast.AnnAssign) -> str:
        if self.in_class:
            return self.plain(node)  # a field of a dataclass, where the plain assignment is none
        assignment = ast.Assign(targets=[node.target], value=node.value)
        return self.plain(assignment) if node.value else ""

    def read_Global(self, node: ast.Global) -> str:
        for name in node.names:
            for target in self.bound(name) or []:
                self.refer(self.resolve(target))
        return self.plain(node)

    def read_Name(self, node: ast.Name) -> str:
        self.attributes.add(node.id)
        return self.reference(node) or node.id

    def read_Attribute(self, node: ast.Attribute) -> str:
        self.attributes.add(node.attr)
        known = self.reference(node)
        if known:
            return known
        owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
        if owner == "settings" or (owner == "self" and self.in_settings):
            self.form.rows.add(node.attr)
        return f"{self.node(node.value)}.{node.attr}"

    def reference(self, node: ast.expr) -> str:
        target = self.value(node)
        self.refer(target)
        if isinstance(target, Definition):
            return f"@{target.name}"
        return "@module" if isinstance(target, Module) else target or ""

    def read_Import(self, node: ast.Import | ast.ImportFrom) -> str:
        return ""  # a name that it binds is replaced by what it stands for

    read_ImportFrom = read_Import

    def read_Constant(self, node: ast.Constant) -> str:
        if not isinstance(node.value, str):
            return repr(node.value)
        if self.in_message and not self.keep_words:
            return ""
        beside = self.tree.beside(self.module, node.value) if "." in node.value else None
        started = [self.tree.module(name) for name in self.commands(node.value)]
        for target in [beside, *started]:
            if target:
                self.refer(target)
                return "@file"
        return repr(node.value)

    def commands(self, text: str) -> list[str]:
        """Dotted names that a string is, or that it hands to `python -m`; what a message says is no command."""
        whole = [text] if text.replace(".", "").isidentifier() else []
        return [] if self.in_message else whole + COMMAND.findall(text)

    def read_JoinedStr(self, node: ast.JoinedStr) -> str:
        return "(f " + " ".join(self.node(v) for v in node.values if getattr(v, "value", None) != "") + ")"

    def message(self, *nodes: ast.AST | None) -> str:
        before, self.in_message = self.in_message, True
        text = " ".join(self.node(node) for node in nodes if node)
        self.in_message = before
        return text

    def read_Raise(self, node: ast.Raise) -> str:
        return f"(Raise {self.message(node.exc, node.cause)})"

    def read_Assert(self, node: ast.Assert) -> str:
        return f"(Assert {self.node(node.test)} {self.message(node.msg)})"

    def read_Call(self, node: ast.Call) -> str:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if (
            name in ("getattr", "vars", "asdict")
            and getattr(node.args[0] if node.args else None, "id", "") == "settings"
        ):
            constant = name == "getattr" and isinstance(node.args[1], ast.Constant)
            self.form.rows.add(node.args[1].value if constant else "*")
        return self.message_call(node) if name in MESSAGES else self.plain(node)

    def message_call(self, node: ast.Call) -> str:
        return f"(Call {self.node(node.func)} {self.message(*node.args, *node.keywords)})"

    # --- scopes -----------------------------------------------------------------------------------------------------

    def scoped(self, node: ast.AST, scope: Scope) -> str:
        self.scopes.append(scope)
        text = self.plain(node)
        self.scopes.pop()
        return text

    def read_function(self, node: FUNCTIONS) -> str:
        before = self.keep_annotations, self.in_class
        self.keep_annotations = any(self.registered(d) for d in getattr(node, "decorator_list", []))
        self.in_class = False
        text = self.scoped(node, locals_of(node))
        self.keep_annotations, self.in_class = before
        return text

    read_FunctionDef = read_AsyncFunctionDef = read_Lambda = read_function

    def registered(self, decorator: ast.expr) -> bool:
        """A decorator that is no library's (`@app.post` of a local `app`) may read the annotations."""
        while isinstance(decorator, ast.Call | ast.Attribute):
            decorator = decorator.func if isinstance(decorator, ast.Call) else decorator.value
        bound = self.bound(getattr(decorator, "id", ""))
        return bound is LOCAL or any(isinstance(self.resolve(b), Definition | Module) for b in bound)

    def read_comprehension_like(self, node: COMPREHENSIONS) -> str:
        names = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        return self.scoped(node, dict.fromkeys(names, LOCAL))

    read_ListComp = read_SetComp = read_DictComp = read_GeneratorExp = read_comprehension_like

    def read_ClassDef(self, node: ast.ClassDef) -> str:
        before = self.in_settings, self.keep_annotations, self.in_class
        self.in_settings, self.in_class = node.name == "Settings", True
        self.keep_annotations = bool(node.bases)  # pydantic, NamedTuple and TypedDict read them
        text = self.plain(node)
        self.in_settings, self.keep_annotations, self.in_class = before
        return text
