"""The environment files say the same thing."""

import re
import tomllib

import pytest
import yaml

from course_lib.common.project import PROJECT


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lock() -> dict:
    return tomllib.loads((PROJECT / "uv.lock").read_text(encoding="utf-8"))


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-").replace(".", "-")


def default_closure(lock: dict, pyproject: dict) -> dict[str, str]:
    """What `uv sync` installs: name to version, found by walking the lock's dependencies from the course."""
    by_name = {package["name"]: package for package in lock["package"]}
    course = by_name["nemotron-course"]
    groups = pyproject["tool"]["uv"]["default-groups"]
    todo = list(course["dependencies"]) + [d for g in groups for d in course["dev-dependencies"][g]]
    seen: set[tuple[str, str]] = set()
    while todo:
        dependency = todo.pop()
        package = by_name[dependency["name"]]
        for extra in ["", *dependency.get("extra", [])]:
            if (package["name"], extra) in seen:
                continue
            seen.add((package["name"], extra))
            todo += (
                package.get("optional-dependencies", {}).get(extra, []) if extra else package.get("dependencies", [])
            )
    return {name: by_name[name]["version"] for name, _ in seen}


def test_condas_list_equals_the_lock(lock: dict, pyproject: dict) -> None:
    """environment.yml pins exactly what `uv sync` installs; if not, run `make environment`."""
    content = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    assert dict(line.split("==") for line in pip) == default_closure(lock, pyproject)
    assert len(pip) == len(set(pip))


def test_condas_own_half_is_python_and_pip() -> None:
    """No conda channel is reachable where this is tested, so conda resolves as little as possible; the file says so."""
    text = (PROJECT / "environment.yml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert [entry for entry in content["dependencies"] if isinstance(entry, str)] == ["python=3.12", "pip"]
    assert "PIP_NO_DEPS=1" in text
    assert "not run" in text


def test_the_lock_fits_pyproject(lock: dict, pyproject: dict) -> None:
    """Every requirement of the project stands in the lock as it stands in pyproject.toml.

    Exact pins at their version.
    """
    versions = {package["name"]: package["version"] for package in lock["package"]}
    project = pyproject["project"]
    groups = pyproject["dependency-groups"].values()
    lines = [
        *project["dependencies"],
        *project["optional-dependencies"]["gpu"],
        *(line for group in groups for line in group),
    ]
    for line in lines:
        assert name_of(line) in versions, f"{line} is not in uv.lock: run `uv lock`"
        exact = re.search(r"==([0-9][A-Za-z0-9.]*)$", line)
        if exact:
            assert versions[name_of(line)] == exact[1]


def test_nvidias_stack_is_pinned_exactly(pyproject: dict) -> None:
    """The CPU redirection is tested against exactly these versions, so none may float."""
    pinned = {"torch==2.13.0", "megatron-core==0.19.2", "megatron-bridge==0.6.2"}
    assert pinned <= set(pyproject["project"]["dependencies"])
    from course_lib import stack

    assert {f"{name}=={version}" for name, version in stack.TESTED.items()} == pinned


def test_gpu_packages_are_named_with_a_reason_and_left_out(lock: dict, pyproject: dict) -> None:
    """A GPU-only package stands in the extra `gpu`, under a comment with its reason, and in no default installation."""
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    default = default_closure(lock, pyproject)
    for requirement in pyproject["project"]["optional-dependencies"]["gpu"]:
        line = next(i for i, line in enumerate(text) if f'"{requirement}"' in line)
        assert text[line - 1].strip().startswith("# "), f"{requirement} has no reason"
        assert name_of(requirement) not in default
    for override in pyproject["tool"]["uv"]["override-dependencies"]:
        if "never" in override:
            assert name_of(override) not in default


def test_the_python_version_is_one(pyproject: dict) -> None:
    """.python-version, pyproject.toml and environment.yml name the same Python, and uv must not download another."""
    assert (PROJECT / ".python-version").read_text(encoding="utf-8").strip() == "3.12"
    assert pyproject["project"]["requires-python"] == ">=3.12,<3.13"
    assert pyproject["tool"]["uv"]["python-downloads"] == "never"


def test_the_licence_is_complete(pyproject: dict) -> None:
    """LICENSE is the whole text of Apache-2.0, as pyproject.toml says."""
    text = (PROJECT / "LICENSE").read_text(encoding="utf-8")
    assert pyproject["project"]["license"] == "Apache-2.0"
    for part in ("Apache License", "Version 2.0, January 2004", "9. Accepting Warranty", "END OF TERMS AND CONDITIONS"):
        assert part in text


def test_the_rest_of_the_stack_is_pinned(pyproject: dict) -> None:
    """NeMo Run, Curator and AutoModel are real dependencies, at the versions that data/stack.json describes."""
    from course_lib.machine import stack_map

    pinned = set(pyproject["project"]["dependencies"])
    for box in stack_map.boxes():
        if box.distribution and not box.distribution.startswith("megatron"):
            assert any(re.sub(r"\[.*\]", "", line) == f"{box.distribution}=={box.tested}" for line in pinned), box.name
