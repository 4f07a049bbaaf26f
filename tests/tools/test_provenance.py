"""Fingerprints: every kind of edit planted in a copy of the code, and which recordings it stales; the ledger."""

import shutil
import textwrap
import warnings

import nbformat
import pytest

from common.course.settings import CHAPTER, ROOT
from tools.provenance import ledger
from tools.provenance.fingerprint import SCRIPTS, changed_cells, changes, find_notebook, parts, script_parts, stamp
from tools.provenance.tree import Tree

FILES = {
    "common/__init__.py": "",
    "common/profiles.toml": """
        [shared]
        seed = { all = 0, doc = "" }
        [pruning]
        sparsity = { cpu = 0.5, gpu = 0.5, smoke = 0.5, doc = "" }
        nsamples = { cpu = 8, gpu = 64, smoke = 2, doc = "" }
        """,
    "common/maths.py": '''
        """Two scores."""
        import math
        from dataclasses import dataclass

        from common import tables

        EPSILON = 1e-6  # never zero
        UNUSED = 3
        METHODS = {"plain": lambda x: x, "root": None}


        def score(x: float, scale: float = 2.0) -> float:
            """A score."""
            if x < 0:
                raise ValueError(f"{x} is negative")
            return math.sqrt(x) * scale + EPSILON


        def other(x):
            print("other", x)
            return tables.lookup(x)


        @dataclass(frozen=True)
        class Config:
            """Options."""

            bits: int = 4
            group: int = 64

            def label(self) -> str:
                return f"w{self.bits}"


        def use(config: Config):
            return METHODS["plain"](score(config.bits))
        ''',
    "common/tables.py": """
        def lookup(x):
            return x + 1


        def neighbour(x):
            return x - 1
        """,
    "common/server/__init__.py": "",
    "common/server/__main__.py": """
        from common.server.engine import step

        if __name__ == "__main__":
            print(step(1))
        """,
    "common/server/engine.py": """
        import sys


        def step(x):
            return x * 2


        def start():
            return [sys.executable, "-m", "common.server", "--port", "1"]
        """,
}


class Copy:
    """A small course in a temporary folder, to plant edits in."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in FILES.items():
            self.write(name, textwrap.dedent(text).lstrip())

    def write(self, name, text):
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def edit(self, name, old, new):
        text = (self.folder / name).read_text(encoding="utf-8")
        assert old in text, old
        self.write(name, text.replace(old, new))

    def parts(self, *cells, profile="cpu"):
        return parts(notebook(*cells), "pruning", profile, Tree(self.folder))


def notebook(*sources):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


@pytest.fixture
def course(tmp_path):
    return Copy(tmp_path)


SCORE = "from common.maths import score\nscore(2.0)"
USE = "from common.maths import Config, use\nuse(Config(bits=settings.nsamples))"
OTHER = "from common import maths\nmaths.other(1)"
START = "from common.server.engine import start\nstart()"
CELLS = {"score": SCORE, "use": USE, "other": OTHER, "start": START}
MATHS, ENGINE = "common/maths.py", "common/server/engine.py"

NOTHING = {
    "a comment": (MATHS, "  # never zero", "  # larger than zero\n# why"),
    "a docstring": (MATHS, '"""A score."""', '"""Another sentence."""'),
    "a docstring less": (MATHS, '    """A score."""\n', ""),
    "a wrapped line": (
        MATHS,
        "return math.sqrt(x) * scale + EPSILON",
        "return (\n        math.sqrt(x)*scale\n + EPSILON)",
    ),
    "annotations": (MATHS, "x: float, scale: float = 2.0) -> float", "x: int, scale=2.0)"),
    "an exception's words": (MATHS, "is negative", "must not be negative"),
    "a print's words": (MATHS, '"other"', '"another"'),
    "an unused constant": (MATHS, "UNUSED = 3", "UNUSED = 4"),
    "an unused function": ("common/tables.py", "x - 1", "x - 2"),
    "a new function": ("common/tables.py", "def neighbour", "def third():\n    return 3\n\n\ndef neighbour"),
    "a number's explanation": ("common/profiles.toml", 'doc = ""', 'doc = "what it means"'),
    "another profile's number": ("common/profiles.toml", "gpu = 64", "gpu = 128"),
    "a number that nobody names": ("common/profiles.toml", "cpu = 0.5", "cpu = 0.6"),
}
SOMETHING = {
    "a constant on the path": (MATHS, "1e-6", "1e-5", {"score", "use"}),
    "a function's code": (MATHS, "* scale +", "* scale -", {"score", "use"}),
    "a default": (MATHS, "scale: float = 2.0", "scale: float = 3.0", {"score", "use"}),
    "a condition": (MATHS, "x < 0", "x <= 0", {"score", "use"}),
    "the type of an exception": (MATHS, "ValueError", "TypeError", {"score", "use"}),
    "a field of a class": (MATHS, "group: int = 64", "group: int = 32", {"use"}),
    "a method that is called on an object": (MATHS, 'f"w{self.bits}"', 'f"b{self.bits}"', {"use"}),
    "a decorator": (MATHS, "@dataclass(frozen=True)", "@dataclass", {"use"}),
    "a table of functions": (MATHS, "lambda x: x,", "lambda x: 2 * x,", {"use"}),
    "a function two modules away": ("common/tables.py", "x + 1", "x + 2", {"other"}),
    "another library": (MATHS, "import math\n", "import numpy as math\n", {"score", "use"}),
    "what runs at import": (MATHS, "UNUSED = 3", "METHODS.clear()", {"score", "use", "other"}),
    "what a command starts": (ENGINE, "x * 2", "x * 3", {"start"}),
    "a number that a cell names": ("common/profiles.toml", "cpu = 8", "cpu = 16", {"use"}),
}


@pytest.mark.parametrize("edit", NOTHING.values(), ids=NOTHING)
def test_what_can_change_no_number_stales_nothing(course, edit):
    before = {name: course.parts(cell) for name, cell in CELLS.items()}
    course.edit(*edit)
    for name, cell in CELLS.items():
        assert changes(before[name], course.parts(cell)) == []
        assert course.parts(cell)["code"] == before[name]["code"]


@pytest.mark.parametrize("edit", SOMETHING.values(), ids=SOMETHING)
def test_an_edit_stales_exactly_what_uses_it(course, edit):
    before = {name: course.parts(cell)["code"] for name, cell in CELLS.items()}
    course.edit(*edit[:3])
    assert {name for name, cell in CELLS.items() if course.parts(cell)["code"] != before[name]} == edit[3]


def test_moving_a_function_or_renaming_its_module_stales_nothing(course):
    before = {name: course.parts(cell) for name, cell in CELLS.items()}
    course.edit(MATHS, "EPSILON = 1e-6  # never zero\n", "from common.rooms.small import EPSILON\n")
    course.write("common/rooms/small.py", "EPSILON = 1e-6\n")
    course.write("common/rooms/__init__.py", "")
    (course.folder / MATHS).rename(course.folder / "common/rooms/sums.py")
    (course.folder / "common/server").rename(course.folder / "common/service")
    for file in (course.folder / "common/service").glob("*.py"):
        file.write_text(file.read_text(encoding="utf-8").replace("common.server", "common.service"), encoding="utf-8")
    moved = {
        "score": SCORE.replace("common.maths", "common.rooms.sums"),
        "use": "from common.rooms import sums as s\ns.use(s.Config(bits=settings.nsamples))",
        "other": "import common.rooms.sums\ncommon.rooms.sums.other(1)",
        "start": START.replace("common.server", "common.service"),
    }
    for name, cell in moved.items():
        assert changes(before[name], course.parts(cell)) == []
        assert course.parts(cell)["code"] == before[name]["code"]


def test_a_name_that_now_stands_for_something_else_is_noticed(course):
    """The same text in every definition, and other functions behind it."""
    course.write("common/a.py", "def f():\n    return 1\n")
    course.write("common/b.py", "def f():\n    return 2\n")
    cell = "from common import a, b\nprint({0}.f() - {1}.f())"
    before, after = course.parts(cell.format("a", "b")), course.parts(cell.format("b", "a"))
    assert changes(before, after) == [] and before["code"] != after["code"]


@pytest.mark.parametrize(
    "cell",
    [
        "from common.tables import *",
        "from common import tables\nprint(vars(tables))",
        "import common.tables as t\nf(t)",
    ],
)
def test_in_doubt_the_whole_module_counts(course, cell):
    before = course.parts(cell)["code"]
    course.edit("common/tables.py", "x - 1", "x - 2")
    assert course.parts(cell)["code"] != before


def test_a_command_in_a_string_is_followed_and_a_message_is_not(course):
    for cell in ("run('python -m common.server --port 1')", "run('common.server')"):
        assert "common.server.engine.step" in course.parts(cell)["definitions"]
    for cell in ("print('common.server')", "raise ValueError('python -m common.server')", "x = 'common.server is it'"):
        assert course.parts(cell)["definitions"] == {}


def test_a_local_variable_of_the_same_name_is_no_use(course):
    cell = "def f(score):\n    return score + 1\nf(1)"
    before = course.parts("from common.maths import score, other\nother(1)", cell)["definitions"]
    assert "common.maths.score" not in before
    hidden = "from common.maths import score\ndef f(score):\n    return [score for score in [1]]"
    assert course.parts(hidden)["definitions"] == {}


@pytest.mark.parametrize("reader", ["pydantic.BaseModel", "typing.NamedTuple"])
def test_annotations_count_where_a_library_reads_them(course, reader):
    module, name = reader.split(".")
    course.write("common/schemas.py", f"from {module} import {name}\n\n\nclass Request({name}):\n    tokens: int\n")
    cell = "from common.schemas import Request"
    before = course.parts(cell + "\nRequest(1)")["code"]
    course.edit("common/schemas.py", "int", "float")
    assert course.parts(cell + "\nRequest(1)")["code"] != before


def test_a_route_is_reached_and_so_is_what_its_annotations_name(course):
    course.write(
        "common/api.py",
        "from common.maths import Config\n\n\ndef create():\n    app = App()\n\n    @app.post('/')\n"
        "    def answer(config: Config):\n        return 1\n\n    return app\n",
    )
    assert "common.maths.Config" in course.parts("from common.api import create\ncreate()")["definitions"]


def test_a_function_that_registers_itself_is_reached(course):
    course.write("common/registry.py", "TABLE = {}\n\n\ndef register(f):\n    TABLE[f.__name__] = f\n    return f\n")
    course.write("common/plug.py", "from common.registry import register\n\n\n@register\ndef f():\n    return 1\n")
    course.write(
        "common/hub.py", "import common.plug\nfrom common.registry import TABLE\n\n\ndef run():\n    return TABLE\n"
    )
    before = course.parts("from common.hub import run\nrun()")["code"]
    course.edit("common/plug.py", "return 1", "return 2")
    assert course.parts("from common.hub import run\nrun()")["code"] != before


def test_a_file_beside_a_module_counts(course):
    course.write("common/kernel.cu", "a")
    course.write("common/gpu.py", "from pathlib import Path\nSOURCE = Path(__file__).with_name('kernel.cu')\n")
    before = course.parts("from common.gpu import SOURCE\nprint(SOURCE)")["code"]
    course.write("common/kernel.cu", "b")
    assert course.parts("from common.gpu import SOURCE\nprint(SOURCE)")["code"] != before


def test_a_module_that_runs_its_own_file_counts_whole(course):
    text = "import sys\n\n\ndef start():\n    return [sys.executable, __file__]\n\n\n"
    course.write("common/guard.py", text + "if __name__ == '__main__':\n    print(1)\n")
    before = course.parts("from common.guard import start\nstart()")["code"]
    course.edit("common/guard.py", "print(1)", "work(1)")
    assert course.parts("from common.guard import start\nstart()")["code"] != before


def test_cells_count_with_their_words_and_without_comments_parameters_and_text(course):
    book = notebook('PROFILE = "cpu"', "print('a')  # why", "x = 1")
    book.cells[0].metadata["tags"] = ["parameters"]
    before = parts(book, "pruning", "cpu", Tree(course.folder))
    book.cells[0].source, book.cells[1].source = 'PROFILE = "gpu"', "print(  'a')"
    book.cells.insert(1, nbformat.v4.new_markdown_cell("text"))
    assert parts(book, "pruning", "cpu", Tree(course.folder)) == before
    book.cells[2].source = "print('b')"  # what it shows is no longer what it prints
    assert changes(before, parts(book, "pruning", "cpu", Tree(course.folder))) == ["cell 1"]


def test_a_script_has_a_fingerprint_as_well(course):
    course.write("benchmarks/bench.py", "from common.maths import score\n\nprint(score(settings.nsamples))\n")
    found = script_parts("benchmarks.bench", "pruning", "cpu", Tree(course.folder))
    assert found["numbers"] == {"nsamples": 8} and "common.maths.EPSILON" in found["definitions"]


# --- the course's own code -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's packages in a temporary folder."""
    folder = tmp_path_factory.mktemp("repository")
    for package in ("common", "benchmarks", "tools"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def every_notebook(folder, rename=lambda text: text):
    """Notebook → what it depends on, with the notebooks of the repository and the packages in `folder`."""
    tree, found = Tree(folder), {}
    for file in sorted(CHAPTER.glob("Lab-*/0*.ipynb")):
        book = nbformat.read(file, as_version=4)
        for cell in book.cells:
            cell.source = rename(cell.source)
        found[f"{file.parent.name}/{file.stem}"] = parts(book, book.metadata.provenance.lab, "cpu", tree)
    return found


def codes(books):
    return {name: book["code"] for name, book in books.items()}


def test_another_layout_of_the_courses_packages_stales_nothing(copy, tmp_path):
    before = codes(every_notebook(copy))
    for package in ("common", "benchmarks"):
        shutil.copytree(copy / package, tmp_path / package)

    def rename(text):
        return text.replace("from common.methods", "from common.ways")

    (tmp_path / "common" / "methods").rename(tmp_path / "common" / "ways")
    for file in tmp_path.rglob("*.py"):
        file.write_text(rename(file.read_text(encoding="utf-8")), encoding="utf-8")
    assert codes(every_notebook(tmp_path, rename)) == before


EDITS = [  # what is edited: a definition or a number, its file, and the edit; the page GPU錄製.md shows some more
    ("common.methods.grid.SHRINK_STEPS", "common/methods/grid.py", "0.5, 26)", "0.5, 32)"),
    ("owl_span", "common/course/profiles.toml", '{ all = 0.04, doc = "OWL', '{ all = 0.08, doc = "OWL'),
]


def test_edits_of_the_courses_code_stale_exactly_what_uses_them(copy):
    before = every_notebook(copy)
    for what, name, old, new in EDITS:
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        (copy / name).write_text(text.replace(old, new), encoding="utf-8")
        after = every_notebook(copy)
        (copy / name).write_text(text, encoding="utf-8")
        uses = {book for book, found in before.items() if what in {*found["definitions"], *found["numbers"]}}
        assert 0 < len(uses) < len(before)
        assert {book for book in before if codes(before)[book] != codes(after)[book]} == uses


def test_settings_are_read_by_their_names():
    """What the fingerprint cannot see is not done: no code reads all settings, but to show them or to name a folder."""
    readers = [
        f for p in ("common", "benchmarks") for f in (ROOT / p).rglob("*.py") if "settings.values()" in f.read_text()
    ]
    assert {file.name for file in readers} <= {"environment.py", "bench.py", "students.py"}


# --- stamps and the ledger -------------------------------------------------------------------------------------------


def recorded(*sources):
    book = notebook(*sources)
    stamp(book, "pruning", "cpu", "CPU, 2 cores", "2026-11-29")
    return book


def test_a_stamped_notebook_is_fresh_until_its_code_changes():
    assert ledger.stale(notebook("x = 1")) == "it has no recorded run"
    book = recorded("x = 1", "y = 2")
    book.cells[0].outputs = [nbformat.v4.new_output("stream", text="1")]
    assert ledger.stale(book) == "" and changed_cells(book) == []
    book.cells[1].source = "y = 3"
    assert ledger.stale(book) == "changed since its outputs were recorded: cell 2" and changed_cells(book) == [2]


def test_a_change_is_accepted_by_its_two_fingerprints_in_one_step_or_two():
    book = recorded("x = 1")
    old = book.metadata.provenance["code"]
    book.cells[0].source = "x = 0 + 1"
    new = parts(book, "pruning", "cpu")["code"]

    def accepted(*steps):
        return ledger.Ledger([ledger.Accepted(old, new, "a reason", "a proof") for old, new in steps])

    assert ledger.stale(book, accepted((old, new))) == ""
    assert ledger.stale(book, accepted((old, "between"), ("between", new))) == ""
    assert ledger.stale(book, accepted((new, old))) != "" and ledger.stale(book, accepted((old, "another"))) != ""


def test_the_ledger_reads_what_it_writes_and_wants_reason_and_proof(tmp_path):
    file = tmp_path / "ledger.toml"
    entry = ledger.Waiting("gpu", "2026-11-30", 'a "reason"', ("pruning/02-Prune", "benchmark/bench"))
    written = ledger.Ledger([ledger.Accepted("a", "b", "理由", "a test")], [entry])
    ledger.save(written, file)
    assert ledger.load(file) == written
    assert written.reasons("pruning/02-Prune", "gpu") == ['a "reason"']
    assert written.reasons("pruning/02-Prune", "cpu") == []
    file.write_text('[[accepted]]\nold = "a"\nnew = "b"\nreason = "because"\n', encoding="utf-8")
    with pytest.raises(TypeError, match="proof"):
        ledger.load(file)


def test_what_was_recorded_since_leaves_the_ledger(tmp_path, monkeypatch):
    file, book = tmp_path / "ledger.toml", recorded("x = 1")
    monkeypatch.setattr(ledger, "find_notebook", lambda lab, name: tmp_path)
    monkeypatch.setattr(ledger, "read_notebook", lambda _: book)
    monkeypatch.setattr(ledger, "code_of", lambda *_: "now")
    waiting = [
        ledger.Waiting("cpu", "2026-11-29", "r", ("pruning/a",)),
        ledger.Waiting("cpu", "2026-11-30", "r", ("pruning/b",)),
    ]
    waiting.append(ledger.Waiting("gpu", "2026-11-29", "r", ("pruning/c", "pruning/d", "pruning/e")))
    ledger.save(ledger.Ledger([], waiting), file)
    record = {"lab": "pruning", "profile": "gpu", "date": "2026-11-29"}
    records = [record | {"notebook": "c", "code": "now"}, record | {"notebook": "d", "code": "then"}]
    assert ledger.settle(records, file) == ["pruning/a (cpu)", "pruning/c (gpu)"]
    assert [entry.what for entry in ledger.load(file).waiting] == [("pruning/b",), ("pruning/d", "pruning/e")]


def test_what_waits_exists_and_is_said():
    entries = ledger.load()
    for entry in entries.waiting:
        for lab, _, name in (what.partition("/") for what in entry.what):
            assert lab in SCRIPTS or find_notebook(lab, name), name
            assert entry.reason and entry.profile in ("cpu", "gpu")
    for line in ledger.report(entries):
        warnings.warn(line, stacklevel=1)
