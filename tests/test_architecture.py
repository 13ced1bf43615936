"""The structure of CONTRIBUTING.md: imports go down only, and one name means one thing."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cl_ray"
LAYERS = [
    "uri errors console base_config environment rng device distributed signals storage "
    "metrics_file batch step_log",
    "data.config networks.config losses.config evaluation.config",
    "train_config",
    "config",
    "cli",
    "data",
    "data.file_tree data.splits data.writer data.source_config",
    "data.conversion data.labels data.archives",
    "data.arrays data.image_folder data.parquet_source data.stacked_mnist data.torchvision_source",
    "data.sources",
    "networks losses",
    "step_noise cuda_graph prior novelty adam muon optimizer forward",
    "gan",
    "trainer checkpoint",
    "model",
    "evaluation",
    "training.ray_compat training.resources",
    "export inference report label_prediction",
    "training",
    "tuning",
    "doctor",
    "commands",
    "__main__",
]
"""Modules and packages from the ground up; each imports from its own layer or lower ones.

`cli` parses flags for the commands; it imports a command only when that command is typed. What
training, search and inference ask of a cluster is below all three. What makes a dataset of a source
is above datasets at rest and what trains on them.
"""
SUB_CONFIG_ONLY = (
    "data networks losses step_noise cuda_graph prior novelty adam muon optimizer forward step_log "
    "gan trainer checkpoint batch"
)
"""These take a part of the config, never the whole tree."""
WITHOUT_RAY = (
    "networks losses gan trainer distributed checkpoint batch rng step_noise step_log prior "
    "novelty adam muon optimizer forward model"
)
"""These work in a notebook that has no Ray."""
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def place(module: str) -> str:
    """Return the entry of LAYERS that a module falls under: its own, or that of its package."""
    known = {name for layer in LAYERS for name in layer.split()}
    return module if module in known else module.split(".")[0]


def layer(module: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if place(module) in names.split()]
    assert found, f"{module} is in no layer: name it in LAYERS of this file"
    return found[0]


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports, also inside functions and for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (n for n in inside if n.removeprefix("cl_ray.") in MODULES)
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def internal(tree: ast.Module) -> set[str]:
    names = {name.removeprefix("cl_ray.") for name in imports(tree) if name.startswith("cl_ray.")}
    return {name for name in names if name in MODULES}


def test_every_module_has_a_layer() -> None:
    for module in MODULES:
        assert layer(module) >= 0


def test_imports_go_down_only() -> None:
    climbing = [
        f"{module} imports {other}"
        for module, tree in MODULES.items()
        for other in internal(tree)
        if layer(other) > layer(module)
    ]
    assert not climbing, "move the import, or name a new module in a higher layer of LAYERS"


def test_lower_layers_take_sub_configs() -> None:
    for module, tree in MODULES.items():
        if place(module).split(".")[0] in SUB_CONFIG_ONLY.split():
            assert "config" not in internal(tree), module


def test_the_method_needs_no_ray() -> None:
    for module, tree in MODULES.items():
        if place(module) in WITHOUT_RAY.split():
            assert not {name for name in imports(tree) if name.split(".")[0] == "ray"}, module


def test_a_public_name_is_defined_once() -> None:
    homes = defaultdict(list)
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module)
    homes.pop("command"), homes.pop("main", None)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_private_parts_of_ray_are_in_one_file() -> None:
    private = re.compile(
        r"\bray\.(?:_private|_raylet|autoscaler\._private|\w+\._internal)|\bray\.util\.state\b"
    )
    users = [p for p in PACKAGE.rglob("*.py") if private.search(p.read_text())]
    assert [str(p.relative_to(PACKAGE)) for p in users] == ["training/ray_compat.py"]
