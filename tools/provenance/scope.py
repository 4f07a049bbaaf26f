"""The names that a function binds: they are its own, and stand for nothing outside it."""

import ast

from tools.provenance.tree import Definition, Imported, imports

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
LOCAL = None

Scope = dict[str, list[Definition | Imported] | None]


def locals_of(function: FUNCTIONS) -> Scope:
    """Names that a function binds: arguments, assignments, imports; those of functions within it are theirs."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    scope: Scope = {argument.arg: LOCAL for argument in every if argument}
    waiting = list(function.body) if isinstance(function.body, list) else []
    elsewhere: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            scope |= {name: [target] for name, target in imports(node).items()}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope[node.name] = LOCAL
        elif isinstance(node, ast.Global | ast.Nonlocal):
            elsewhere |= set(node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            scope.setdefault(node.id, LOCAL)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            scope[node.name] = LOCAL
        if not isinstance(node, FUNCTIONS | ast.ClassDef | COMPREHENSIONS):
            waiting += ast.iter_child_nodes(node)
    return {name: bound for name, bound in scope.items() if name not in elsewhere}
