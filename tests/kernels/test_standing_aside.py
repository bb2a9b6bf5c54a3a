"""The folder `kernels` never stands in for the Hugging Face distribution of that name."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run(code, *path):
    """Run code with the repository root first on the path, as a REPL in a checkout has it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transformers_sees_that_kernels_is_not_installed():
    run(
        "import sys; sys.modules['torch'] = None\n"  # only the look-up is wanted
        "from transformers.utils import import_utils as look\n"
        "from importlib.util import find_spec; assert find_spec('kernels') is not None, 'we are in the way'\n"
        "assert look._is_package_available('kernels', return_version=True) == (False, 'N/A')"
    )


def test_an_installed_kernels_is_found_behind_ours(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True\n")
    (tmp_path / "kernels" / "layer.py").write_text("answer = 42\n")
    run("import kernels; from kernels.layer import answer; assert kernels.real and answer == 42", tmp_path)


def test_our_own_kernels_import_by_their_full_name_beside_it():
    run("import kernels, longvid.kernels; assert longvid.kernels.__file__ and longvid.kernels is not kernels")
