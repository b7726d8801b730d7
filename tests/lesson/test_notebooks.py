"""Lessons as files: found, executed, and read back, with small notebooks made here."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from course_lib.lesson import checks, notebooks
from support.notebooks_made_here import clean, code, markdown, notebook, write

PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n not really").decode()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one lesson that runs in a second."""
    write(tmp_path / "notebooks" / "07_small.ipynb", clean())
    return tmp_path


def execute(project: Path, number: str = "07", **options: object) -> notebooks.Executed:
    """Execute a lesson of the small project."""
    return notebooks.execute(number, directory=project / "notebooks", output_directory=project / "out", **options)


def test_a_lesson_is_executed_and_read_back(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The executed copy has outputs, values, figures and runs; the source stays as it was; progress names each cell."""
    lesson = clean()
    lesson["cells"].insert(6, code("show", (
        "from IPython.display import display\n"
        "for word in ('one', 'two'):\n"
        f"    display({{'image/png': '{PICTURE}', 'text/plain': word}}, raw=True)\n"
        "import os, pathlib\n"
        "checks.publish('run', pathlib.Path('runs') / 'smoke')\n"
        "checks.publish('cwd', os.getcwd())\n"
        "checks.publish('bytecode', os.environ.get('PYTHONDONTWRITEBYTECODE', 'written'))\n"
        "checks.publish('ledger', os.environ['COURSE_LEDGER'])"
    )))  # fmt: skip
    source = write(project / "notebooks" / "08_shows.ipynb", lesson)
    before = source.read_bytes()
    done = execute(project, "8")
    assert done.path == project / "out" / "08_shows.ipynb" and source.read_bytes() == before
    assert [path.relative_to(project / "out").as_posix() for path in done.figures] == [
        "08_figures/show.png", "08_figures/show-2.png",
    ]  # fmt: skip
    assert done.figures[0].read_bytes().startswith(b"\x89PNG")
    assert done.values["total"] == 4 and done.runs == [Path("runs/smoke")]
    assert done.values["cwd"] == os.fspath(project / "notebooks")
    assert done.values["bytecode"] == "written"
    assert Path(done.values["ledger"]).parent == project / "out", "a headless run keeps out of the learner's ledger"
    assert done.seconds > 0
    error = capfd.readouterr().err
    assert "check-the-sum" in error and "done" in error and "Traceback" not in error
    executed = json.loads(done.path.read_text())
    assert "papermill" not in executed["metadata"] and "holds: two and two" in json.dumps(executed["cells"])


def test_the_environment_of_the_caller_is_put_back(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel inherits is set for the kernel only; another kernel of the same name is not started."""
    other = project / "share" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "Mine", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(project / "share"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("COURSE_LEDGER", raising=False)
    before, directory = dict(os.environ), Path.cwd()
    execute(project)
    assert (dict(os.environ), Path.cwd()) == (before, directory)


def test_parameters_reach_the_notebook_and_a_broken_claim_is_named(project: Path) -> None:
    """A parameter that breaks the claim fails the lesson: the error names the cell and the claim, in one screen."""
    good = execute(project)
    content = good.path.read_bytes()
    with pytest.raises(notebooks.LessonFailed) as caught:
        execute(project, parameters={"second": 3})
    message = str(caught.value)
    assert message.startswith("07_small, cell check-the-sum: ClaimFailed: does not hold: two and two are four")
    assert len(message.splitlines()) < 20
    failed = project / "out" / "07_small.failed.ipynb"
    assert "ClaimFailed" in failed.read_text() and os.fspath(failed) in message
    assert good.path.read_bytes() == content, "the last good copy stays"
    execute(project)
    assert not failed.exists(), "a success takes the traceback away"
    assert not list((project / "out").glob(".*partial*"))


def test_a_guess_reaches_its_cell_and_the_ledger(project: Path) -> None:
    """It is written where a learner writes it, and is entered as a guess beside the course's own number."""
    execute(project, parameters={"guess": 3})
    (entry,) = json.loads((project / "out" / ".ledger.json").read_text())["entries"]
    assert (entry["guess"], entry["predicted"], entry["measured"]) == (3.0, 4.0, 4.0)
    assert notebooks.guesses("07", directory=project / "notebooks") == ["guess"]


def test_an_unknown_parameter_is_refused(project: Path) -> None:
    """papermill only warns about an unknown parameter; here nothing starts, and the known names are listed."""
    with pytest.raises(notebooks.LessonError, match=r"no parameter extra; its parameters are: first, second, guess"):
        execute(project, parameters={"extra": 3})
    assert not (project / "out").exists()


def test_a_dying_kernel_is_a_failed_lesson(project: Path) -> None:
    """A kernel that is killed (out of memory, say) gives the cell's name, not a hang."""
    write(project / "notebooks" / "09_dies.ipynb", notebook(code("die", "import os\nos.kill(os.getpid(), 9)")))
    with pytest.raises(notebooks.LessonFailed, match="09_dies, cell die: DeadKernelError"):
        execute(project, "09")


def test_an_interrupt_leaves_no_half_copy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's Interrupt ends the execution; neither a half-written copy nor a figure is left."""
    import papermill

    def interrupted(source: Path, target: Path, **options: object) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(project)
    assert list((project / "out").iterdir()) == []


@pytest.mark.parametrize("number", ["07", "7", "07_small", "07_small.ipynb"])
def test_a_lesson_is_found_by_number_or_name(project: Path, number: str) -> None:
    """A lesson answers to its number, with or without the zero, and to its name."""
    assert notebooks.find(number, directory=project / "notebooks").name == "07_small.ipynb"


def test_a_copy_beside_the_lesson_is_no_lesson(project: Path) -> None:
    """JupyterLab's Duplicate, a browser's second download and a failed execution leave one lesson 07."""
    for copy in ("07_small-Copy1", "07_small (1)", "07_small.failed", ".07_small.12.partial"):
        write(project / "notebooks" / f"{copy}.ipynb", clean())
    assert notebooks.find("07", directory=project / "notebooks").name == "07_small.ipynb"
    assert [lesson.number for lesson in notebooks.listing(directory=project / "notebooks")] == ["07"]


def test_an_unknown_lesson_names_the_known_ones(project: Path) -> None:
    """A number that does not exist, or exists twice, is refused with the list of lessons."""
    with pytest.raises(notebooks.LessonError, match="07_small"):
        notebooks.find("99", directory=project / "notebooks")
    write(project / "notebooks" / "07_other.ipynb", clean())
    with pytest.raises(notebooks.LessonError, match="2 notebooks"):
        notebooks.find("07", directory=project / "notebooks")


def test_the_listing_comes_from_the_text(project: Path) -> None:
    """Number, title, question and minutes are read from the markdown; other files are no lessons."""
    write(project / "notebooks" / "a_museum.ipynb", notebook(markdown("title", "# The museum\n\nNo question here.")))
    write(project / "notebooks" / "scratch.ipynb", clean())
    write(project / "notebooks" / "00_first.ipynb", clean())
    listing = notebooks.listing(directory=project / "notebooks")
    assert [lesson.number for lesson in listing] == ["00", "07", "a"]
    assert (listing[1].title, listing[1].question, listing[1].minutes) == ("A small lesson", "Does addition work?", 5)
    assert (listing[2].question, listing[2].minutes) == ("", None)


def test_publish_refuses_what_json_cannot_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of numpy, paths and lists go out; an arbitrary object is refused with its type."""
    import numpy

    checks.publish("loss", numpy.float32(0.5))
    checks.publish("where", Path("runs"))
    assert capsys.readouterr().out == "loss = 0.5\nwhere = runs\n"
    with pytest.raises(TypeError, match="'x' is of type object"):
        checks.publish("x", object())
