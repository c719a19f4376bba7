"""Architecture: imports point to lower layers, the command line starts without JAX, scripts stop at an error."""

import ast
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
