"""The core imports torch and nothing heavier, and asks nothing of the machine."""

import subprocess
import sys

import performers

CODE = """
import importlib, importlib.util, sys, types
import torch

before = set(sys.modules)
torch.manual_seed(0)
expected = torch.rand(3)
torch.manual_seed(0)
settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
# The package's own __init__ re-exports everything: step around it, and run it last.
spec = importlib.util.find_spec("performers")
package = importlib.util.module_from_spec(spec)
sys.modules["performers"] = package
for name in ("features", "attention", "nn"):
    importlib.import_module("performers." + name)
    print(sorted(x for x in sys.modules if x.startswith("performers.") and x.count(".") == 1))
spec.loader.exec_module(package)
for name in package.__all__:
    getattr(package, name)
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(x for x in names if x not in sys.stdlib_module_names and x[0] != "_"))
assert torch.equal(torch.rand(3), expected)
assert settings == (
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
)
"""


def test_the_core_imports_torch_alone_and_changes_nothing():
    """And each of its packages none above it; whatever torch itself imports is torch's affair."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "['performers.features']",
        "['performers.attention', 'performers.features']",
        "['performers.attention', 'performers.features', 'performers.nn']",
        "['performers']",
    ]


def test_public_names():
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
