"""Write the bytecode of what a first run imports: `.venv/bin/python course_lib/machine/bytecode.py`, called by the set-up.

Why not everything, and why not nothing. In processor seconds on two shared cores, where a rank imports 3,500 modules:

- `uv sync --compile-bytecode` compiles all 25,000 files in 156 s; the imports then take 10 s.
- Nothing compiled: the first process imports for 27 s and writes its own bytecode. The notebook's kernel and the fork
  server would both pay that, and so would every process of an environment that forbids writing bytecode.
- `IMPORTED` without `LARGE_AND_UNUSED` takes 29 s, on all cores at once; the imports then take 10 s.

A module that the lists miss costs milliseconds at its first import.
"""

import compileall
import re
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

# Top-level packages of which a rank, pytest or a papermill kernel loads more than 150 KB of source.
IMPORTED = """
    _pytest absl accelerate antlr4 attr click cuda dateutil dill filelock fsspec httpcore httpx huggingface_hub
    ipykernel IPython ipywidgets jinja2 jupyter_client matplotlib megatron mpl_toolkits mpmath multistorageclient
    nbformat numpy omegaconf packaging pandas papermill PIL psutil pyparsing regex requests rich sympy torch tornado
    traitlets transformers triton urllib3 webdataset yaml zmq
""".split()
# Parts of those packages that none of them loads and that hold more than 0.9 MB of source.
LARGE_AND_UNUSED = """
    megatron/bridge/perf_recipes sympy/physics torch/_dynamo torch/_inductor torch/_vendor torch/onnx torch/testing
    transformers/models
""".split()


def compile_first_run(packages: Path) -> None:
    """Compile on all cores; files that are up to date are left alone."""
    unused = re.compile(f"^({'|'.join(LARGE_AND_UNUSED)})/|/_?tests?/")
    paths = (path for name in IMPORTED for path in (packages / name).rglob("*.py"))
    files = [str(path) for path in paths if not unused.search(path.relative_to(packages).as_posix())]
    warnings.simplefilter("ignore", SyntaxWarning)  # other people's escape sequences
    with ProcessPoolExecutor() as pool:
        compile_file = partial(compileall.compile_file, quiet=2)
        list(pool.map(compile_file, files, chunksize=40))


if __name__ == "__main__":
    compile_first_run(Path(sysconfig.get_path("purelib")))
