"""Architecture: imports point to lower layers, the command line starts without JAX, scripts stop at an error."""

import ast
import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the lowest to the highest layer. A module may import from packages in lower layers, and from its own package.
LAYERS = (
  "config",
  "examples",
  "types trees storage metrics",
  "distributed datasets telemetry",
  "models data reporting",
  "interop objectives",
  "checkpoints",
  "training inference",
  "evaluation diagnostics",
  "sweeps",
  "cli",
  "__main__",
)
LAYER = {package: height for height, packages in enumerate(LAYERS) for package in packages.split()}


def modules():
  """Return {module name without `llmjax.`: path}."""
  files = sorted((ROOT / "llmjax").rglob("*.py"))
  names = {".".join(f.relative_to(ROOT / "llmjax").with_suffix("").parts).removesuffix(".__init__"): f for f in files}
  names.pop("__init__")  # imports lazily, with names of modules as strings
  return names


def imported_modules(path, known):
  """Return the llmjax modules that a file imports, also inside functions and under TYPE_CHECKING."""
  imported = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      imported.update(alias.name.removeprefix("llmjax.") for alias in node.names if alias.name.startswith("llmjax."))
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmjax":
      module = node.module.removeprefix("llmjax").removeprefix(".")
      for alias in node.names:
        inside = f"{module}.{alias.name}".removeprefix(".")
        imported.add(inside if inside in known else module)
  return imported - {""}


def test_packages_import_lower_layers_only():
  known = modules()
  wrong = []
  for module, path in known.items():
    package = module.split(".")[0]
    assert package in LAYER, f"llmjax.{package} has no layer: add it to LAYERS in tests/structure_test.py"
    for other in imported_modules(path, known):
      if other.split(".")[0] != package and LAYER[other.split(".")[0]] >= LAYER[package]:
        wrong.append(f"llmjax.{module} imports llmjax.{other}")
  assert not wrong, "these imports do not point to a lower layer: " + "; ".join(wrong)


def test_imports_have_no_cycles():
  known = modules()
  graph = {module: imported_modules(path, known) - {module.rpartition(".")[0]} for module, path in known.items()}
  done: set[str] = set()

  def follow(module, path):
    assert module not in path, "cyclic imports: " + " -> ".join([*path, module])
    if module not in done:
      for other in graph.get(module, ()):
        follow(other, [*path, module])
      done.add(module)

  for module in graph:
    follow(module, [])


def test_modules_import_absolutely_and_no_configs():
  for path in modules().values():
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}: write `from llmjax import ...`"
        assert node.module.split(".")[0] not in ("configs", "experiments"), f"{path} imports {node.module}"


# Names that say nothing outside their file.
GENERIC_NAMES = set("check draw join load place read run split table write Layout Settings Source".split())
MAX_FILE_LINES, MAX_FUNCTION_LINES = 430, 80


def definitions(path):
  """Return the functions and classes of a file, with those of its classes."""
  for node in ast.parse(path.read_text(encoding="utf-8")).body:
    yield node
    if isinstance(node, ast.ClassDef):
      yield from (child for child in node.body if isinstance(child, ast.FunctionDef))


def test_generic_names_are_defined_in_one_module_at_most():
  defined = collections.defaultdict(list)
  for module, path in modules().items():
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in GENERIC_NAMES:
        defined[node.name].append(module)
  assert not {name: found for name, found in defined.items() if len(found) > 1}


def test_files_are_short():
  lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
  assert not {module: length for module, length in lengths.items() if length > MAX_FILE_LINES}


def test_long_functions_have_a_comment_with_the_reason():
  long = []
  for module, path in modules().items():
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in definitions(path):
      if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if not lines[first - 2].lstrip().startswith("#"):
          long.append(f"llmjax.{module}:{node.name}")
  assert not long, f"longer than {MAX_FUNCTION_LINES} lines without a comment above"


@pytest.mark.parametrize(
  "code",
  [
    "import llmjax, llmjax.config",
    "from llmjax.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "from llmjax.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
    "from llmjax.cli.main import main\nmain(['configs'])",
  ],
  ids=["import", "help", "train help", "configs"],
)
def test_command_line_starts_without_jax(code):
  heavy = ("jax", "flax", "tensorflow_datasets", "matplotlib", "orbax", "pyarrow")
  code += f"\nimport sys\nloaded = [m for m in {heavy} if m in sys.modules]\nassert not loaded, loaded"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_scripts_stop_at_the_first_error():
  scripts = [*ROOT.glob("launch/**/*.sh"), ROOT / ".ci" / "run"]
  assert len(scripts) > 2
  for script in scripts:
    assert re.search(r"^set -euo pipefail$", script.read_text(), re.MULTILINE), f"{script} lacks `set -euo pipefail`"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck():
  scripts = [*ROOT.glob("launch/**/*.sh"), *ROOT.glob("experiments/**/*.sh"), ROOT / ".ci" / "run"]
  done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
