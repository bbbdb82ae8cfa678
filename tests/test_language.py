"""Docstrings open with a noun or a verb, and say when an error is raised."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path
    for folder in ("src", "studies", "tools", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
OPENINGS = ("What", "How", "Which", "Whether", "Where", "Why", "When", "Who")
# "Name: condition", of three words at least.
RAISED = re.compile(
    r"^\w*(Error|Exit|Interrupted|Warning|Interrupt|Exception): (?!It is\.)\S+( \S+){2,}"
)


def problems(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        place = f"line {getattr(node, 'lineno', 1)}"
        if docstring.split()[0] in OPENINGS:
            found.append(f"{place}: opens with {docstring.split()[0]!r}")
        if "\nRaises:\n" in docstring:
            section = docstring.split("\nRaises:\n")[1].split("\n\n")[0]
            # An entry begins at the first level of indentation, and its text goes on deeper.
            entries = re.sub(r"\n {5,}", " ", section).splitlines()
            found += [
                f"{place}: Raises without a condition: {entry.strip()!r}"
                for entry in entries
                if not RAISED.match(entry.strip())
            ]
    return found


def test_docstrings():
    found = {str(path.relative_to(ROOT)): problems(path.read_text()) for path in FILES}
    assert {path: some for path, some in found.items() if some} == {}


def test_the_rules():
    assert problems('"""How it works."""')
    assert problems('def f():\n    """Do.\n\n    Raises:\n        ValueError: It is.\n    """')
    assert problems('def f():\n    """Do.\n\n    Raises:\n        ValueError\n    """')
    assert not problems(
        'def f():\n    """Do.\n\n    Raises:\n        ValueError: `window` is\n'
        '            negative.\n    """'
    )
