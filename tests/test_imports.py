"""The core imports torch and nothing heavier, and asks nothing of the machine."""

import subprocess
import sys

HEAVY = (
    "transformers",
    "datasets",
    "matplotlib",
    "Bio",
    "accelerate",
    "typer",
    "pyarrow",
    "rich",
    "tokenizers",
    "safetensors",
    "pandas",
    "scipy",
    "triton",
)


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )


def test_the_core_imports_torch_alone():
    """Whatever torch itself imports is torch's affair."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from performers import *\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        f"print(sorted(names & set({HEAVY!r})))\n"
        "print(sorted(n for n in names if n not in sys.stdlib_module_names and n[0] != '_'"
        " and n not in ('performers', 'torch')))"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[]", "[]"]


def test_packages_import_nothing_above_them():
    # The package's own __init__ re-exports everything: step around it.
    code = (
        "import importlib, importlib.util, sys, types\n"
        "spec = importlib.util.find_spec('performers')\n"
        "package = types.ModuleType('performers')\n"
        "package.__path__ = list(spec.submodule_search_locations)\n"
        "sys.modules['performers'] = package\n"
        "for name in ('features', 'attention', 'nn'):\n"
        "    importlib.import_module('performers.' + name)\n"
        "    print(sorted(m.split('.')[1] for m in sys.modules if m.count('.') == 1"
        " and m.startswith('performers.')))"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "['features']",
        "['attention', 'features']",
        "['attention', 'features', 'nn']",
    ]


def test_importing_leaves_global_randomness_and_settings_alone():
    code = (
        "import torch\n"
        "torch.manual_seed(0); expected = torch.rand(3)\n"
        "torch.manual_seed(0); dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()\n"
        "threads = torch.get_num_threads()\n"
        "import performers\n"
        "assert torch.equal(torch.rand(3), expected)\n"
        "assert (dtype, grad, threads) == (torch.get_default_dtype(), torch.is_grad_enabled(),"
        " torch.get_num_threads())"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_public_names():
    import performers

    for name in (
        "favor_attention",
        "favor_attention_weights",
        "SoftmaxFeatures",
        "GeneralizedFeatures",
        "FavorState",
        "PerformerAttention",
        "redraw_features_",
        "backends",
        "use_backend",
    ):
        assert name in performers.__all__
        assert getattr(performers, name).__doc__
