"""Architecture: imports point to lower layers, the command line starts without JAX, scripts stop at an error."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the lowest to the highest; a module may import from lower layers. The name of a package stands for those of its
# modules that have no entry of their own. Modules of one package may import each other without cycles.
LAYERS = [
  "types config page",
  "trials sharding hosts yardsticks beam_search task_metrics early_stopping",
  "data models flags",
  "data.packing models.attention sampling",
  "data.pipeline models.transformer finetune",
  "checkpoint interop optim metrics objectives",
  "plots pretrained step",
  "program",
  "generation embeddings",
  "retrieval predict",
  "evaluate resume convert",
  "train",
  "verify plan report parametrization",
  "preview",
  "sweeps",
  "cli",
  "__main__",
]
LAYER = {name: height for height, names in enumerate(LAYERS) for name in names.split()}


def modules():
  """{module name without `llmjax.`: path}."""
  files = sorted((ROOT / "llmjax").rglob("*.py"))
  names = {".".join(f.relative_to(ROOT / "llmjax").with_suffix("").parts).removesuffix(".__init__"): f for f in files}
  names.pop("__init__")  # imports lazily, with names of modules as strings
  return names


def imports(path, known):
  """The llmjax modules that a file imports, also inside functions, but not under TYPE_CHECKING."""
  imported = set()

  def visit(node):
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
      return
    if isinstance(node, ast.Import):
      imported.update(alias.name.removeprefix("llmjax.") for alias in node.names if alias.name.startswith("llmjax."))
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmjax":
      module = node.module.removeprefix("llmjax").removeprefix(".")
      for alias in node.names:
        inside = f"{module}.{alias.name}".removeprefix(".")
        imported.add(inside if inside in known else module)
    for child in ast.iter_child_nodes(node):
      visit(child)

  visit(ast.parse(path.read_text(encoding="utf-8")))
  return imported - {""}


def layer_of(module):
  """(height, module or package that is listed in LAYERS)."""
  while module not in LAYER:
    assert "." in module, f"llmjax.{module} has no layer: add it to LAYERS in tests/structure_test.py"
    module = module.rpartition(".")[0]
  return LAYER[module], module


def test_imports_point_to_lower_layers():
  known = modules()
  wrong = []
  for module, path in known.items():
    for other in imports(path, known):
      (height, listed), (other_height, other_listed) = layer_of(module), layer_of(other)
      same_package = listed == other_listed and module.split(".")[0] == other.split(".")[0] and "." in module
      if other_height >= height and not same_package:
        wrong.append(f"llmjax.{module} imports llmjax.{other}")
  assert not wrong, "these imports do not point to a lower layer: " + "; ".join(wrong)


def test_imports_have_no_cycles():
  known = modules()
  graph = {module: imports(path, known) for module, path in known.items()}
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
    "from llmjax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "from llmjax.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
    "from llmjax.cli import main\nmain(['configs'])",
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
