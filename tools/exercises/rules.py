"""What an answer's cell may not hold, found by reading it: told by name before anything runs.

This keeps honest people honest. What really guards the marks is that checks run in a process that never runs a line of
the student's (`tools.exercises.sandbox`).
"""

import ast

MODULES = {"collections", "functools", "itertools", "math", "numpy", "torch", "triton", "typing"}
OURS = {"common", "tools", "benchmarks"}
CALLS = {
    *("exit", "quit", "open", "exec", "eval", "compile", "input", "breakpoint", "globals", "vars", "setattr"),
    *("delattr", "__import__"),
}
INSIDES = {  # through these a function reaches what it was not given
    *("__globals__", "__builtins__", "__class__", "__bases__", "__mro__", "__subclasses__", "__dict__", "__code__"),
    *("__closure__", "__loader__", "__spec__", "__reduce__", "__reduce_ex__", "__setattr__", "__getattribute__"),
}
ATTRIBUTES = {"grad", "requires_grad", "data"}  # those of a tensor that a training loop may set


def broken(source: str, without: list[str] = ()) -> str:
    """The first rule that a cell breaks, as a sentence; "" where it keeps them all.

    without: names that this answer may not use, since they are the answer.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return f"The cell is not Python: {error.msg}, line {error.lineno}."
    foreign = set(without) - _own(tree)
    for node in ast.walk(tree):
        if said := _imports(node) or _calls(node) or _changes(node) or _uses(node, without, foreign):
            return said
    return ""


def _own(tree: ast.AST) -> set[str]:
    """Names that a cell gives to what is its own: variables, parameters, functions."""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {
        node.arg if isinstance(node, ast.arg) else node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.arg | ast.FunctionDef)
    }


def _imports(node: ast.AST) -> str:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or "."]
    for name in names:
        package = name.split(".")[0]
        if package in OURS:
            return f"The cell imports {name}: the answer is to be written by hand, not taken from the course's code."
        if package not in MODULES:
            return f"The cell imports {name}; allowed are {', '.join(sorted(MODULES))}."
    return ""


def _calls(node: ast.AST) -> str:
    if isinstance(node, ast.Name) and node.id in CALLS:
        return f"The cell uses {node.id}(), which no answer needs."
    if isinstance(node, ast.Raise) and "SystemExit" in ast.dump(node):
        return "The cell ends the program (SystemExit), which no answer needs."
    return ""


def _changes(node: ast.AST) -> str:
    name = _replaced(node)
    return f"The cell replaces {name}: it may change nothing but its own variables." if name else ""


def replaced(source: str) -> list[str]:
    """What a cell replaces that others use too, such as `torch.allclose`; [] where it is not Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    return sorted({name for node in ast.walk(tree) if (name := _replaced(node))})


def _replaced(node: ast.AST) -> str:
    """The target of an assignment such as `torch.allclose = ...`; "" for any other node."""
    if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
        return ""
    targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
    for target in (part for whole in targets for part in ast.walk(whole)):
        stored = isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store | ast.Del)
        if stored and target.attr not in ATTRIBUTES and ast.unparse(target.value) != "self":
            return ast.unparse(target)
    return ""


def _uses(node: ast.AST, without: list[str], foreign: set[str]) -> str:
    """without: names that no module or tensor may be asked for; foreign: those of them that are not the cell's own."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    asked = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    asked |= {name} if isinstance(node, ast.Attribute) else {name} & foreign
    if banned := sorted(asked.intersection(without)):
        return f"The cell uses {banned[0]}, which is what this exercise is about: write it by hand."
    if name in INSIDES:
        return f"The cell uses {name}, which no answer needs."
    return ""
