"""The levels of the design hold: who may import whom, read from the source, and what importing costs."""

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"longvid": "longvid"} | {f"longvid.{name}": name for name in ("configs", "kernels", "launch", "parallel")}

LEVELS = {
    0: "errors document settings script geometry plan events configs launch.env launch.hosts launch.network chips"
    " launch.report preemption fingerprint manifest ending importers films batch.jobs batch.table"
    " sparsity.settings cache.settings cache.plan cache.table parallel parallel.topology parallel.partition"
    " parallel.actions parallel.rules parallel.queue_units parallel.chunk_units parallel.schedule parallel.snapshot"
    " parallel.findings parallel.verify parallel.verify_queue parallel.verify_chunks parallel.verify_decoding"
    " parallel.decoding parallel.decode_program parallel.rank_actions",
    1: "kernels",
    2: "parallel.mesh parallel.comm parallel.collectives parallel.ways parallel.link launch.watch",
    3: "parallel.attention parallel.spans parallel.around parallel.ulysses parallel.ring parallel.usp"
    " parallel.sequence_libraries parallel.sequence parallel.vin sampler noise sparsity cache",
    4: "models parallel.stage parallel.run_state parallel.stage_inputs parallel.message_shapes parallel.decisions"
    " parallel.piece_decoding parallel.executor decode decoding_parts rounds writer segments hls checkpoint together"
    " folder_lock live film_stream trace ledger memory machines meshes",
    5: "engine orders notices ranks rank_model conditioning render_tools renderer doctor tune calibrate",
    6: "launch",
    7: "cli bench_commands train_commands results __main__ progress journal overview outlook predict measured options"
    " batch",
}
BESIDE = "training metrics bench measure"
"""Beside the levels: may import 0 to 5, and only the command line imports them."""

LEVEL_OF = {f"longvid.{name}": level for level, names in LEVELS.items() for name in names.split()}
LEVEL_OF |= {f"longvid.{name}": 8 for name in BESIDE.split()}
MAY_IMPORT = {
    **{level: set(range(level + 1)) for level in (0, 1, 3, 4, 5)},
    2: {0, 2},
    6: {0, 2, 5, 6},
    7: {*range(8), 8},
    8: {*range(6), 8},
}
MODEL_LIBRARIES = {"accelerate", "diffusers", "safetensors", "tokenizers", "transformers"}


def find_modules():
    """Every module's dotted name and file."""
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), file


MODULES = dict(find_modules())


def imports_of(file):
    """The dotted names that a file imports, anywhere in it; a name imported from a package may be its module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


IMPORTS = {name: set(imports_of(file)) for name, file in MODULES.items()}
OURS = {name: {target for target in targets if target in MODULES} for name, targets in IMPORTS.items()}


def level_of(module):
    """The level of the longest part of a dotted name that the table holds."""
    while module not in LEVEL_OF:
        module = module.rpartition(".")[0]
        assert module, "the table of levels does not hold this module"
    return LEVEL_OF[module]


def is_in(module, *packages):
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"longvid"}))
def test_a_module_imports_only_levels_that_its_own_may(module):
    allowed = MAY_IMPORT[level_of(module)]
    wrong = {target: level_of(target) for target in OURS[module] - {"longvid"} if level_of(target) not in allowed}
    assert not wrong, f"{module} is of level {level_of(module)} and imports {wrong}"


def test_no_module_but_the_front_door_knows_the_engine_from_below():
    assert OURS["longvid"] <= {"longvid.engine", "longvid.models.accelerate"}


def test_there_is_no_import_cycle():
    try:
        TopologicalSorter(OURS).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_pure_modules_import_only_the_standard_library_pydantic_and_yaml():
    allowed = sys.stdlib_module_names | {"pydantic", "pydantic_core", "yaml", "longvid"}
    pure = [module for module in MODULES if module == "longvid" or level_of(module) == 0]
    wrong = {m: sorted({t.partition(".")[0] for t in IMPORTS[m]} - allowed) for m in pure}
    assert not {module: targets for module, targets in wrong.items() if targets}


def test_only_models_and_training_know_the_model_libraries():
    for module in MODULES:
        known = MODEL_LIBRARIES & {target.partition(".")[0] for target in IMPORTS[module]}
        homes = ("longvid.models", "longvid.training", "longvid.bench", "longvid.checkpoint")
        assert not known or is_in(module, *homes), f"{module} imports {known}"


def test_few_files_know_how_processes_talk():
    home = (*(f"longvid.parallel.{name}" for name in ("collectives", "comm", "ways", "mesh")), "longvid.launch")
    for module in MODULES:
        if any(is_in(target, "torch.distributed") for target in IMPORTS[module]):
            assert is_in(module, *home), f"{module} imports torch.distributed"


def test_every_package_is_listed_for_installation():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, file in MODULES.items() if file.name == "__init__.py")


def test_no_test_folder_is_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def loaded_after(code, cwd):
    """The modules that a fresh interpreter has loaded after running `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(['MODULES', *sys.modules]))"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_importing_longvid_loads_no_torch(tmp_path):
    loaded = loaded_after("import longvid", tmp_path)
    assert "longvid" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", *MODEL_LIBRARIES}


def test_the_pure_modules_load_no_torch(tmp_path):
    pure = [module for module in MODULES if module != "longvid" and level_of(module) == 0]
    assert not loaded_after(f"import {', '.join(pure)}", tmp_path) & {"torch", *MODEL_LIBRARIES}


def test_the_help_of_the_command_line_loads_no_torch(tmp_path):
    code = """
import sys
sys.argv = ["longvid", "--help"]
from longvid.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert not loaded_after(code, tmp_path) & {"torch", *MODEL_LIBRARIES}
