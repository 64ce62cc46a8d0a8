"""Who may import whom: the layers of the package, read from its sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "minidit": ROOT / "minidit",
    "minidit_kernels": ROOT / "kernels" / "minidit_kernels",
    "weights_convert": ROOT / "weights_convert",
}

# What a module may import beside the standard library; the first pattern that fits it counts.
PLAN = ("minidit.cache.plan",)
HOST_ONLY = (*PLAN, "minidit.cache.policies.*", "minidit.cache.(macs|spec|trace)", "minidit.errors")
TENSORS = ("minidit_kernels.*", "torch", "einops", "safetensors")
PARTS = ("minidit.presets", "minidit.layers", "minidit.attention")
ANYTHING = ("minidit", "minidit.*", *TENSORS, "numpy", "tqdm")
LAYERS = {
    "minidit.(cache|cache.policies|models|text|vae)": (),  # packages: empty
    "minidit_kernels": (),
    "minidit_kernels.*": ("minidit_kernels.*", "torch", "triton"),
    "minidit.presets": (),
    "minidit.cache.plan": (),
    "minidit.cache.placement": (),
    "minidit.cache.policies.*": (
        *PLAN, "minidit.cache.placement", "minidit.cache.policies.(magcache_ratios|teacache_polynomials)"
    ),
    "minidit.cache.(macs|spec|trace)": HOST_ONLY,
    "minidit.cache.store": (*PLAN, "minidit.attention", "minidit.memory", "minidit_kernels.*", "torch"),
    "minidit.cache.(loop|seam|recorder|measure)": (
        *PLAN, "minidit.cache.(seam|recorder|store|measure)", "minidit.attention", "minidit_kernels.*",
        "torch",
    ),
    "minidit.attention_table": (),
    "minidit.exchange": ("torch",),
    "minidit.layers": TENSORS,
    "minidit.attention": (*TENSORS, "minidit.attention_table", "minidit.exchange", "minidit.layers"),
    "minidit.errors": (),
    "minidit.components": ("torch",),  # which imports a component's own file by name
    "minidit.tensor_files": ("safetensors",),
    "minidit.(weights|schedules)": ("minidit.presets", "minidit.(tensor_files|memory)", *TENSORS),
    "minidit.quantize": ("minidit.layers", "torch"),
    "minidit.offload": (*PLAN, "torch"),
    "minidit.memory": ("torch",),
    "minidit.(video|metrics)": (*TENSORS, "numpy", "av"),
    "minidit.models.*": (*PARTS, *PLAN, "minidit.cache.(loop|seam)", *TENSORS),
    "minidit.text.(captions|hunyuan_video)": (
        *PARTS, *TENSORS, "minidit.text.(prompts|tokenizers)", "ftfy", "tokenizers"
    ),  # a family's prompts upon what all families share
    "minidit.text.*": (*PARTS, *TENSORS, "sentencepiece", "ftfy", "tokenizers"),
    "minidit.vae.tiles": TENSORS,
    "minidit.vae.open_sora": (*PARTS, "minidit.vae.(kl|tiles)", *TENSORS),  # one of videos upon one of images
    "minidit.vae.*": (*PARTS, "minidit.vae.tiles", *TENSORS),
    "minidit.report": (*ANYTHING, "matplotlib"),
    r"minidit.(\w+|cache.(profile|calibrate|forecasts|fits))": ANYTHING,
    "minidit": ANYTHING,
    "weights_convert.*": (
        "weights_convert.*", "minidit.presets", "minidit.(errors|weights|tensor_files)",
        "minidit.(models|text|vae).*", "torch", "safetensors",
    ),
    "weights_convert": (),
}  # fmt: skip


def name_of(path: Path, package: str) -> str:
    parts = (package, *path.relative_to(PACKAGES[package]).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


SOURCES = {name_of(path, p): path for p, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))}


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern covers a module: a regular expression, but "." is a dot and "*" anything."""
    return re.fullmatch(pattern.replace(".", r"\.").replace("*", ".+"), name) is not None


def imports(source: str) -> set[str]:
    """Every module that a source imports, in functions too; of other packages the top name alone."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & set(SOURCES) or {node.module}
    return {name if name.split(".")[0] in PACKAGES else name.split(".")[0] for name in found}


def violations(module: str, source: str) -> list[str]:
    """What a module imports against the table."""
    allowed = next((names for pattern, names in LAYERS.items() if fits(module, pattern)), None)
    assert allowed is not None, f"{module} has no layer; add it to LAYERS"
    outside = imports(source) - sys.stdlib_module_names
    return sorted(name for name in outside if not any(fits(name, pattern) for pattern in allowed))


@pytest.mark.parametrize("module", SOURCES)
def test_modules_import_only_what_their_layer_may(module):
    assert violations(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("minidit.presets", "import torch"),
        ("minidit.cache.plan", "from minidit.presets import PRESETS"),
        ("minidit.cache.policies.none", "from minidit.cache.store import Store"),
        ("minidit.cache.loop", "from minidit.cache.policies.none import NoCache"),
        ("minidit.cache.loop", "def f():\n    from minidit.models import wan"),
        ("minidit.attention", "from minidit.cache.plan import Plan"),
        ("minidit.models.wan", "from minidit.vae.wan import WanVAE"),
        ("minidit.models.wan", "import minidit.models.other"),
        ("minidit.vae.wan", "from minidit import generate"),
        ("minidit.text.t5", "import transformers.models.t5"),
        ("minidit.generate", "from weights_convert import convert"),
        ("minidit_kernels.mix", "from minidit.layers import RMSNorm"),
        ("weights_convert.wan", "from minidit.sampling import denoise"),
    ],
)
def test_the_walk_sees_what_is_forbidden(module, source):
    assert len(violations(module, source)) == 1


def test_only_declared_dependencies_are_imported():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listing = text.split("\ndependencies = [")[1].split("]")[0]
    declared = set(re.findall(r'"(\w+)', listing)) | {"matplotlib", "tokenizers"}  # extras: report, hunyuan
    outside = {name for path in SOURCES.values() for name in imports(path.read_text(encoding="utf-8"))}
    assert {n for n in outside if n.split(".")[0] not in PACKAGES} - sys.stdlib_module_names <= declared


def run(code: str) -> str:
    """Run code in a fresh interpreter -> what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_planning_needs_neither_torch_nor_triton():
    patterns = ("minidit", "minidit.presets", *HOST_ONLY)
    light = [name for name in SOURCES if any(fits(name, pattern) for pattern in patterns)]
    assert {"minidit", "minidit.presets", "minidit.cache.plan", "minidit.cache.policies.none"} <= set(light)
    heavy = ("torch", "triton", "numpy", "safetensors", "einops")
    code = f"import sys, {', '.join(light)}; print([name for name in {heavy} if name in sys.modules])"
    assert run(code) == "[]"


def test_everything_works_without_triton():
    names = ["minidit.generate", *(name for name in SOURCES if name.startswith("minidit_kernels."))]
    assert (
        run(f"import sys; sys.modules['triton'] = None; import {', '.join(names)}; print('fine')") == "fine"
    )


def test_the_name_kernels_is_left_to_the_package_on_pypi():
    assert not (ROOT / "kernels" / "__init__.py").exists()
